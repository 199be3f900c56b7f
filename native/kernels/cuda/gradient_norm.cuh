// Sums of squares of a gradient by groups of blocks (backend.h, TmSumSquares), to the bit as
// kernels/cpu/gradient_norm.cc: for the clip norm of a step whose gradient stays on the device.
//
//   shapes  values f32 or bf16 [num_blocks, 256]; group_sums f64 [ceil(num_blocks / 128)]
//   launch  grid one block a group, 256 threads: 8 threads a block of elements, 32 at a time
//   needs   values 32-byte aligned for whole sectors; no shape is refused
//   floor   4 (2) bytes an element: bound by memory
//   order   lane j % 8 ascending, lanes by the tree that __shfl_xor over 1, 2, 4 gives, blocks
//           ascending by one thread. A product of two float32 is exact in float64
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void sum_squares(const TmSumSquares& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
