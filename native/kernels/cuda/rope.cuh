// Rotary positions in place, pairs (i, i + F/2) as in the Hugging Face Llama code; Element float or
// bfloat16 (s bytes).
//   x[i] = x[i] cos - x[i+F/2] sin,  x[i+F/2] = x[i+F/2] cos + x[i] sin;  inverse: sin negated
//
//   shapes  x [n, heads * F] in rows of x_stride; positions [n]; cos, sin [max_position, F/2]
//   launch  grid.cuh: 16 bytes of both halves a thread. Where rows are quantised too, a block of
//           256 has a row, which waits in shared memory as in swiglu.cuh
//   needs   positions within the tables
//   floor   2 s n heads F bytes; quantised to w columns s n (w - heads F) + n w more
//   source  Su et al. 2021
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

template <typename Element>
void rope(const TmRope& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
