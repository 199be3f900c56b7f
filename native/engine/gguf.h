// GGUF files (version 2 and 3) as a weight source: de-quantised to float32,
// under Hugging Face names.
//
// Block formats, 32 elements a block, d and m are float16:
//   Q4_0  d, 16 bytes: (nibble - 8) * d      Q4_1  d, m, 16 bytes: nibble * d +
//   m      Q8_0  d, 32 int8: value * d element i < 16 is the low nibble of byte
//   i, element i + 16 its high nibble.
// The converter stores llama's q and k rows permuted ([heads, 2, F/2] ->
// [heads, F/2, 2]); reading undoes that. source  the GGUF specification
// (ggml-org/ggml docs/gguf.md) and ggml's block formats
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/mapped_file.h"
#include "engine/weight_source.h"

namespace tunemesh {

class GgufFile : public WeightSource {
 public:
  explicit GgufFile(const std::string& path);

  bool has(const std::string& name) const override { return tensors_.count(name) != 0; }
  std::vector<std::string> names() const override;
  std::vector<size_t> shape(const std::string& name) const override;
  void read(const std::string& name, size_t first, size_t count, float* out) const override;
  std::string fingerprint() const override { return file_fingerprint(file_.path()); }
  std::string description() const override { return file_.path(); }
  std::string error_code() const override { return "GGUF_INVALID"; }

 private:
  struct Tensor {
    std::string file_name;  // "blk.0.attn_q.weight"
    uint32_t type;
    std::vector<size_t> shape;  // outermost first, as Hugging Face has it
    size_t offset;              // in the file, once the header has been read
    size_t row_elements, num_rows, row_bytes;
    size_t permuted_heads;  // 0: rows stand in order
  };
  struct Cursor;

  void read_metadata(Cursor& cursor, uint64_t count);
  void read_tensor_infos(Cursor& cursor, uint64_t count);
  Tensor read_tensor_info(Cursor& cursor);
  void place_tensors(size_t data_start);
  void read_row(const Tensor& tensor, size_t row, float* out) const;
  const Tensor& tensor(const std::string& name) const;
  uint64_t metadata_count(const std::string& key, uint64_t fallback) const;
  [[noreturn]] void fail(const std::string& what) const;

  MappedFile file_;
  std::string architecture_;
  std::map<std::string, uint64_t> numbers_;  // whole-number metadata
  std::map<std::string, Tensor> tensors_;    // by Hugging Face name
};

std::unique_ptr<WeightSource> open_gguf(const std::string& path);

}  // namespace tunemesh
