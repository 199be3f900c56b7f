// The GGUF reader on a made-up model: de-quantisation, the q/k permutation, and truncated or lying
// files.
#include "engine/gguf.h"

#include <cstring>
#include <filesystem>
#include <fstream>

#include "own_path.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

class Bytes {
 public:
  template <class T>
  Bytes& put(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Bytes& put_text(const std::string& value) {
    put<uint64_t>(value.size());
    text += value;
    return *this;
  }
  std::string text;
};

struct Lie {
  uint32_t version = 3;
  uint64_t num_tensors = 2, num_metadata = 3;
  uint64_t extent = 32;
  uint32_t type = 3;  // Q4_1
  uint64_t second_offset = 160;
  uint32_t heads = 2;
  std::string second_name = "token_embd.weight";
};

constexpr size_t kRows = 8;  // 2 heads of 4 rows

// Row r of q (as stored) has d = 0.5, m = r, and nibbles 1 (low) and 2 (high). The embedding is one
// Q8_0 row.
std::string gguf_file(const Lie& lie) {
  Bytes out;
  out.text = "GGUF";
  out.put(lie.version).put(lie.num_tensors).put(lie.num_metadata);
  out.put_text("general.architecture").put<uint32_t>(8).put_text("llama");
  out.put_text("llama.attention.head_count").put<uint32_t>(4).put<uint32_t>(lie.heads);
  out.put_text("tokens").put<uint32_t>(9).put<uint32_t>(8).put<uint64_t>(2);
  out.put_text("a").put_text("b");
  out.put_text("blk.0.attn_q.weight").put<uint32_t>(2).put<uint64_t>(lie.extent);
  out.put<uint64_t>(kRows).put(lie.type).put<uint64_t>(0);
  out.put_text(lie.second_name).put<uint32_t>(2).put<uint64_t>(32).put<uint64_t>(1);
  out.put<uint32_t>(8).put(lie.second_offset);
  out.text.resize((out.text.size() + 31) / 32 * 32, '\0');
  for (size_t row = 0; row < kRows; ++row) {
    constexpr uint16_t kHalves[] = {0x0000, 0x3c00, 0x4000, 0x4200, 0x4400, 0x4500, 0x4600, 0x4700};
    out.put<uint16_t>(0x3800).put(kHalves[row]);  // 0.5 and row
    out.text += std::string(16, '\x21');
  }
  out.put<uint16_t>(0x3400);  // 0.25
  for (int i = 0; i < 32; ++i) out.put<int8_t>(static_cast<int8_t>(i - 16));
  return out.text;
}

std::string place;

std::string write(const std::string& bytes) {
  std::ofstream(place, std::ios::binary) << bytes;
  return place;
}

void refuse(const Lie& lie, const char* part) {
  CHECK_THROWS(GgufFile{write(gguf_file(lie))}, "GGUF_INVALID", part);
}

void test_values() {
  const GgufFile file(write(gguf_file({})));
  const std::string q = "model.layers.0.self_attn.q_proj.weight";
  CHECK(file.shape(q) == (std::vector<size_t>{kRows, 32}), "shape is [out, in]");
  std::vector<float> values(kRows * 32);
  file.read(q, 0, values.size(), values.data());
  // The converter interleaved each head's halves: rows 0 1 2 3 were stored as 0 2 1 3.
  const float stored_row[] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (size_t row = 0; row < kRows; ++row) {
    CHECK(values[row * 32] == 0.5f + stored_row[row], "low nibble of row " + std::to_string(row));
    CHECK(values[row * 32 + 31] == 1.0f + stored_row[row],
          "high nibble of row " + std::to_string(row));
  }
  std::vector<float> embedding(32);
  file.read("model.embed_tokens.weight", 0, 32, embedding.data());
  CHECK(embedding[0] == -4.0f && embedding[31] == 3.75f, "Q8_0 values");
  CHECK_THROWS(file.read(q, 1, 32, values.data()), "GGUF_INVALID", "whole rows");
  CHECK_THROWS(file.shape("lm_head.weight"), "GGUF_INVALID", "lm_head.weight");
}

void test_lies() {
  Lie lie;
  lie.version = 9;
  refuse(lie, "version 9");
  lie = {};
  lie.num_tensors = uint64_t{1} << 40;
  refuse(lie, "the limits are");
  lie = {};
  lie.extent = 33;
  refuse(lie, "not a multiple of 32");
  lie = {};
  lie.extent = uint64_t{1} << 62;
  refuse(lie, "impossible extent");
  lie = {};
  lie.type = 14;
  refuse(lie, "ggml type 14");
  lie = {};
  lie.second_offset = 128;
  refuse(lie, "overlaps");
  lie = {};
  lie.second_offset = ~uint64_t{0} - 8;
  refuse(lie, "truncated or damaged");
  lie = {};
  lie.heads = 3;
  refuse(lie, "do not divide");
  lie = {};
  lie.second_name = "blk.0.attn_q.weight";
  refuse(lie, "stands twice");
  lie = {};
  lie.second_name = "blk.0.unheard_of.weight";
  refuse(lie, "has no place");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  place = own_path("model.gguf");
  test_values();
  test_lies();
  const std::string whole = gguf_file({});
  for (size_t size = 1; size < whole.size(); ++size) {
    const std::string cut = whole.substr(0, size);
    CHECK_THROWS(tunemesh::GgufFile{write(cut)}, "GGUF_INVALID", place);
  }
  std::filesystem::remove(place);
  return finish("gguf_test");
}
