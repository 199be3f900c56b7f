// A product with few columns, as the tails of a group's rows are (linear_group.h), of bf16
// elements:
//   c[n, m] = alpha x[n, k] op(w)     op(w) = w^T, w [m, k], or w, w [k, m]
//
//   shapes  all row-major in rows of their strides; m up to 64, a multiple of 8
//   launch  a block of 4 warps for 64 tokens; 4 stages of 64 columns of x through shared memory
//           (74 KB); mma.m16n8k16
//   needs   k and strides multiples of 8 elements, pointers of 16 bytes: skinny_product_fits()
//   order   k ascending in steps of 16 (the tensor cores' own order within a step), then alpha; one
//           rounding
//   floor   2 n (k + m) bytes: x once; w comes from the second-level cache
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

struct SkinnyProduct {
  const Bfloat16* x;
  const Bfloat16* w;
  Bfloat16* c;
  size_t x_stride, w_stride, c_stride;
  size_t n, m, k;
  bool transposes_w;  // w is [m, k]
  float alpha;
};

// False where a product has not the form that the kernel needs, or too few tokens for it.
bool skinny_product_fits(const SkinnyProduct& args);
void skinny_product(const SkinnyProduct& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
