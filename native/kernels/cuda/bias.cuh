// Bias of a projection, its gradient, and the sum of two vectors; Element float or bfloat16
// (s bytes).
//   bias_add       y[n,c] += bias[c]
//   bias_grad_add  dbias[c] += sum_n dy[n,c]
//   add            y[i] += x[i]
//
//   shapes  y, dy [n, c] in rows of `stride`; bias, dbias f32 [c]
//   launch  bias_add: grid.cuh; bias_grad_add: column_sum.cuh; add: a chunk of 16 bytes a thread,
//           block 256
//   order   dbias: column_sum.cuh
//   floor   2 s n c, s n c and 3 s n bytes
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/backend.h"
#include "kernels/cuda/column_sum.cuh"

namespace tunemesh::cuda {

struct Bias {
  TmElement* y;         // bias_add's
  const TmElement* dy;  // bias_grad_add's
  const float* bias;
  float* dbias;
  size_t n, c, stride;
};
template <typename Element>
void bias_add(const Bias& args, cudaStream_t stream);
template <typename Element>
void bias_grad_add(const Bias& args, const Scratch& scratch, cudaStream_t stream);

struct AddElements {
  TmElement* y;
  const TmElement* x;
  size_t n;
};
template <typename Element>
void add(const AddElements& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
