// AdamW, to the bit as backend.h writes it and the CPU computes it.
//
//   order   every operation is one IEEE 754 float32 operation rounded to nearest even (__fadd_rn,
//           __fmul_rn, __fdiv_rn, __fsqrt_rn); nothing is fused, subnormal numbers are kept
//   scalars products and quotients of scalars are made once, on the host
//   launch  grid ceil(n / 1024), block 256
//   floor   28 bytes an element
//   source  Loshchilov & Hutter 2019, in the order of PyTorch's single-tensor AdamW
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void adamw(const TmAdamW& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
