#include "engine/canonical_layout.h"

#include <algorithm>
#include <cmath>

#include "engine/error.h"

namespace tunemesh {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

CanonicalLayout layout_of(std::vector<TensorShape> shapes) {
  std::sort(shapes.begin(), shapes.end(), [](const TensorShape& a, const TensorShape& b) {
    return natural_less(a.name, b.name);
  });
  CanonicalLayout layout;
  for (TensorShape& shape : shapes) {
    const size_t num_elements = shape.num_elements();
    layout.tensors.push_back({shape.name, std::move(shape.shape), num_elements, layout.num_blocks,
                              layout.num_parameters});
    layout.num_blocks += (num_elements + kBlockElements - 1) / kBlockElements;
    layout.num_parameters += num_elements;
  }
  return layout;
}

size_t part_of(const std::string& name, size_t num_layers) {
  const std::string layers = ".layers.";
  const size_t at = name.find(layers);
  if (at != std::string::npos) return num_layers - std::stoul(name.substr(at + layers.size()));
  return name == "model.embed_tokens.weight" ? num_layers + 1 : 0;
}

}  // namespace

bool natural_less(const std::string& a, const std::string& b) {
  size_t i = 0;
  size_t j = 0;
  while (i < a.size() && j < b.size()) {
    if (is_digit(a[i]) && is_digit(b[j])) {
      const size_t a_start = i;
      const size_t b_start = j;
      while (i < a.size() && is_digit(a[i])) ++i;
      while (j < b.size() && is_digit(b[j])) ++j;
      const size_t a_digits = i - a_start;
      const size_t b_digits = j - b_start;
      if (a_digits != b_digits) return a_digits < b_digits;  // names carry no leading zeros
      const int order = a.compare(a_start, a_digits, b, b_start, b_digits);
      if (order != 0) return order < 0;
    } else {
      if (a[i] != b[j]) return a[i] < b[j];
      ++i;
      ++j;
    }
  }
  return a.size() - i < b.size() - j;
}

float LoraSpec::scale() const {
  const double divisor =
      use_rslora ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank);
  return static_cast<float>(alpha / divisor);
}

bool LoraSpec::targets(const std::string& module) const {
  return std::find(target_modules.begin(), target_modules.end(), module) != target_modules.end();
}

const TrainedTensor* CanonicalLayout::find(const std::string& name) const {
  for (const TrainedTensor& tensor : tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

const TrainedTensor& CanonicalLayout::tensor_of_block(size_t block) const {
  auto after = std::upper_bound(
      tensors.begin(), tensors.end(), block,
      [](size_t value, const TrainedTensor& tensor) { return value < tensor.first_block; });
  return *(after - 1);
}

std::vector<std::vector<BlockRange>> gradient_parts(const CanonicalLayout& layout,
                                                    size_t num_layers) {
  std::vector<std::vector<BlockRange>> parts(num_layers + 2);
  for (size_t i = 0; i < layout.tensors.size(); ++i) {
    const TrainedTensor& tensor = layout.tensors[i];
    const bool is_last = i + 1 == layout.tensors.size();
    const size_t end = is_last ? layout.num_blocks : layout.tensors[i + 1].first_block;
    std::vector<BlockRange>& part = parts.at(part_of(tensor.name, num_layers));
    if (!part.empty() && part.back().first_block + part.back().num_blocks == tensor.first_block) {
      part.back().num_blocks = end - part.back().first_block;
    } else {
      part.push_back({tensor.first_block, end - tensor.first_block});
    }
  }
  return parts;
}

CanonicalLayout full_layout(const ModelConfig& config) { return layout_of(model_tensors(config)); }

std::string adapter_tensor_name(size_t layer, const LinearShape& linear, char matrix) {
  return "base_model.model." + layer_name(layer, linear.path) + ".lora_" + matrix + ".weight";
}

CanonicalLayout lora_layout(const ModelConfig& config, const LoraSpec& lora) {
  const auto linears = linear_shapes(config);
  for (const std::string& module : lora.target_modules) {
    const bool known = std::any_of(linears.begin(), linears.end(), [&](const LinearShape& linear) {
      return module == linear.module;
    });
    if (!known) {
      throw EngineError("JOB_INVALID", "target_modules: the model has no linear layer " + module +
                                           "; it has q_proj, k_proj, v_proj, o_proj, "
                                           "gate_proj, up_proj, down_proj.");
    }
  }
  if (lora.target_modules.empty())
    throw EngineError("JOB_INVALID", "target_modules is empty; name at least one.");
  if (lora.rank == 0 || lora.rank > 4096) {
    throw EngineError("JOB_INVALID",
                      "r is " + std::to_string(lora.rank) + "; 1 to 4096 is allowed.");
  }
  std::vector<TensorShape> shapes;
  for (size_t layer = 0; layer < config.num_layers; ++layer) {
    for (const LinearShape& linear : linears) {
      if (!lora.targets(linear.module)) continue;
      shapes.push_back({adapter_tensor_name(layer, linear, 'A'), {lora.rank, linear.in}});
      shapes.push_back({adapter_tensor_name(layer, linear, 'B'), {linear.out, lora.rank}});
    }
  }
  return layout_of(std::move(shapes));
}

}  // namespace tunemesh
