// Safetensors files: 8 bytes of header size, a JSON header, the tensors' bytes
// without gap or overlap.
#pragma once
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/mapped_file.h"
#include "engine/weight_source.h"

namespace tunemesh {

constexpr size_t kMaxSafetensorsHeaderBytes = 100'000'000;

class SafetensorsFile {
 public:
  struct Tensor {
    std::string dtype;
    std::vector<size_t> shape;
    size_t num_elements;
    size_t offset;  // in the file
    size_t num_bytes;
  };

  // Checks the whole header against the file; throws `code`
  // (SAFETENSORS_INVALID or ADAPTER_INVALID).
  explicit SafetensorsFile(const std::string& path,
                           const std::string& code = "SAFETENSORS_INVALID");

  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return file_.path(); }
  const Tensor& tensor(const std::string& name) const;
  // Elements [first, first + count) of an F32, F16 or BF16 tensor.
  void read(const std::string& name, size_t first, size_t count, float* out) const;
  void read_bytes(const std::string& name, std::vector<uint8_t>& out) const;  // all of a U8 tensor
  // Throws the file's error code with its path in front.
  [[noreturn]] void fail(const std::string& what) const;

 private:
  void parse_header();
  void add_tensor(const std::string& name, const class Json& entry, size_t data_start);
  void check_layout(size_t data_start) const;

  MappedFile file_;
  std::string code_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

struct SafetensorsEntry {
  std::string name;
  std::vector<size_t> shape;
  // Writes the tensor's bytes through the sink, in order.
  std::function<void(const std::function<void(const void*, size_t)>& sink)> write;
  std::string dtype = "F32";  // or BF16, U8
};

struct SafetensorsContent {
  std::vector<SafetensorsEntry> entries;
  std::vector<std::pair<std::string, std::string>> metadata;
};

// Writes beside `path` and renames into place after fsync.
void write_safetensors(const std::string& path, const SafetensorsContent& content);

std::unique_ptr<WeightSource> open_safetensors_folder(const std::string& folder);

}  // namespace tunemesh
