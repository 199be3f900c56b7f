#include "engine/base_weights.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "engine/packed_cache.h"
#include "engine/sha256.h"

namespace tunemesh {
namespace {

constexpr int kLayoutVersion = 1;  // of what parts and their sizes do not tell
constexpr size_t kHeaderBytes = 4096;
constexpr size_t kAlignment = 64;
constexpr size_t kHostPieceElements = size_t{8} << 20;
constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr char kMagic[] = "tunemesh packed weights\n";

std::string shape_text(const std::vector<size_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

bool is_in_group(const std::string& tensor) { return tensor.find("_proj.") != std::string::npos; }

std::string group_name(size_t layer, int group) {
  constexpr std::array<const char*, kNumGroups> kNames = {"qkv", "output", "gate_up", "down"};
  return "layers." + std::to_string(layer) + "." + kNames[group];
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
    : device_(device),
      config_(options.config),
      source_(options.source),
      reader_(options.source),
      groups_(options.groups) {
  Layout layout = lay_out(device, config_, {groups_, options.embedding_on_host});
  parts_ = std::move(layout.parts);
  num_bytes_ = layout.num_bytes;
  host_bytes_ = layout.host_bytes;
  if (!options.cache_folder.empty() && device.is_host()) {
    open_cache(options.cache_folder, options.cache_limits);
    return;
  }
  fill_private();
}

void BaseWeights::fill_private() {
  const auto reserved = [](Arena& arena, size_t bytes) {
    arena.take_bytes("base weights", bytes);
    arena.allocate();
    char* const memory = static_cast<char*>(arena.take_bytes("base weights", bytes));
    arena.seal();
    return memory;
  };
  private_ = std::make_unique<Arena>(device_);
  char* const memory = reserved(*private_, num_bytes_);
  char* host = nullptr;
  if (host_bytes_ > 0) {
    on_host_ = std::make_unique<Arena>(device_, Arena::Place::kHost);
    host = reserved(*on_host_, host_bytes_);
  }
  for (const Part& part : parts_) {
    if (part.is_on_host) {
      fill_on_host(part, host + part.offset);
    } else {
      fill(part, memory + part.offset);
    }
  }
  base_ = memory;
  host_base_ = host;
}

// Row by row the same elements as on the device, which packs them.
void BaseWeights::fill_on_host(const Part& part, char* out) const {
  const size_t width = part.shape[1];
  const size_t step = std::max<size_t>(1, kHostPieceElements / width);
  Arena piece(device_);
  const auto take = [&] { return piece.take_elements("piece", step * width); };
  take();
  piece.allocate();
  TmElement* const packed = take();
  std::vector<float> rows(step * width);
  for (size_t row = 0; row < part.shape[0]; row += step) {
    const size_t count = std::min(step, part.shape[0] - row);
    source_.read(part.tensor, row * width, count * width, rows.data());
    TM_RUN(device_, pack_weight, rows.data(), count, width, packed);
    TM_RUN(device_, copy_out, out + row * width * device_.element_bytes(), packed,
           count * width * device_.element_bytes());
  }
}

BaseWeights::Layout BaseWeights::lay_out(const Device& device, const ModelConfig& config,
                                         const Choice& choice) {
  const GroupPlan& groups = choice.groups;
  const bool packs_row_major = device.ops().packs_row_major(device.context());
  Layout layout;
  for (const TensorShape& tensor : model_tensors(config)) {
    if (groups.is_used && is_in_group(tensor.name)) continue;
    const bool is_embedding = tensor.name == kEmbedding;
    if (is_embedding && choice.embedding_on_host) {
      const size_t count = device.ops().packed_weight_elements(tensor.shape[0], tensor.shape[1]);
      layout.append({tensor.name, tensor.shape, true, 0, 0, 0, kNumGroups, true},
                    count * device.element_bytes());
      continue;
    }
    layout.add(device, tensor, tensor.shape.size() == 2 && (!is_embedding || packs_row_major));
  }
  if (config.tie_word_embeddings && !packs_row_major) {
    layout.add(device, {"model.embed_tokens.weight", {config.vocab_size, config.hidden_size}},
               true);
  }
  for (size_t layer = 0; groups.is_used && layer < config.num_layers; ++layer) {
    for (int group = 0; group < kNumGroups; ++group) {
      const size_t count = packed_group_elements(device, groups, static_cast<Group>(group));
      layout.append({group_name(layer, group), {}, true, 0, 0, layer, group},
                    count * device.element_bytes());
    }
  }
  return layout;
}

void BaseWeights::Layout::add(const Device& device, const TensorShape& tensor, bool is_packed) {
  const auto& shape = tensor.shape;
  const size_t bytes =
      is_packed ? device.ops().packed_weight_elements(shape[0], shape[1]) * device.element_bytes()
                : tensor.num_elements() * sizeof(float);
  append({tensor.name, shape, is_packed, 0, 0}, bytes);
}

void BaseWeights::Layout::append(Part part, size_t bytes) {
  size_t& end = part.is_on_host ? host_bytes : num_bytes;
  part.offset = end;
  part.num_bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  end += part.num_bytes;
  parts.push_back(std::move(part));
}

BaseWeights::Bytes BaseWeights::planned(const Device& device, const ModelConfig& config,
                                        const Choice& choice) {
  const Layout layout = lay_out(device, config, choice);
  return {layout.num_bytes, layout.host_bytes};
}

// The border stays zero: the adapters' values come with refresh_groups(). One part after the other,
// so that little of the model is in the host's memory at once; all together where columns are
// scaled over all of them (fp8).
void BaseWeights::fill_group(const Part& part, TmElement* packed) {
  const auto shapes = linear_shapes(config_);
  const TmGroupShape& shape = groups_.shapes[part.group];
  std::array<std::vector<float>, TM_GROUP_PARTS> biases;
  TmGroupPack call = {};
  call.shape = &shape;
  call.packed = packed;
  for (size_t i = 0; i < shape.num_parts; ++i) {
    const LinearShape& linear = shapes[kGroupMembers[part.group].first + i];
    const std::string name = layer_name(part.layer, linear.path);
    const size_t place = shape.is_fp8 ? i : 0;
    call.weight[i] = reader_.read(name + ".weight", {linear.out, linear.in}, place).data();
    if (shape.has_bias) {
      biases[i].resize(linear.out);
      source_.read(name + ".bias", 0, linear.out, biases[i].data());
      call.bias[i] = biases[i].data();
    }
    if (shape.is_fp8 && i + 1 < shape.num_parts) continue;
    TM_RUN(device_, pack_group_base, &call);
    call.weight[i] = call.bias[i] = nullptr;
  }
}

void BaseWeights::fill(const Part& part, char* out) {
  if (part.group != kNumGroups) return fill_group(part, reinterpret_cast<TmElement*>(out));
  const std::span<const float> rows = reader_.read(part.tensor, part.shape);
  if (part.is_packed) {
    TM_RUN(device_, pack_weight, rows.data(), part.shape[0], part.shape[1],
           reinterpret_cast<TmElement*>(out));
  } else {
    TM_RUN(device_, copy_in, out, rows.data(), rows.size_bytes());
  }
}

void BaseWeights::open_cache(const std::string& folder, const PackedCacheLimits& limits) {
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
        prune_packed_cache(folder, path, limits);
        return;
      }
    }
    write_cache(path, header);
  }
  throw EngineError("ENGINE_FAILED", path + " was written but can't be read back.");
}

void BaseWeights::write_cache(const std::string& path, const std::string& header) {
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
    if (part.is_packed != is_packed || part.tensor != tensor) continue;
    return (part.is_on_host ? host_base_ : base_) + part.offset;
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
  const char* embedding = kEmbedding;
  if (device_.ops().packs_row_major(device_.context())) {
    view.embedding = packed_at(embedding, config_.vocab_size, config_.hidden_size);
  } else {
    view.embedding = {rows_at(embedding), nullptr, config_.vocab_size, config_.hidden_size};
  }
  view.final_norm.gain = rows_at("model.norm.weight");
  const char* head = config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  view.head.weight = packed_at(head, config_.vocab_size, config_.hidden_size);
  view.groups = groups_;
  for (size_t index = 0; index < config_.num_layers; ++index) {
    LayerWeights layer;
    view_layer(index, layer);
    view.layers.push_back(layer);
  }
  return view;
}

void BaseWeights::view_layer(size_t index, LayerWeights& layer) const {
  const auto shapes = linear_shapes(config_);
  auto rows = [&](const std::string& rest) { return rows_at(layer_name(index, rest)); };
  layer.input_norm.gain = rows("input_layernorm.weight");
  layer.post_norm.gain = rows("post_attention_layernorm.weight");
  if (config_.qk_norm) {
    layer.q_norm.gain = rows("self_attn.q_norm.weight");
    layer.k_norm.gain = rows("self_attn.k_norm.weight");
  }
  for (int group = 0; groups_.is_used && group < kNumGroups; ++group) {
    const char* packed = at(group_name(index, group), true);
    layer.groups[group] = reinterpret_cast<TmElement*>(const_cast<char*>(packed));
  }
  for (int which = 0; which < kNumLinears; ++which) {
    const LinearShape& shape = shapes[which];
    LinearWeights& linear = layer.linears[which];
    if (groups_.is_used) {
      linear.weight = {nullptr, nullptr, shape.out, shape.in};
      continue;
    }
    const std::string name = layer_name(index, shape.path);
    linear.weight = packed_at(name + ".weight", shape.out, shape.in);
    if (config_.qkv_bias && which <= kValue) linear.bias = rows_at(name + ".bias");
  }
}

}  // namespace tunemesh
