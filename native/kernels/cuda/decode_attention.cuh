// Attention of the newest token over rows [first, end) of a key/value cache; Element float or
// bfloat16 (s bytes).
//   out = softmax(scale q k^T) v
//
//   shapes  q, out [H*F]; k, v [end, G*F] in rows of their strides; scores f32 [H, score_stride]
//   launch  grid H, block 256: a warp a key for the scores; for the values 256 / F' threads share a
//           column (F' = F rounded up to a power of two), each a part of the keys
//   order   scores: 32 lanes by block_reduce.cuh's tree; sum of exp: a chain a thread, then the
//           tree; values: keys ascending by the number of parts, then parts ascending
//   floor   2 s (end - first) F bytes a key/value head
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

template <typename Element>
void decode_attention(const TmDecodeAttention& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
