// Where a model's tensors come from: a safetensors folder, a GGUF file, or
// memory in tests. Names are Hugging Face's; values come out as float32,
// row-major.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace tunemesh {

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool has(const std::string& name) const = 0;
  virtual std::vector<std::string> names() const = 0;
  // Both throw the source's error code where the tensor is missing.
  virtual std::vector<size_t> shape(const std::string& name) const = 0;
  // Reads `count` elements from the one numbered `first`. Quantised kinds need
  // whole rows.
  virtual void read(const std::string& name, size_t first, size_t count, float* out) const = 0;
  // Changes when the files change; keys the cache of packed weights.
  virtual std::string fingerprint() const = 0;
  virtual std::string description() const = 0;
  virtual std::string error_code() const = 0;
};

// A Hugging Face folder (model.safetensors, or an index of shards) or a .gguf
// file.
std::unique_ptr<WeightSource> open_weights(const std::string& path);

// "path|size|modification time" of a file.
std::string file_fingerprint(const std::string& path);

}  // namespace tunemesh
