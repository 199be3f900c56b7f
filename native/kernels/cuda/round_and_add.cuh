// Rounds blocks of a gradient to fixed point and adds them to int64, or overwrites, to the bit as
// engine/codec_rounding.h does on the CPU (backend.h, TmRoundBlocks and TmRoundAndAdd).
//
//   shapes  gradient f32 [num_blocks, 256]; accumulator i64 [num_blocks, 256]
//   launch  grid ceil(num_blocks / 8), block 256: a warp a block of the vector, 8 elements a thread
//   numbers the scaling is a product with a power of two in double, exact; adding 1.5 * 2^52 rounds
//           it to the nearest integer, ties to even
//   failure `outcome` becomes the largest of ~(block << 8 | status): the first bad block, whatever
//           the order of execution. The accumulator is then partly changed
//   floor   20 bytes an element, 12 where it overwrites
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void round_blocks(const TmRoundBlocks& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
