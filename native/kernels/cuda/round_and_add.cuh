// Rounds blocks of a gradient to fixed point and adds them to int64, to the bit as
// engine/codec_loops.h does on the CPU (backend.h, TmRoundAndAdd).
//
//   shapes  gradient f32 [num_blocks, 256]; accumulator i64 [num_blocks, 256]
//   launch  grid num_blocks, block 256: an element a thread
//   numbers the scaling is a product with a power of two in double, exact; adding 1.5 * 2^52 rounds
//           it to the nearest integer, ties to even
//   failure `outcome` starts as kNoBadBlock and becomes the smallest of (block << 8 | status): the
//           first bad block, whatever the order of execution. The accumulator is then partly
//           changed
//   floor   20 bytes an element
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

constexpr unsigned long long kNoBadBlock = ~0ull;

void round_and_add(const TmRoundAndAdd& args, unsigned long long* outcome, cudaStream_t stream);

}  // namespace tunemesh::cuda
