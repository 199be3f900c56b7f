// SwiGLU.
//   forward   out = silu(gate) up,  silu(g) = g s,  s = 1 / (1 + exp(-g))
//   backward  dup = dout g s,  dgate = dout up s (1 + g (1 - s)),  out again where wanted
//
//   shapes  gate, up, dgate, dup [n, d] in rows of in_stride; out, dout [n, d] in rows of
//   out_stride alias   dgate and dup may be gate and up launch  grid (n, ceil(d / 1024)), block 256
//   floor   forward 12 n d bytes, backward 20 n d (24 with out)
//   source  Shazeer 2020
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream);
void swiglu_backward(const TmSwiGluBackward& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
