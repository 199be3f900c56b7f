// How cuDNN's attention is cut into runs, on the host: no CUDA here.
//
// cuDNN's deterministic backward keeps the scores' gradients in memory (before 9.25, on Hopper):
// documents x heads x longest^2 x 2 bytes. In free mode it keeps float sums of the queries'
// gradients instead, which grow with the tokens alone. So a call is cut into chunks that run one
// after another:
//
//   equal documents    neighbours, as many as fit
//   unequal documents  all in up to 8 groups of heads, so that the chunks are those of the bucket
//   and
//                      not of the pack, and can be recorded; else neighbours, and a document that
//                      is too long alone in groups of heads
//
// A plan is built for each shape: numbers are rounded up so that shapes are few.
//
//   dense   all documents of the call have one length, a multiple of 128: exact
//   ragged  else: documents to 1, 2, 3, 4, 6, 8, 12, 16 ...; the longest and the tokens to quarters
//           of a power of two, 128 at least
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace tunemesh::cuda {

struct AttentionHeads {
  size_t num_heads, num_kv_heads, head_size;
  bool is_free = false;
};

struct AttentionChunk {
  size_t first_document, num_documents;
  size_t first_kv_head, num_kv_heads;
  bool ragged;
  size_t batch, length, total_tokens;  // the plan's
};

struct DocumentSpans {
  const int32_t* starts;  // [num_documents + 1]
  size_t num_documents;
};

size_t round_documents(size_t count);
size_t round_tokens(size_t count);

// Bytes of the backward's workspace for a chunk, but for what cuDNN takes besides (kChunkSlack).
size_t chunk_bytes(const AttentionChunk& chunk, const AttentionHeads& heads);
inline constexpr size_t kChunkSlack = size_t{8} << 20;

// The smallest `bytes` with which backward_chunks() serves any pack of such a job, and the bytes
// with which a full pack of its longest documents is one chunk.
size_t least_chunk_bytes(size_t longest_document, const AttentionHeads& heads);
size_t best_chunk_bytes(size_t tokens, size_t longest_document, const AttentionHeads& heads);

std::vector<AttentionChunk> forward_chunks(const DocumentSpans& documents,
                                           const AttentionHeads& heads);
// Empty where a document does not fit even with one key/value head.
std::vector<AttentionChunk> backward_chunks(const DocumentSpans& documents,
                                            const AttentionHeads& heads, size_t bytes);

}  // namespace tunemesh::cuda
