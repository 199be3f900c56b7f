// Rotary positions in place, pairs (i, i + F/2) as in the Hugging Face Llama code.
//   x[i] = x[i] cos - x[i+F/2] sin,  x[i+F/2] = x[i+F/2] cos + x[i] sin;  inverse: sin negated
//
//   shapes  x [n, heads * F] in rows of x_stride; positions [n]; cos, sin [max_position, F/2]
//   launch  grid (n, ceil(heads F/2 / 1024)), block 256: a pair a thread and round
//   needs   positions within the tables
//   floor   8 n heads F bytes
//   source  Su et al. 2021
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void rope(const TmRope& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
