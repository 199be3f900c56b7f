#include "engine/gguf.h"

#include <algorithm>
#include <cstring>

#include "engine/error.h"
#include "engine/half_floats.h"

namespace tunemesh {
namespace {

constexpr uint64_t kMaxMetadataEntries = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 16;
constexpr uint64_t kMaxStringBytes = 64 << 20;  // chat templates and tokens are far below
constexpr uint64_t kMaxArrayElements = 1 << 26;
constexpr int kMaxArrayDepth = 2;

struct TensorType {
  uint32_t id;
  const char* name;
  size_t block_elements, block_bytes;
};
constexpr TensorType kTypes[] = {{0, "F32", 1, 4},    {1, "F16", 1, 2},    {2, "Q4_0", 32, 18},
                                 {3, "Q4_1", 32, 20}, {8, "Q8_0", 32, 34}, {30, "BF16", 1, 2}};

const TensorType* type_of(uint32_t id) {
  for (const TensorType& type : kTypes) {
    if (type.id == id) return &type;
  }
  return nullptr;
}

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; empty
// where it maps to nothing.
std::string hugging_face_name(const std::string& name) {
  static const std::map<std::string, std::string> kTop = {
      {"token_embd.weight", "model.embed_tokens.weight"},
      {"output_norm.weight", "model.norm.weight"},
      {"output.weight", "lm_head.weight"}};
  static const std::map<std::string, std::string> kLayer = {
      {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
      {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
      {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
      {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
      {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"}};
  if (const auto top = kTop.find(name); top != kTop.end()) return top->second;
  if (!name.starts_with("blk.")) return "";
  const size_t digits_end = name.find('.', 4);
  const size_t suffix = name.rfind('.');
  if (digits_end == std::string::npos || suffix <= digits_end) return "";
  const std::string layer = name.substr(4, digits_end - 4);
  if (layer.empty() || layer.size() > 6 ||
      layer.find_first_not_of("0123456789") != std::string::npos)
    return "";
  const auto part = kLayer.find(name.substr(digits_end + 1, suffix - digits_end - 1));
  if (part == kLayer.end()) return "";
  return "model.layers." + layer + "." + part->second + name.substr(suffix);
}

uint16_t load_half(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return bits;
}

void dequantise_block(uint32_t type, const uint8_t* block, float* out) {
  const float scale = float_from_float16(load_half(block));
  if (type == 8) {
    for (int i = 0; i < 32; ++i)
      out[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * scale;
    return;
  }
  const bool has_minimum = type == 3;
  const float minimum = has_minimum ? float_from_float16(load_half(block + 2)) : 0.0f;
  const uint8_t* nibbles = block + (has_minimum ? 4 : 2);
  for (int i = 0; i < 16; ++i) {
    const int low = nibbles[i] & 0x0F;
    const int high = nibbles[i] >> 4;
    out[i] = has_minimum ? static_cast<float>(low) * scale + minimum
                         : static_cast<float>(low - 8) * scale;
    out[i + 16] = has_minimum ? static_cast<float>(high) * scale + minimum
                              : static_cast<float>(high - 8) * scale;
  }
}

}  // namespace

// Reads forward through the file, never beyond its end.
struct GgufFile::Cursor {
  const GgufFile& gguf;
  size_t at = 0;

  const uint8_t* take(uint64_t bytes, const char* what) {
    const size_t left = gguf.file_.size() - at;
    if (bytes > left) {
      gguf.fail("ends inside " + std::string(what) + ": " + std::to_string(bytes) +
                " bytes wanted at byte " + std::to_string(at) + ", " + std::to_string(left) +
                " left. The file is truncated.");
    }
    const uint8_t* found = gguf.file_.data() + at;
    at += bytes;
    return found;
  }
  template <class T>
  T number(const char* what) {
    T value;
    std::memcpy(&value, take(sizeof(T), what), sizeof(T));
    return value;
  }
  std::string text(const char* what) {
    const uint64_t size = number<uint64_t>(what);
    if (size > kMaxStringBytes) {
      gguf.fail(std::string(what) + " of " + std::to_string(size) + " bytes; the limit is " +
                std::to_string(kMaxStringBytes) + ".");
    }
    return std::string(reinterpret_cast<const char*>(take(size, what)), size);
  }
  // Skips a value of this metadata type; whole numbers are returned through
  // `whole`.
  void skip_value(uint32_t type, int depth, uint64_t* whole) {
    switch (type) {
      case 0:
      case 7:
        *whole = number<uint8_t>("a value");
        return;
      case 1:
        *whole = static_cast<uint64_t>(number<int8_t>("a value"));
        return;
      case 2:
        *whole = number<uint16_t>("a value");
        return;
      case 3:
        *whole = static_cast<uint64_t>(number<int16_t>("a value"));
        return;
      case 4:
        *whole = number<uint32_t>("a value");
        return;
      case 5:
        *whole = static_cast<uint64_t>(number<int32_t>("a value"));
        return;
      case 10:
        *whole = number<uint64_t>("a value");
        return;
      case 11:
        *whole = static_cast<uint64_t>(number<int64_t>("a value"));
        return;
      case 6:
        take(4, "a value");
        return;
      case 12:
        take(8, "a value");
        return;
      case 8:
        text("a string value");
        return;
      case 9:
        skip_array(depth);
        return;
      default:
        gguf.fail("metadata of the unknown type " + std::to_string(type) + ".");
    }
  }
  void skip_array(int depth) {
    if (depth >= kMaxArrayDepth) gguf.fail("metadata arrays are nested too deeply.");
    const uint32_t type = number<uint32_t>("an array");
    const uint64_t count = number<uint64_t>("an array");
    if (count > kMaxArrayElements) {
      gguf.fail("metadata array of " + std::to_string(count) + " elements; the limit is " +
                std::to_string(kMaxArrayElements) + ".");
    }
    uint64_t ignored = 0;
    for (uint64_t i = 0; i < count; ++i) skip_value(type, depth + 1, &ignored);
  }
};

GgufFile::GgufFile(const std::string& path) : file_(path, "GGUF_INVALID") {
  Cursor cursor{*this};
  if (file_.size() < 4 || std::memcmp(cursor.take(4, "the magic"), "GGUF", 4) != 0) {
    fail("does not start with GGUF.");
  }
  const uint32_t version = cursor.number<uint32_t>("the version");
  if (version != 2 && version != 3)
    fail("is of version " + std::to_string(version) + "; versions 2 and 3 are read.");
  const uint64_t num_tensors = cursor.number<uint64_t>("the tensor count");
  const uint64_t num_metadata = cursor.number<uint64_t>("the metadata count");
  if (num_tensors > kMaxTensors || num_metadata > kMaxMetadataEntries) {
    fail("says it has " + std::to_string(num_tensors) + " tensors and " +
         std::to_string(num_metadata) + " metadata entries; the limits are " +
         std::to_string(kMaxTensors) + " and " + std::to_string(kMaxMetadataEntries) + ".");
  }
  read_metadata(cursor, num_metadata);
  read_tensor_infos(cursor, num_tensors);
  const uint64_t alignment = metadata_count("general.alignment", 32);
  if (alignment == 0 || alignment > 65536 || (alignment & (alignment - 1)) != 0) {
    fail("general.alignment is " + std::to_string(alignment) + ", not a power of two up to 65536.");
  }
  place_tensors((cursor.at + alignment - 1) / alignment * alignment);
}

void GgufFile::fail(const std::string& what) const {
  throw EngineError("GGUF_INVALID", file_.path() + ": " + what);
}

void GgufFile::read_metadata(Cursor& cursor, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    const std::string key = cursor.text("a metadata key");
    const uint32_t type = cursor.number<uint32_t>("a metadata type");
    if (key == "general.architecture" && type == 8) {
      architecture_ = cursor.text("general.architecture");
      continue;
    }
    uint64_t whole = 0;
    cursor.skip_value(type, 0, &whole);
    const bool is_whole = type <= 5 || type == 7 || type == 10 || type == 11;
    if (is_whole && !numbers_.emplace(key, whole).second)
      fail("metadata key " + key + " stands twice.");
  }
}

uint64_t GgufFile::metadata_count(const std::string& key, uint64_t fallback) const {
  const auto found = numbers_.find(key);
  return found == numbers_.end() ? fallback : found->second;
}

void GgufFile::read_tensor_infos(Cursor& cursor, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    Tensor tensor = read_tensor_info(cursor);
    const std::string name = hugging_face_name(tensor.file_name);
    if (name.empty()) {
      if (tensor.file_name == "rope_freqs.weight") continue;  // follows from the configuration
      fail("tensor " + tensor.file_name + " has no place in this model.");
    }
    const std::string file_name = tensor.file_name;
    if (!tensors_.emplace(name, std::move(tensor)).second)
      fail("tensor " + file_name + " stands twice.");
  }
}

GgufFile::Tensor GgufFile::read_tensor_info(Cursor& cursor) {
  Tensor tensor = {};
  tensor.file_name = cursor.text("a tensor name");
  const uint32_t num_dims = cursor.number<uint32_t>("a tensor's shape");
  if (num_dims == 0 || num_dims > 4) {
    fail("tensor " + tensor.file_name + " has " + std::to_string(num_dims) +
         " dimensions; 1 to 4 are allowed.");
  }
  size_t num_elements = 1;
  for (uint32_t i = 0; i < num_dims; ++i) {
    const uint64_t extent = cursor.number<uint64_t>("a tensor's shape");
    if (extent == 0 || __builtin_mul_overflow(num_elements, extent, &num_elements)) {
      fail("tensor " + tensor.file_name + " has the impossible extent " + std::to_string(extent) +
           ".");
    }
    tensor.shape.insert(tensor.shape.begin(), extent);
  }
  tensor.type = cursor.number<uint32_t>("a tensor's type");
  tensor.offset = cursor.number<uint64_t>("a tensor's offset");
  const TensorType* type = type_of(tensor.type);
  if (type == nullptr) {
    fail("tensor " + tensor.file_name + " is of ggml type " + std::to_string(tensor.type) +
         "; F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are read. Convert the model to "
         "one of these.");
  }
  tensor.row_elements = tensor.shape.back();
  tensor.num_rows = num_elements / tensor.row_elements;
  if (tensor.row_elements % type->block_elements != 0) {
    fail("tensor " + tensor.file_name + " " + type->name + " has rows of " +
         std::to_string(tensor.row_elements) + " elements, not a multiple of " +
         std::to_string(type->block_elements) + ".");
  }
  tensor.row_bytes = tensor.row_elements / type->block_elements * type->block_bytes;
  return tensor;
}

void GgufFile::place_tensors(size_t data_start) {
  const size_t available = data_start > file_.size() ? 0 : file_.size() - data_start;
  std::vector<std::pair<size_t, const Tensor*>> order;
  for (auto& [name, tensor] : tensors_) {
    size_t num_bytes = 0;
    size_t end = 0;
    if (__builtin_mul_overflow(tensor.num_rows, tensor.row_bytes, &num_bytes) ||
        __builtin_add_overflow(tensor.offset, num_bytes, &end) || end > available) {
      fail("tensor " + tensor.file_name + " lies at bytes " + std::to_string(tensor.offset) +
           " to " + std::to_string(end) + " of " + std::to_string(available) +
           " of data. The file is truncated or damaged.");
    }
    tensor.offset += data_start;
    order.emplace_back(tensor.offset, &tensor);
    // Only the llama architecture's converter permutes; q and k of 2
    // dimensions, by their own number of heads.
    const bool is_query = tensor.file_name.ends_with("attn_q.weight");
    const bool is_key = tensor.file_name.ends_with("attn_k.weight");
    if (architecture_ != "llama" || (!is_query && !is_key)) continue;
    const uint64_t heads = metadata_count("llama.attention.head_count", 0);
    tensor.permuted_heads =
        is_query ? heads : metadata_count("llama.attention.head_count_kv", heads);
    if (tensor.permuted_heads == 0 || tensor.num_rows % (2 * tensor.permuted_heads) != 0) {
      fail("tensor " + tensor.file_name + " has " + std::to_string(tensor.num_rows) +
           " rows, which " + std::to_string(tensor.permuted_heads) +
           " heads do not divide into pairs.");
    }
  }
  std::sort(order.begin(), order.end());
  for (size_t i = 1; i < order.size(); ++i) {
    const Tensor& before = *order[i - 1].second;
    if (before.offset + before.num_rows * before.row_bytes > order[i].first) {
      fail("tensor " + order[i].second->file_name + " overlaps " + before.file_name + ".");
    }
  }
}

std::vector<std::string> GgufFile::names() const {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

const GgufFile::Tensor& GgufFile::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("tensor " + name + " is missing.");
  return found->second;
}

std::vector<size_t> GgufFile::shape(const std::string& name) const { return tensor(name).shape; }

void GgufFile::read(const std::string& name, size_t first, size_t count, float* out) const {
  const Tensor& source = tensor(name);
  const size_t width = source.row_elements;
  if (first % width != 0 || count % width != 0 || first / width + count / width > source.num_rows) {
    fail("tensor " + name + ": " + std::to_string(count) + " elements from " +
         std::to_string(first) + " are not whole rows of " + std::to_string(width) + ".");
  }
  for (size_t i = 0; i < count / width; ++i) read_row(source, first / width + i, out + i * width);
  file_.forget(source.offset + first / width * source.row_bytes, count / width * source.row_bytes);
}

void GgufFile::read_row(const Tensor& source, size_t row, float* out) const {
  size_t stored_row = row;
  if (source.permuted_heads != 0) {
    const size_t head_rows = source.num_rows / source.permuted_heads;
    const size_t head = row / head_rows;
    const size_t within = row % head_rows;
    const size_t half = head_rows / 2;
    stored_row = head * head_rows + within % half * 2 + within / half;
  }
  const uint8_t* bytes = file_.data() + source.offset + stored_row * source.row_bytes;
  const size_t width = source.row_elements;
  if (source.type == 0) {
    std::memcpy(out, bytes, 4 * width);
  } else if (source.type == 1) {
    for (size_t i = 0; i < width; ++i) out[i] = float_from_float16(load_half(bytes + 2 * i));
  } else if (source.type == 30) {
    for (size_t i = 0; i < width; ++i) out[i] = float_from_bfloat16(load_half(bytes + 2 * i));
  } else {
    const TensorType& type = *type_of(source.type);
    for (size_t i = 0; i < width / 32; ++i)
      dequantise_block(source.type, bytes + i * type.block_bytes, out + 32 * i);
  }
}

std::unique_ptr<WeightSource> open_gguf(const std::string& path) {
  return std::make_unique<GgufFile>(path);
}

}  // namespace tunemesh
