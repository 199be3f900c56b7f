// SwiGLU, Element float or bfloat16 (s bytes).
//   forward   out = silu(gate) up,  silu(g) = g s,  s = 1 / (1 + exp(-g))
//   backward  dup = dout g s,  dgate = dout up s (1 + g (1 - s)),  out again where wanted
//
//   shapes  gate, up, dgate, dup [n, d] in rows of in_stride; out, dout [n, d] in rows of
//           out_stride
//   alias   dgate and dup may be gate and up, out may be dout
//   launch  grid.cuh: a chunk of 16 bytes a thread. Where rows are quantised too, a block of 256
//           (up to 1024 chunks) or 512 has a row, which waits in shared memory, up to 96 KB, until
//           its largest magnitude is known; above, it is read again
//   floor   forward 3 s n d bytes, backward 5 s n d (6 with out); quantised n d, 2 n d more
//   source  Shazeer 2020
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

template <typename Element>
void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream);
template <typename Element>
void swiglu_backward(const TmSwiGluBackward& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
