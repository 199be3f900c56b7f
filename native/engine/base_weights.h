// The frozen model: linears in the kernels' packed layout, embedding, norms and biases row-major.
//
// On a device with memory of its own the model is read into it. On the CPU, with a cache folder,
// the packed weights are one file, written once per machine under a temporary name and renamed, and
// mapped by every worker: its pages are shared. The file's name and header carry a digest of the
// model's files (path, size, time), its configuration, the layout version and the instruction path.
// A packed copy replaces the row-major one; only a tied embedding is kept in both, of which the
// row-major one is touched (and so resident) only where tokens are looked up.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/arena.h"
#include "engine/decoder_weights.h"
#include "engine/mapped_file.h"
#include "engine/packed_cache.h"
#include "engine/weight_reader.h"

namespace tunemesh {

class BaseWeights {
 public:
  struct Options {
    const ModelConfig& config;
    const WeightSource& source;
    std::string cache_folder;  // empty: private memory
    GroupPlan groups;          // plan_frozen_groups()
    // The embedding in host memory, from which the device reads single rows; not where it is tied.
    bool embedding_on_host = false;
    PackedCacheLimits cache_limits = {};  // of cache_folder
  };
  BaseWeights(const Device& device, const Options& options);

  // What an instance will hold, mapped or private.
  struct Choice {
    const GroupPlan& groups;
    bool embedding_on_host = false;
  };
  struct Bytes {
    size_t device_bytes = 0, host_bytes = 0;
  };
  static Bytes planned(const Device& device, const ModelConfig& config, const Choice& choice);

  const GroupPlan& groups() const { return groups_; }
  // All gradients null.
  DecoderWeights view() const;
  size_t num_bytes() const { return num_bytes_; }  // on the device
  size_t host_bytes() const { return host_bytes_; }
  bool embedding_on_host() const { return host_bytes_ > 0; }
  bool is_mapped() const { return mapped_.has_value(); }

 private:
  struct Part {
    std::string tensor;  // Hugging Face name, or "layers.0.qkv" of a group
    std::vector<size_t> shape;
    bool is_packed;
    size_t offset, num_bytes;  // num_bytes: a multiple of kAlignment
    size_t layer = 0;          // of a group
    int group = kNumGroups;    // kNumGroups: a tensor of its own
    bool is_on_host = false;
  };
  struct Layout {
    std::vector<Part> parts;
    size_t num_bytes = 0, host_bytes = 0;
    void add(const Device& device, const TensorShape& tensor, bool is_packed);
    void append(Part part, size_t bytes);
  };
  static Layout lay_out(const Device& device, const ModelConfig& config, const Choice& choice);
  void fill_private();
  void fill_on_host(const Part& part, char* out) const;
  void fill(const Part& part, char* out);
  void fill_group(const Part& part, TmElement* packed);
  void open_cache(const std::string& folder, const PackedCacheLimits& limits);
  void write_cache(const std::string& path, const std::string& header);
  const char* at(const std::string& tensor, bool is_packed) const;
  void view_layer(size_t index, LayerWeights& layer) const;
  const float* rows_at(const std::string& tensor) const;
  TmWeight packed_at(const std::string& tensor, size_t out, size_t in) const;

  const Device& device_;
  const ModelConfig& config_;
  const WeightSource& source_;
  WeightReader reader_;
  GroupPlan groups_;
  std::vector<Part> parts_;
  size_t num_bytes_ = 0, host_bytes_ = 0;
  std::optional<MappedFile> mapped_;
  std::unique_ptr<Arena> private_, on_host_;
  const char* base_ = nullptr;
  const char* host_base_ = nullptr;
};

// Throws the source's error where a tensor of the configuration is missing or has another shape.
void check_weights(const ModelConfig& config, const WeightSource& source);

}  // namespace tunemesh
