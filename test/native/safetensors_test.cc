// The safetensors reader on true, truncated and lying files; every error names file, tensor, value
// and limit.
#include "engine/safetensors.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "test_check.h"

namespace tunemesh::test {
namespace {

namespace files = std::filesystem;

class Folder {
 public:
  Folder()
      : path_(files::temp_directory_path() / ("tunemesh-safetensors-" + std::to_string(getpid()))) {
    files::create_directories(path_);
  }
  ~Folder() { files::remove_all(path_); }
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  files::path path_;
};

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t size = header.size();
  std::string bytes(reinterpret_cast<const char*>(&size), 8);
  return bytes + header + std::string(data_bytes, '\1');
}

void refuse(const Folder& folder, const std::string& bytes, const char* part) {
  const std::string path = folder.file("bad.safetensors");
  write_bytes(path, bytes);
  CHECK_THROWS(SafetensorsFile{path}, "SAFETENSORS_INVALID", part);
  CHECK_THROWS(SafetensorsFile{path}, "SAFETENSORS_INVALID", "bad.safetensors");
}

std::string entry(const char* name, const char* dtype, const char* shape, const char* offsets) {
  return std::string("\"") + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

void test_lies(const Folder& folder) {
  const std::string a = entry("a", "F32", "[2]", "[0,8]");
  refuse(folder, "short", "less than the 8");
  refuse(folder, std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8), "the limit is 100000000");
  refuse(folder, with_header("{" + a + "}", 8).substr(0, 20), "truncated");
  refuse(folder, with_header("{" + a + "}", 7), "tensor a lies at bytes 0 to 8 of 7");
  refuse(folder, with_header("{" + a + "}", 9), "the tensors end at byte");
  refuse(folder, with_header("{" + a + "," + a + "}", 8), "stands twice");
  refuse(folder, with_header("{" + a + "} x", 8), "text after the end");
  refuse(folder, with_header("{" + entry("a", "F32", "[3]", "[0,8]") + "}", 8), "asks for 12");
  refuse(folder, with_header("{" + entry("a", "F33", "[2]", "[0,8]") + "}", 8), "F33");
  refuse(folder, with_header("{" + entry("a", "F32", "[2]", "[8,0]") + "}", 8), "bytes 8 to 0");
  refuse(folder, with_header("{" + entry("a", "F32", "[-2]", "[0,8]") + "}", 8), "-2");
  refuse(folder, with_header("{" + entry("a", "F32", "[2.5]", "[0,8]") + "}", 8), "2.5");
  refuse(
      folder,
      with_header("{" + entry("a", "F32", "[9007199254740992,9007199254740992]", "[0,8]") + "}", 8),
      "more elements than 64 bits");
  refuse(folder, with_header("{" + a + "," + entry("b", "F32", "[2]", "[4,12]") + "}", 12),
         "overlaps");
  refuse(folder, with_header("{" + a + "," + entry("b", "F32", "[1]", "[12,16]") + "}", 16), "gap");
  refuse(folder, with_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8), "lacks one of");
}

void test_round_trip(const Folder& folder) {
  const std::vector<float> values = {1.5f, -2.0f, 0.0f, 3e-8f, 7.0f, -0.25f};
  SafetensorsContent content;
  content.metadata = {{"format", "pt"}, {"odd", "quote \" and \n"}};
  content.entries.push_back({"x.weight", {2, 3}, [&](const auto& sink) {
                               sink(values.data(), values.size() * sizeof(float));
                             }});
  const std::string path = folder.file("true.safetensors");
  write_safetensors(path, content);
  const SafetensorsFile file(path);
  CHECK(file.metadata().at("odd") == "quote \" and \n", "metadata comes back");
  CHECK(file.tensor("x.weight").shape == (std::vector<size_t>{2, 3}), "shape comes back");
  std::vector<float> found(2);
  file.read("x.weight", 3, 2, found.data());
  CHECK(found[0] == values[3] && found[1] == values[4], "values come back");
  CHECK_THROWS(file.read("x.weight", 5, 2, found.data()), "SAFETENSORS_INVALID", "6 elements");
  CHECK_THROWS(file.tensor("y"), "SAFETENSORS_INVALID", "tensor y is missing");
  CHECK(std::distance(files::directory_iterator(folder.path()), {}) >= 1, "the file is there");

  const std::string full = [&] {
    std::ifstream in(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }();
  for (size_t size = 0; size < full.size(); ++size) {
    write_bytes(folder.file("cut.safetensors"), full.substr(0, size));
    CHECK_THROWS(SafetensorsFile{folder.file("cut.safetensors")}, "SAFETENSORS_INVALID", "cut");
  }
}

void test_half_floats(const Folder& folder) {
  // 1.5 and the smallest subnormal as F16; 1.5 as BF16.
  const std::string data("\x00\x3e\x01\x00\xc0\x3f", 6);
  std::string bytes = with_header(
      "{" + entry("h", "F16", "[2]", "[0,4]") + "," + entry("b", "BF16", "[1]", "[4,6]") + "}", 0);
  write_bytes(folder.file("half.safetensors"), bytes + data);
  const SafetensorsFile file(folder.file("half.safetensors"));
  float values[3];
  file.read("h", 0, 2, values);
  file.read("b", 0, 1, values + 2);
  CHECK(values[0] == 1.5f && values[1] == 0x1p-24f && values[2] == 1.5f, "half floats are exact");
}

void test_shards(const Folder& folder) {
  const std::string model = folder.file("model");
  files::create_directories(model);
  write_bytes(model + "/s1.safetensors",
              with_header("{" + entry("a", "F32", "[2]", "[0,8]") + "}", 8));
  auto index = [&](const char* map) {
    write_bytes(model + "/model.safetensors.index.json",
                std::string("{\"weight_map\":") + map + "}");
  };
  index("{\"a\":\"s1.safetensors\"}");
  CHECK(open_weights(model)->shape("a") == std::vector<size_t>{2}, "a shard's tensor is found");
  CHECK_THROWS(open_weights(model)->shape("z"), "SAFETENSORS_INVALID", "tensor z is missing");
  index("{\"b\":\"s1.safetensors\"}");
  CHECK_THROWS(open_weights(model), "SAFETENSORS_INVALID", "does not have it");
  index("{\"a\":\"../s1.safetensors\"}");
  CHECK_THROWS(open_weights(model), "SAFETENSORS_INVALID", "not a file name");
  index("{\"a\":\"s2.safetensors\"}");
  CHECK_THROWS(open_weights(model), "MODEL_NOT_FOUND", "s2.safetensors");
  CHECK_THROWS(open_weights(folder.file("nowhere")), "MODEL_NOT_FOUND", "nowhere");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  const Folder folder;
  test_lies(folder);
  test_round_trip(folder);
  test_half_floats(folder);
  test_shards(folder);
  return finish("safetensors_test");
}
