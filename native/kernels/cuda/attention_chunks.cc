#include "kernels/cuda/attention_chunks.h"

#include <algorithm>

namespace tunemesh::cuda {
namespace {

constexpr size_t kTile = 128;
constexpr size_t kMostHeadGroups = 8;

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }
size_t round_up(size_t a, size_t b) { return divide_up(a, b) * b; }

size_t length_of(const DocumentSpans& documents, size_t d) {
  return static_cast<size_t>(documents.starts[d + 1] - documents.starts[d]);
}

bool is_dense(const DocumentSpans& documents) {
  const size_t length = length_of(documents, 0);
  if (length == 0 || length % kTile != 0) return false;
  for (size_t d = 1; d < documents.num_documents; ++d) {
    if (length_of(documents, d) != length) return false;
  }
  return true;
}

struct Range {
  size_t first, end;
};

AttentionChunk dense_chunk(const DocumentSpans& documents, const AttentionHeads& heads,
                           const Range& range) {
  const size_t count = range.end - range.first;
  const size_t length = length_of(documents, 0);
  return {range.first, count, 0, heads.num_kv_heads, false, count, length, count * length};
}

AttentionChunk ragged_chunk(const DocumentSpans& documents, const AttentionHeads& heads,
                            const Range& range, size_t longest) {
  const size_t tokens =
      static_cast<size_t>(documents.starts[range.end] - documents.starts[range.first]);
  const size_t count = range.end - range.first;
  const size_t batch = round_documents(count), length = round_tokens(longest);
  const size_t total = std::min(batch * length, round_tokens(tokens));
  return {range.first, count, 0, heads.num_kv_heads, true, batch, length, total};
}

// As many documents from `first` on as fit, one at least.
AttentionChunk longest_ragged(const DocumentSpans& documents, const AttentionHeads& heads,
                              size_t first, size_t bytes) {
  size_t longest = length_of(documents, first);
  AttentionChunk best = ragged_chunk(documents, heads, {first, first + 1}, longest);
  for (size_t end = first + 2; end <= documents.num_documents; ++end) {
    longest = std::max(longest, length_of(documents, end - 1));
    const AttentionChunk wider = ragged_chunk(documents, heads, {first, end}, longest);
    if (chunk_bytes(wider, heads) > bytes) break;
    best = wider;
  }
  return best;
}

// A chunk's heads in groups of one size where they divide so: they then share a plan.
size_t heads_that_fit(AttentionChunk chunk, const AttentionHeads& heads, size_t bytes) {
  for (size_t count = heads.num_kv_heads; count > 0; --count) {
    if (heads.num_kv_heads % count != 0) continue;
    chunk.num_kv_heads = count;
    if (chunk_bytes(chunk, heads) <= bytes) return count;
  }
  return 0;
}

bool add_by_heads(std::vector<AttentionChunk>& chunks, AttentionChunk chunk,
                  const AttentionHeads& heads, size_t bytes) {
  const size_t step = heads_that_fit(chunk, heads, bytes);
  if (step == 0) return false;
  for (size_t head = 0; head < heads.num_kv_heads; head += step) {
    chunk.first_kv_head = head;
    chunk.num_kv_heads = step;
    chunks.push_back(chunk);
  }
  return true;
}

// Whether that is possible depends on the bucket alone.
bool add_all_by_heads(std::vector<AttentionChunk>& chunks, const DocumentSpans& documents,
                      const AttentionHeads& heads, size_t bytes) {
  const AttentionChunk all = longest_ragged(documents, heads, 0, SIZE_MAX);
  const size_t step = heads_that_fit(all, heads, bytes);
  if (step * kMostHeadGroups < heads.num_kv_heads) return false;
  return add_by_heads(chunks, all, heads, bytes);
}

// Documents in runs of nearly one size, so that two plans serve.
size_t dense_step(const DocumentSpans& documents, const AttentionHeads& heads, size_t bytes) {
  const size_t one = chunk_bytes(dense_chunk(documents, heads, {0, 1}), heads);
  const size_t count = documents.num_documents;
  const size_t most = std::clamp<size_t>(bytes / one, 1, count);
  return divide_up(count, divide_up(count, most));
}

// Rows of queries' gradients hold those of keys and values and a border of adapters too, at most.
size_t query_sum_bytes(const AttentionChunk& chunk, const AttentionHeads& heads) {
  constexpr size_t kMostBorder = 256;
  const size_t ratio = heads.num_heads / heads.num_kv_heads;
  if (!chunk.ragged) {
    const size_t rows = chunk.batch * chunk.num_kv_heads * ratio * round_up(chunk.length, kTile);
    return rows * heads.head_size * sizeof(float);
  }
  const size_t width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_size + kMostBorder;
  return round_up(chunk.total_tokens, kTile) * width * sizeof(float);
}

}  // namespace

size_t round_documents(size_t count) {
  size_t power = 1;
  while (power < count) power *= 2;
  const size_t between = power / 4 * 3;
  return count <= between ? between : power;
}

size_t round_tokens(size_t count) {
  size_t power = kTile;
  while (power * 2 < count) power *= 2;
  return round_up(std::max(count, kTile), std::max(power / 4, kTile));
}

// The scores' gradients in tiles of 64 x 128, or in free mode float sums of the queries' gradients,
// in rows as wide as theirs where ragged; keys' and values' gradients of each query head before
// they are added up (cuDNN's frontend counts four bytes for each where ragged) and after, in narrow
// rows; two floats for each row.
size_t chunk_bytes(const AttentionChunk& chunk, const AttentionHeads& heads) {
  const size_t ratio = heads.num_heads / heads.num_kv_heads;
  const size_t run_heads = chunk.num_kv_heads * ratio;
  const size_t scores = heads.is_free ? query_sum_bytes(chunk, heads)
                                      : chunk.batch * run_heads * round_up(chunk.length, 64) *
                                            round_up(chunk.length, kTile) * 2;
  const size_t rows = chunk.batch * run_heads * chunk.length;
  size_t partials = 0;
  if (ratio > 1) {
    const size_t each = 2 * heads.head_size * 2;  // both, bf16
    partials = chunk.ragged ? chunk.total_tokens * (run_heads * 2 + chunk.num_kv_heads) * each
                            : rows * each;
  }
  const size_t tables = 10 * (chunk.batch + 1) * sizeof(int32_t) + 11 * 256;
  return scores + partials + rows * 2 * sizeof(float) + tables;
}

size_t least_chunk_bytes(size_t longest_document, const AttentionHeads& heads) {
  const size_t length = round_tokens(longest_document);
  return chunk_bytes({0, 1, 0, 1, true, 1, length, length}, heads);
}

size_t best_chunk_bytes(size_t tokens, size_t longest_document, const AttentionHeads& heads) {
  const size_t longest = std::max<size_t>(1, std::min(tokens, longest_document));
  const size_t batch = round_documents(divide_up(tokens, longest));
  const size_t length = round_tokens(longest);
  const size_t total = std::min(batch * length, round_tokens(tokens));
  return chunk_bytes({0, batch, 0, heads.num_kv_heads, true, batch, length, total}, heads);
}

std::vector<AttentionChunk> forward_chunks(const DocumentSpans& documents,
                                           const AttentionHeads& heads) {
  if (is_dense(documents)) return {dense_chunk(documents, heads, {0, documents.num_documents})};
  return {longest_ragged(documents, heads, 0, SIZE_MAX)};
}

std::vector<AttentionChunk> backward_chunks(const DocumentSpans& documents,
                                            const AttentionHeads& heads, size_t bytes) {
  std::vector<AttentionChunk> chunks;
  const bool dense = is_dense(documents);
  if (!dense && add_all_by_heads(chunks, documents, heads, bytes)) return chunks;
  const size_t step = dense ? dense_step(documents, heads, bytes) : 0;
  for (size_t first = 0; first < documents.num_documents;) {
    const size_t end = std::min(first + step, documents.num_documents);
    const AttentionChunk chunk = dense ? dense_chunk(documents, heads, {first, end})
                                       : longest_ragged(documents, heads, first, bytes);
    if (!add_by_heads(chunks, chunk, heads, bytes)) return {};
    first += chunk.num_documents;
  }
  return chunks;
}

}  // namespace tunemesh::cuda
