// How cuDNN's attention is cut into runs (kernels/cuda/attention_chunks.h), with random packs: each
// document and head once, within the bytes, and few shapes. Needs no CUDA.
#include "kernels/cuda/attention_chunks.h"

#include <random>

#include "test_check.h"

namespace tunemesh {
namespace {

using namespace test;
using namespace cuda;

struct Pack {
  std::vector<int32_t> starts = {0};
  AttentionHeads heads;

  size_t num_documents() const { return starts.size() - 1; }
  DocumentSpans spans() const { return {starts.data(), num_documents()}; }
  size_t length(size_t d) const { return static_cast<size_t>(starts[d + 1] - starts[d]); }
  size_t longest() const {
    size_t most = 0;
    for (size_t d = 0; d < num_documents(); ++d) most = std::max(most, length(d));
    return most;
  }
};

Pack random_pack(std::mt19937& random) {
  Pack pack;
  const size_t groups = 1 + random() % 8;
  pack.heads = {groups * (1 + random() % 4), groups, random() % 2 == 0 ? 64u : 128u};
  pack.heads.is_free = random() % 2 == 0;
  const bool equal = random() % 3 == 0;
  const int32_t all = 128 * static_cast<int32_t>(1 + random() % 8);
  for (size_t count = 1 + random() % 30; count > 0; --count) {
    const int32_t one = static_cast<int32_t>(random() % 1500);
    pack.starts.push_back(pack.starts.back() + (equal ? all : one));
  }
  return pack;
}

// Empty, or what is wrong.
std::string fault_of(const Pack& pack, const std::vector<AttentionChunk>& chunks, size_t bytes) {
  const size_t groups = pack.heads.num_kv_heads;
  std::vector<int> times(pack.num_documents() * groups);
  for (const AttentionChunk& chunk : chunks) {
    if (bytes != 0 && chunk_bytes(chunk, pack.heads) > bytes) return "too many bytes";
    if (chunk.batch < chunk.num_documents) return "more documents than the plan has";
    size_t tokens = 0;
    for (size_t d = chunk.first_document; d < chunk.first_document + chunk.num_documents; ++d) {
      tokens += pack.length(d);
      if (pack.length(d) > chunk.length) return "a document longer than the plan's";
      if (!chunk.ragged && pack.length(d) != chunk.length) return "a gap in a dense chunk";
      for (size_t g = 0; g < chunk.num_kv_heads; ++g) ++times[d * groups + chunk.first_kv_head + g];
    }
    if (tokens > chunk.total_tokens) return "more tokens than the plan has";
  }
  for (const int once : times) {
    if (once != 1) return "a document's head " + std::to_string(once) + " times";
  }
  return "";
}

void check_random_packs() {
  std::mt19937 random(20261124);
  for (int i = 0; i < 3000; ++i) {
    const Pack pack = random_pack(random);
    const size_t least = least_chunk_bytes(pack.longest(), pack.heads);
    const size_t bytes = least + (random() % 2 == 0 ? 0 : random() % (least * 4));
    const std::string name = "pack " + std::to_string(i) + ": ";
    const auto backward = backward_chunks(pack.spans(), pack.heads, bytes);
    const std::string fault = fault_of(pack, backward, bytes);
    CHECK(fault.empty(), name + fault);
    const std::string ahead = fault_of(pack, forward_chunks(pack.spans(), pack.heads), 0);
    CHECK(ahead.empty(), name + "forward: " + ahead);
  }
}

void check_rounding() {
  CHECK(round_documents(1) == 1 && round_documents(3) == 3, "one and three documents stay");
  CHECK(round_documents(5) == 6 && round_documents(7) == 8, "five become six, seven eight");
  CHECK(round_documents(13) == 16 && round_documents(12) == 12, "twelve stay, thirteen do not");
  CHECK(round_tokens(1) == 128 && round_tokens(128) == 128, "128 tokens at least");
  CHECK(round_tokens(1025) == 1280 && round_tokens(2600) == 3072, "quarters of a power of two");
  CHECK(round_tokens(2048) == 2048 && round_tokens(2049) == 2560, "powers of two stay");
}

// Unequal documents whose scores do not fit at once: a recording holds the calls of all packs of
// one bucket.
void check_bucket() {
  const AttentionHeads heads = {32, 8, 64};
  const Pack first = {{0, 900, 2000, 4000, 5500, 7000}, heads};
  const Pack second = {{0, 1700, 1800, 3800, 5500, 6900, 7100}, heads};
  const size_t bytes = best_chunk_bytes(8192, 2048, heads) / 3;
  const auto chunks = backward_chunks(first.spans(), heads, bytes);
  CHECK(chunks.size() == 8 && fault_of(first, chunks, bytes).empty(), "one for each group");
  const auto others = backward_chunks(second.spans(), heads, bytes);
  CHECK(others.size() == chunks.size(), "as many for another pack of the bucket");
  for (size_t i = 0; i < std::min(chunks.size(), others.size()); ++i) {
    CHECK(chunks[i].num_documents == 5 && others[i].num_documents == 6, "all documents");
    CHECK(chunks[i].batch == others[i].batch && chunks[i].length == others[i].length &&
              chunks[i].total_tokens == others[i].total_tokens &&
              chunks[i].first_kv_head == others[i].first_kv_head &&
              chunks[i].num_kv_heads == others[i].num_kv_heads,
          "the same plan");
  }
}

// Free mode keeps no scores: its bytes grow with the tokens, whatever the documents' length.
void check_free() {
  const AttentionHeads fixed = {32, 8, 64}, free = {32, 8, 64, true};
  CHECK(best_chunk_bytes(16384, 2048, fixed) > size_t{2} << 30, "scores of 8 x 2048");
  CHECK(best_chunk_bytes(16384, 2048, free) < size_t{512} << 20, "none in free mode");
  CHECK(best_chunk_bytes(16384, 16384, free) <= best_chunk_bytes(16384, 2048, free),
        "one long document takes no more than eight");
}

void check_too_long() {
  const Pack pack = {{0, 4096}, {32, 8, 128}};
  const size_t least = least_chunk_bytes(4096, pack.heads);
  CHECK(!backward_chunks(pack.spans(), pack.heads, least).empty(), "the least serves");
  CHECK(backward_chunks(pack.spans(), pack.heads, least / 4).empty(), "a quarter of it does not");
}

}  // namespace
}  // namespace tunemesh

int main() {
  tunemesh::check_rounding();
  tunemesh::check_random_packs();
  tunemesh::check_bucket();
  tunemesh::check_free();
  tunemesh::check_too_long();
  return tunemesh::test::finish("attention_chunks_test");
}
