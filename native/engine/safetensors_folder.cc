// A model folder: one model.safetensors, or shards named by
// model.safetensors.index.json.
#include <sys/stat.h>

#include <string_view>

#include "engine/error.h"
#include "engine/gguf.h"
#include "engine/json.h"
#include "engine/safetensors.h"

namespace tunemesh {
namespace {

bool is_file(const std::string& path) {
  struct stat facts = {};
  return ::stat(path.c_str(), &facts) == 0 && S_ISREG(facts.st_mode);
}

class SafetensorsFolder : public WeightSource {
 public:
  explicit SafetensorsFolder(const std::string& folder) : folder_(folder) {
    const std::string single = folder + "/model.safetensors";
    const std::string index = folder + "/model.safetensors.index.json";
    if (is_file(single)) {
      add_shard(single);
      for (const auto& [name, tensor] : shards_[0].tensors()) shard_of_[name] = 0;
    } else if (is_file(index)) {
      open_shards(index);
    } else {
      throw EngineError("MODEL_NOT_FOUND", folder +
                                               " has neither model.safetensors nor "
                                               "model.safetensors.index.json.");
    }
  }

  bool has(const std::string& name) const override { return shard_of_.count(name) != 0; }
  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, shard] : shard_of_) names.push_back(name);
    return names;
  }
  std::vector<size_t> shape(const std::string& name) const override {
    return shard(name).tensor(name).shape;
  }
  void read(const std::string& name, size_t first, size_t count, float* out) const override {
    shard(name).read(name, first, count, out);
  }
  std::string fingerprint() const override {
    std::string all;
    for (const SafetensorsFile& file : shards_) all += file_fingerprint(file.path()) + "\n";
    return all;
  }
  std::string description() const override { return folder_; }
  std::string error_code() const override { return "SAFETENSORS_INVALID"; }

 private:
  void add_shard(const std::string& path) { shards_.emplace_back(path); }

  void open_shards(const std::string& index) {
    const MappedFile file(index, "SAFETENSORS_INVALID");
    if (file.size() > kMaxSafetensorsHeaderBytes) {
      throw EngineError("SAFETENSORS_INVALID",
                        index + " has " + std::to_string(file.size()) + " bytes; the limit is " +
                            std::to_string(kMaxSafetensorsHeaderBytes) + ".");
    }
    const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
    const Json json = parse_json({text, index, "SAFETENSORS_INVALID"});
    const JsonObject& top = json.object(index);
    const auto map = top.find("weight_map");
    if (map == top.end()) throw EngineError("SAFETENSORS_INVALID", index + " has no weight_map.");
    std::map<std::string, size_t> opened;
    for (const auto& [name, value] : map->second.object(index + ": weight_map")) {
      const std::string& shard_name = value.string(index + ": weight_map." + name);
      if (shard_name.empty() || shard_name.find('/') != std::string::npos) {
        throw EngineError("SAFETENSORS_INVALID",
                          index + ": tensor " + name + " is said to lie in \"" + shard_name +
                              "\", which is not a file name in this folder.");
      }
      auto found = opened.find(shard_name);
      if (found == opened.end()) {
        found = opened.emplace(shard_name, shards_.size()).first;
        add_shard(folder_ + "/" + shard_name);
      }
      if (shards_[found->second].tensors().count(name) == 0) {
        throw EngineError("SAFETENSORS_INVALID", index + ": tensor " + name +
                                                     " is said to lie in " + shard_name +
                                                     ", which does not have it.");
      }
      shard_of_[name] = found->second;
    }
  }

  const SafetensorsFile& shard(const std::string& name) const {
    const auto found = shard_of_.find(name);
    if (found == shard_of_.end()) {
      throw EngineError("SAFETENSORS_INVALID",
                        folder_ + ": tensor " + name + " is missing from the model's files.");
    }
    return shards_[found->second];
  }

  std::string folder_;
  std::vector<SafetensorsFile> shards_;
  std::map<std::string, size_t> shard_of_;
};

}  // namespace

std::unique_ptr<WeightSource> open_safetensors_folder(const std::string& folder) {
  return std::make_unique<SafetensorsFolder>(folder);
}

std::unique_ptr<WeightSource> open_weights(const std::string& path) {
  struct stat facts = {};
  if (::stat(path.c_str(), &facts) != 0)
    throw EngineError("MODEL_NOT_FOUND", path + " does not exist.");
  if (S_ISDIR(facts.st_mode)) return open_safetensors_folder(path);
  if (path.size() > 5 && path.ends_with(".gguf")) return open_gguf(path);
  throw EngineError("MODEL_UNSUPPORTED", path + " is neither a model folder nor a .gguf file.");
}

std::string file_fingerprint(const std::string& path) {
  struct stat facts = {};
  if (::stat(path.c_str(), &facts) != 0)
    throw EngineError("MODEL_NOT_FOUND", path + " does not exist.");
  return path + "|" + std::to_string(facts.st_size) + "|" + std::to_string(facts.st_mtim.tv_sec) +
         "." + std::to_string(facts.st_mtim.tv_nsec);
}

}  // namespace tunemesh
