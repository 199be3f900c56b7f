// The canonical vector of trained elements (DESIGN 5): tensors in natural sort
// order of their Hugging Face or PEFT names, row-major, each filled with zeros
// up to whole blocks of 256. Slices, frames, digests and the optimizer's random
// numbers are defined on it.
#pragma once
#include <string>
#include <vector>

#include "engine/codec.h"
#include "engine/model_config.h"

namespace tunemesh {

struct TrainedTensor {
  std::string name;
  std::vector<size_t> shape;
  size_t num_elements;
  size_t first_block;
  size_t first_index;  // canonical index of its first element, without fill
  size_t offset() const { return first_block * kBlockElements; }
};

struct CanonicalLayout {
  std::vector<TrainedTensor> tensors;
  size_t num_blocks = 0;
  size_t num_parameters = 0;
  size_t num_floats() const { return num_blocks * kBlockElements; }
  const TrainedTensor* find(const std::string& name) const;
  const TrainedTensor& tensor_of_block(size_t block) const;
};

struct BlockRange {
  size_t first_block;
  size_t num_blocks;
};

// Blocks by the moment of backward at which their gradients are final: final norm and an untied
// head, the layers from the last to the first, the embedding. Where nothing is trained the part is
// empty.
std::vector<std::vector<BlockRange>> gradient_parts(const CanonicalLayout& layout,
                                                    size_t num_layers);

struct LoraSpec {
  size_t rank = 0;
  double alpha = 0;
  std::vector<std::string> target_modules;
  bool use_rslora = false;
  float scale() const;
  bool targets(const std::string& module) const;
};

CanonicalLayout full_layout(const ModelConfig& config);
// Throws JOB_INVALID for a module that the model does not have.
CanonicalLayout lora_layout(const ModelConfig& config, const LoraSpec& lora);

// "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
std::string adapter_tensor_name(size_t layer, const LinearShape& linear, char matrix);

// Runs of digits compare as numbers: "layers.2" before "layers.10".
bool natural_less(const std::string& a, const std::string& b);

}  // namespace tunemesh
