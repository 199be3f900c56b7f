// AdamW of all trained tensors in one launch, to the bit as backend.h writes it and the CPU
// computes it, with the weight's copy for the products (packed rows and borders of linear groups
// included).
//
//   shapes  a table of tensors in device memory; each is whole canonical blocks of 256 elements but
//           for its last one
//   launch  a warp a canonical block, 8 a thread block, four times in a row; a warp finds its
//           tensor by binary search in the table, once for blocks of one tensor
//   order   every operation is one IEEE 754 float32 operation rounded to nearest even (__fadd_rn,
//           __fmul_rn, __fdiv_rn, __fsqrt_rn); nothing is fused, subnormal numbers are kept. Half
//           tensors are rounded by stochastic_rounding.h: a lane's 8 elements are one Philox block.
//           Where all 8 have usual magnitudes root and quotients are computed without the branches
//           of __fdiv_rn and __fsqrt_rn, by the same steps; else one by one with them.
//           Moments of bytes (byte_moments.h) take their exponent from all of the warp
//   scalars products and quotients of scalars are made once, on the host
//   needs   any alignment and any width; 16 bytes a lane where addresses allow
//   floor   28 bytes an element of floats, and s for its copy; 14 of half ones with half gradients,
//           10 with moments of bytes
//   source  Loshchilov & Hutter 2019, in the order of PyTorch's single-tensor AdamW
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

template <typename Element>
void adamw(const TmAdamW& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
