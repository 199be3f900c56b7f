#include "engine/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>

#include "engine/error.h"
#include "engine/half_floats.h"
#include "engine/json.h"

namespace tunemesh {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

size_t dtype_bytes(std::string_view dtype) {
  static const std::map<std::string_view, size_t> kSizes = {
      {"F64", 8},     {"I64", 8},     {"U64", 8},  {"F32", 4}, {"I32", 4},
      {"U32", 4},     {"F16", 2},     {"BF16", 2}, {"I16", 2}, {"U16", 2},
      {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1},   {"U8", 1},  {"BOOL", 1}};
  const auto found = kSizes.find(dtype);
  return found == kSizes.end() ? 0 : found->second;
}

std::string shape_text(const std::vector<size_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::string& path, const std::string& code)
    : file_(path, code), code_(code) {
  parse_header();
}

void SafetensorsFile::fail(const std::string& what) const {
  throw EngineError(code_, file_.path() + ": " + what);
}

void SafetensorsFile::parse_header() {
  if (file_.size() < 8)
    fail("has " + std::to_string(file_.size()) + " bytes, less than the 8 of a header size.");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file_.data(), 8);
  if (header_bytes > kMaxSafetensorsHeaderBytes) {
    fail("header of " + std::to_string(header_bytes) + " bytes; the limit is " +
         std::to_string(kMaxSafetensorsHeaderBytes) + ". Is this a safetensors file?");
  }
  if (header_bytes > file_.size() - 8) {
    fail("header of " + std::to_string(header_bytes) + " bytes in a file of " +
         std::to_string(file_.size()) + ". The file is truncated.");
  }
  const std::string_view text(reinterpret_cast<const char*>(file_.data()) + 8, header_bytes);
  const Json header = parse_json({text, file_.path(), code_});
  const size_t data_start = 8 + header_bytes;
  for (const auto& [name, entry] : header.object(file_.path() + ": the header")) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.object("__metadata__")) {
        metadata_[key] = value.string("__metadata__." + key);
      }
    } else {
      add_tensor(name, entry, data_start);
    }
  }
  check_layout(data_start);
}

void SafetensorsFile::add_tensor(const std::string& name, const Json& entry, size_t data_start) {
  const std::string where = file_.path() + ": tensor " + name;
  const JsonObject& fields = entry.object(where);
  for (const auto& [key, value] : fields) {
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      fail("tensor " + name + " has the unknown field " + key + ".");
  }
  if (fields.size() != 3) fail("tensor " + name + " lacks one of dtype, shape, data_offsets.");
  Tensor tensor;
  tensor.dtype = fields.at("dtype").string(where + ": dtype");
  const size_t element_bytes = dtype_bytes(tensor.dtype);
  if (element_bytes == 0) fail("tensor " + name + " has the unknown dtype " + tensor.dtype + ".");
  tensor.num_elements = 1;
  for (const Json& extent : fields.at("shape").array(where + ": shape")) {
    tensor.shape.push_back(extent.count(where + ": shape"));
    if (__builtin_mul_overflow(tensor.num_elements, tensor.shape.back(), &tensor.num_elements)) {
      fail("tensor " + name + " has more elements than 64 bits count: " + shape_text(tensor.shape) +
           ".");
    }
  }
  const JsonArray& offsets = fields.at("data_offsets").array(where + ": data_offsets");
  if (offsets.size() != 2)
    fail("tensor " + name + " has " + std::to_string(offsets.size()) + " data_offsets, not 2.");
  const uint64_t begin = offsets[0].count(where + ": data_offsets");
  const uint64_t end = offsets[1].count(where + ": data_offsets");
  const uint64_t available = file_.size() - data_start;
  if (begin > end || end > available) {
    fail("tensor " + name + " lies at bytes " + std::to_string(begin) + " to " +
         std::to_string(end) + " of " + std::to_string(available) +
         " in the file. The file is truncated or damaged.");
  }
  tensor.num_bytes = end - begin;
  tensor.offset = data_start + begin;
  size_t wanted = 0;
  if (__builtin_mul_overflow(tensor.num_elements, element_bytes, &wanted) ||
      wanted != tensor.num_bytes) {
    fail("tensor " + name + " " + tensor.dtype + " " + shape_text(tensor.shape) + " holds " +
         std::to_string(tensor.num_bytes) + " bytes, its shape asks for " + std::to_string(wanted) +
         ".");
  }
  tensors_.emplace(name, std::move(tensor));
}

void SafetensorsFile::check_layout(size_t data_start) const {
  std::vector<std::pair<size_t, std::string>> order;
  for (const auto& [name, tensor] : tensors_) order.emplace_back(tensor.offset, name);
  // Empty tensors share their offset with the next one: shorter ones first.
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    if (a.first != b.first) return a.first < b.first;
    return tensors_.at(a.second).num_bytes < tensors_.at(b.second).num_bytes;
  });
  size_t expected = data_start;
  for (const auto& [offset, name] : order) {
    if (offset != expected) {
      fail("tensor " + name + " starts at byte " + std::to_string(offset - data_start) +
           " of the data, not at " + std::to_string(expected - data_start) +
           (offset < expected ? ": it overlaps the one before it." : ": there is a gap."));
    }
    expected = offset + tensors_.at(name).num_bytes;
  }
  if (expected != file_.size()) {
    fail("the tensors end at byte " + std::to_string(expected) + ", the file at " +
         std::to_string(file_.size()) + ".");
  }
}

const SafetensorsFile::Tensor& SafetensorsFile::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("tensor " + name + " is missing.");
  return found->second;
}

void SafetensorsFile::read(const std::string& name, size_t first, size_t count, float* out) const {
  const Tensor& source = tensor(name);
  if (first > source.num_elements || count > source.num_elements - first) {
    fail("tensor " + name + " has " + std::to_string(source.num_elements) +
         " elements, asked for " + std::to_string(count) + " from " + std::to_string(first) + ".");
  }
  const uint8_t* bytes = file_.data() + source.offset;
  if (source.dtype == "F32") {
    std::memcpy(out, bytes + 4 * first, 4 * count);
    file_.forget(source.offset + 4 * first, 4 * count);
    return;
  }
  if (source.dtype != "F16" && source.dtype != "BF16") {
    fail("tensor " + name + " is of dtype " + source.dtype + "; only F32, F16 and BF16 are read.");
  }
  const bool is_brain = source.dtype == "BF16";
  for (size_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, bytes + 2 * (first + i), 2);
    out[i] = is_brain ? float_from_bfloat16(bits) : float_from_float16(bits);
  }
  file_.forget(source.offset + 2 * first, 2 * count);
}

void SafetensorsFile::read_bytes(const std::string& name, std::vector<uint8_t>& out) const {
  const Tensor& source = tensor(name);
  if (source.dtype != "U8")
    fail("tensor " + name + " is of dtype " + source.dtype + ", not of U8.");
  const uint8_t* bytes = file_.data() + source.offset;
  out.assign(bytes, bytes + source.num_bytes);
  file_.forget(source.offset, source.num_bytes);
}

void write_safetensors(const std::string& path, const SafetensorsContent& content) {
  std::string header = "{";
  if (!content.metadata.empty()) {
    header += "\"__metadata__\":{";
    for (size_t i = 0; i < content.metadata.size(); ++i) {
      const auto& [key, value] = content.metadata[i];
      header += (i ? "," : "") + json_quote(key) + ":" + json_quote(value);
    }
    header += "}";
  }
  size_t offset = 0;
  for (const SafetensorsEntry& entry : content.entries) {
    size_t num_bytes = dtype_bytes(entry.dtype);
    for (const size_t extent : entry.shape) num_bytes *= extent;
    header += std::string(header.size() > 1 ? "," : "") + json_quote(entry.name) +
              ":{\"dtype\":\"" + entry.dtype + "\",\"shape\":" + shape_text(entry.shape) +
              ",\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(offset + num_bytes) + "]}";
    offset += num_bytes;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  FileWriter file(path);
  const uint64_t header_bytes = header.size();
  file.write(&header_bytes, 8);
  file.write(header.data(), header.size());
  for (const SafetensorsEntry& entry : content.entries) {
    entry.write([&](const void* bytes, size_t size) { file.write(bytes, size); });
  }
  if (file.written() != 8 + header_bytes + offset) {
    throw EngineError("INTERNAL",
                      path + ": the written tensors do not fill their header's shapes.");
  }
  file.commit();
}

}  // namespace tunemesh
