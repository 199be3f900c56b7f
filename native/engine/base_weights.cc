#include "engine/base_weights.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>

#include "engine/packed_cache.h"
#include "engine/sha256.h"

namespace tunemesh {
namespace {

constexpr int kLayoutVersion = 1;
constexpr size_t kHeaderBytes = 4096;
constexpr size_t kAlignment = 64;
constexpr char kMagic[] = "tunemesh packed weights\n";

std::string shape_text(const std::vector<size_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// One process at a time builds the cache; released when the process ends, however it ends.
class FileLock {
 public:
  explicit FileLock(const std::string& path)
      : descriptor_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    if (descriptor_ < 0 || ::flock(descriptor_, LOCK_EX) != 0) {
      throw EngineError("ENGINE_FAILED", path + " can't be locked: " + std::strerror(errno) + ".");
    }
  }
  ~FileLock() { ::close(descriptor_); }
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int descriptor_;
};

}  // namespace

void check_weights(const ModelConfig& config, const WeightSource& source) {
  for (const TensorShape& wanted : model_tensors(config)) {
    const std::vector<size_t> found = source.shape(wanted.name);
    if (found != wanted.shape) {
      throw EngineError(source.error_code(), source.description() + ": tensor " + wanted.name +
                                                 " has shape " + shape_text(found) +
                                                 ", the configuration asks for " +
                                                 shape_text(wanted.shape) + ".");
    }
  }
}

BaseWeights::BaseWeights(const Device& device, const Options& options)
    : device_(device), config_(options.config), source_(options.source) {
  Layout layout = lay_out(device, config_);
  parts_ = std::move(layout.parts);
  num_bytes_ = layout.num_bytes;
  if (!options.cache_folder.empty() && device.is_host()) {
    open_cache(options.cache_folder);
    return;
  }
  private_ = std::make_unique<Arena>(device_);
  private_->take_bytes("base weights", num_bytes_);
  private_->allocate();
  char* memory = static_cast<char*>(private_->take_bytes("base weights", num_bytes_));
  private_->seal();
  for (const Part& part : parts_) fill(part, memory + part.offset);
  base_ = memory;
}

BaseWeights::Layout BaseWeights::lay_out(const Device& device, const ModelConfig& config) {
  const bool packs_row_major = device.ops().packs_row_major(device.context());
  Layout layout;
  for (const TensorShape& tensor : model_tensors(config)) {
    const bool is_embedding = tensor.name == "model.embed_tokens.weight";
    layout.add(device, tensor, tensor.shape.size() == 2 && (!is_embedding || packs_row_major));
  }
  if (config.tie_word_embeddings && !packs_row_major) {
    layout.add(device, {"model.embed_tokens.weight", {config.vocab_size, config.hidden_size}},
               true);
  }
  return layout;
}

void BaseWeights::Layout::add(const Device& device, const TensorShape& tensor, bool is_packed) {
  const auto& shape = tensor.shape;
  const size_t bytes =
      is_packed ? device.ops().packed_weight_elements(shape[0], shape[1]) * device.element_bytes()
                : tensor.num_elements() * sizeof(float);
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  parts.push_back({tensor.name, shape, is_packed, num_bytes, rounded});
  num_bytes += rounded;
}

size_t BaseWeights::planned_bytes(const Device& device, const ModelConfig& config) {
  return lay_out(device, config).num_bytes;
}

void BaseWeights::fill(const Part& part, char* out) const {
  size_t num_elements = 1;
  for (const size_t extent : part.shape) num_elements *= extent;
  std::vector<float> rows(num_elements);
  source_.read(part.tensor, 0, num_elements, rows.data());
  if (part.is_packed) {
    TM_RUN(device_, pack_weight, rows.data(), part.shape[0], part.shape[1],
           reinterpret_cast<TmElement*>(out));
  } else {
    TM_RUN(device_, copy_in, out, rows.data(), num_elements * sizeof(float));
  }
}

void BaseWeights::open_cache(const std::string& folder) {
  std::string identity = kMagic + source_.fingerprint() + "layout " +
                         std::to_string(kLayoutVersion) + " " + device_.ops().name;
  for (const Part& part : parts_) {
    identity += "\n" + part.tensor + shape_text(part.shape) + (part.is_packed ? "p" : "r") +
                std::to_string(part.num_bytes);
  }
  const std::string key = sha256_hex(identity);
  std::error_code failure;
  std::filesystem::create_directories(folder, failure);
  const std::string path = folder + "/" + key.substr(0, 32) + ".weights";
  const FileLock lock(folder + "/lock");
  const size_t wanted_bytes = kHeaderBytes + num_bytes();
  const std::string header = kMagic + key + "\n";
  for (int attempt = 0; attempt < 2; ++attempt) {
    if (std::filesystem::exists(path, failure)) {
      MappedFile file(path, "ENGINE_FAILED");
      if (file.size() == wanted_bytes &&
          std::memcmp(file.data(), header.data(), header.size()) == 0) {
        mapped_.emplace(std::move(file));
        base_ = reinterpret_cast<const char*>(mapped_->data() + kHeaderBytes);
        touch_packed_file(path);
        return;
      }
    }
    write_cache(path, header);
    prune_packed_cache(folder, path);
  }
  throw EngineError("ENGINE_FAILED", path + " was written but can't be read back.");
}

void BaseWeights::write_cache(const std::string& path, const std::string& header) const {
  FileWriter file(path);
  std::string first = header;
  first.resize(kHeaderBytes, '\0');
  file.write(first.data(), first.size());
  for (const Part& part : parts_) {
    std::vector<char> values(part.num_bytes);
    fill(part, values.data());
    file.write(values.data(), values.size());
  }
  file.commit();
}

const char* BaseWeights::at(const std::string& tensor, bool is_packed) const {
  for (const Part& part : parts_) {
    if (part.is_packed == is_packed && part.tensor == tensor) return base_ + part.offset;
  }
  throw EngineError("INTERNAL", "no weight named " + tensor + " was laid out.");
}

const float* BaseWeights::rows_at(const std::string& tensor) const {
  return reinterpret_cast<const float*>(at(tensor, false));
}

TmWeight BaseWeights::packed_at(const std::string& tensor, size_t out, size_t in) const {
  return {nullptr, reinterpret_cast<const TmElement*>(at(tensor, true)), out, in};
}

DecoderWeights BaseWeights::view() const {
  DecoderWeights view;
  const char* embedding = "model.embed_tokens.weight";
  if (device_.ops().packs_row_major(device_.context())) {
    view.embedding = packed_at(embedding, config_.vocab_size, config_.hidden_size);
  } else {
    view.embedding = {rows_at(embedding), nullptr, config_.vocab_size, config_.hidden_size};
  }
  view.final_norm.gain = rows_at("model.norm.weight");
  const char* head = config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  view.head.weight = packed_at(head, config_.vocab_size, config_.hidden_size);
  const auto shapes = linear_shapes(config_);
  for (size_t index = 0; index < config_.num_layers; ++index) {
    LayerWeights layer;
    auto rows = [&](const std::string& rest) { return rows_at(layer_name(index, rest)); };
    layer.input_norm.gain = rows("input_layernorm.weight");
    layer.post_norm.gain = rows("post_attention_layernorm.weight");
    if (config_.qk_norm) {
      layer.q_norm.gain = rows("self_attn.q_norm.weight");
      layer.k_norm.gain = rows("self_attn.k_norm.weight");
    }
    for (int which = 0; which < kNumLinears; ++which) {
      const LinearShape& shape = shapes[which];
      LinearWeights& linear = layer.linears[which];
      const std::string name = layer_name(index, shape.path);
      linear.weight = packed_at(name + ".weight", shape.out, shape.in);
      if (config_.qkv_bias && which <= kValue) linear.bias = rows_at(name + ".bias");
    }
    view.layers.push_back(layer);
  }
  return view;
}

}  // namespace tunemesh
