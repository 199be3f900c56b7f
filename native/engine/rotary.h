// Rotary position tables, with the scalings of the Hugging Face configurations.
#pragma once
#include <vector>

#include "engine/model_config.h"

namespace tunemesh {

// Inverse frequencies [F/2], in float32 as the reference implementation
// computes them.
std::vector<float> rotary_inverse_frequencies(const ModelConfig& config);

struct RotaryTable {
  std::vector<float> cos, sin;  // [num_positions, F/2]
};
RotaryTable rotary_table(const ModelConfig& config, size_t num_positions);

}  // namespace tunemesh
