// Packs fixed-point blocks as frames of the exchange carry them, and takes their linear digests, to
// the bit as engine/codec_packing.h does on the CPU (backend.h, TmPackBlocks).
//
//   shapes  values i64 [num_blocks, 256]; shapes u8 [num_blocks, 2]; words u32, 8 * width a block
//   launch  three kernels. Blocks are measured, a warp each (grid ceil(num_blocks / 8), block 256);
//           chunks add up their blocks, a thread block each, and say where each block's words
//           start; a warp for each block writes them (grid ceil(num_blocks / 8), block 256)
//   floor   8 bytes an element read (twice here), the packed bytes written
//   order   integers modulo 2^64: any
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void pack_blocks(const TmPackBlocks& args, cudaStream_t stream);

// Entries of the table: round_blocks and pack_blocks.
void fill_exchange(TmBackend& backend);

}  // namespace tunemesh::cuda
