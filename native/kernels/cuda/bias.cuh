// Bias of a projection, its gradient, and the sum of two vectors.
//   bias_add       y[n,c] += bias[c]
//   bias_grad_add  dbias[c] += sum_n dy[n,c]
//   add            y[i] += x[i]
//
//   shapes  y, dy [n, c] in rows of `stride`; bias, dbias [c]
//   launch  bias_add: grid (n, ceil(c / 1024)), block 256; bias_grad_add: column_sum.cuh;
//           add: grid ceil(n / 1024), block 256
//   order   dbias: column_sum.cuh
//   floor   8 n c, 4 n c and 12 n bytes
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

namespace tunemesh::cuda {

struct Bias {
  float* y;         // bias_add's
  const float* dy;  // bias_grad_add's
  const float* bias;
  float* dbias;
  size_t n, c, stride;
};
void bias_add(const Bias& args, cudaStream_t stream);
void bias_grad_add(const Bias& args, cudaStream_t stream);

struct AddElements {
  float* y;
  const float* x;
  size_t n;
};
void add(const AddElements& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
