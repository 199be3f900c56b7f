// Causal attention within documents; Element float or bfloat16, all arithmetic float32.
//   forward   s = scale q k^T, p = softmax(s), out = p v, lse = log sum exp(s)
//   backward  p = exp(s - lse), ds = scale p (dout v^T - delta), delta[i] = dout[i] out[i]
//             dq = ds k, dk = ds^T q, dv = p^T dout
//
//   shapes  q, out, dout, dq [n, H*F], k, v, dk, dv [n, G*F], lse [n, H]; query head h reads
//           key/value head h / (H/G); document_starts [num_documents + 1] on the device
//   tiles   attention_tile.cuh: square tiles of the packed stream, whatever documents they hold; a
//           row's first key is its document's start or its window's. Tiles that no row sees are
//           skipped: both bounds only grow along the stream
//   launch  forward and dq: grid (tiles, H); dk and dv: grid (tiles, G), each block going through
//           the group's heads and, within one, the query tiles, ascending. Block 256
//   needs   F <= 256; shared memory up to 90 KB, which every card from sm_80 on has. No scratch
//   faults  documents that do not cover [0, n) or run backwards are recorded by forward
//   order   every element has one owner that adds tiles ascending; no atomics. Softmax is online:
//           its rescaling follows the tiles, so that bits depend on a document's place in the pack
//   floor   2 F n^2 fma a head forward, 7 F n^2 backward (5 are needed; s and dout v^T are made
//           twice), both halved by the mask
//   source  Vaswani et al. 2017; Dao et al. 2022 for the online softmax and recomputation from lse
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/fault.cuh"

namespace tunemesh::cuda {

constexpr size_t kLargestHead = 256;

template <typename Element>
void attention_forward(const TmAttention& args, DeviceFault* fault, cudaStream_t stream);
template <typename Element>
void attention_backward(const TmAttentionBackward& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
