// RMS normalisation; Element float or bfloat16 (s bytes).
//   forward   y[n,c] = (x[n,c] rstd[n]) gain[c],  rstd[n] = 1 / sqrt(mean_c(x[n,c]^2) + epsilon)
//   backward  dx = rstd (dy gain - x k),  k[n] = rstd[n]^2 mean_c(dy gain x)
//             dgain[c] += sum_n dy x rstd
//
//   shapes  x, y, dy, dx [n, c] in rows of their strides; gain, dgain f32 [c]; rstd f32 [n]. For
//           q/k norm a row is one head: n = tokens * heads, c = stride = F, or
//           with `heads` the rows lie in wider ones, row i at i / heads * stride + i % heads * F
//   alias   y may be x; dx may be dy (not where dx_add)
//   launch  rows of up to 128 chunks of 16 bytes (1024 bfloat16): a warp a row, 8 rows a block of
//           256; up to 512 chunks: a block of 128 a row; above: of 256. Where dgain is summed a
//           block has several rows, 264 blocks at most
//   order   sums over c: a chain of fma a thread, its chunks of 16 bytes ascending by the number of
//           threads, then block_reduce.cuh's tree; rstd and k in double, rounded once. dgain: a
//           block's rows ascending (with 8 rows at once, every eighth; the eight ascending), then
//           column_sum.cuh's whole. Rows above 1024 chunks: column_sum.cuh in a pass of its own
//   memory  a row is read once where it has at most 4 chunks a thread (8192 bfloat16), else twice;
//           everything it needs is under way before its sum is waited for
//   floor   forward 2 s n c bytes, backward 3 s n c (4 where dx_add); n c more where quantised
//   source  Zhang & Sennrich 2019, with epsilon inside the root as in the Llama checkpoints
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/column_sum.cuh"

namespace tunemesh::cuda {

template <typename Element>
void rms_norm_forward(const TmRmsNorm& args, cudaStream_t stream);
template <typename Element>
void rms_norm_backward(const TmRmsNormBackward& args, const Scratch& scratch, cudaStream_t stream);

}  // namespace tunemesh::cuda
