#include "engine/rotary.h"

#include <numbers>

#include "engine/rotary_math.h"

namespace tunemesh {
namespace {

// source  Hugging Face transformers, modeling_rope_utils.py, "llama3"
float llama3_frequency(float frequency, const RotaryScaling& scaling) {
  const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;
  const float low_wavelength =
      static_cast<float>(scaling.original_max_position / scaling.low_freq_factor);
  const float high_wavelength =
      static_cast<float>(scaling.original_max_position / scaling.high_freq_factor);
  const float factor = static_cast<float>(scaling.factor);
  if (wavelength < high_wavelength) return frequency;
  if (wavelength > low_wavelength) return frequency / factor;
  const float smooth = (static_cast<float>(scaling.original_max_position) / wavelength -
                        static_cast<float>(scaling.low_freq_factor)) /
                       static_cast<float>(scaling.high_freq_factor - scaling.low_freq_factor);
  return (1 - smooth) * frequency / factor + smooth * frequency;
}

}  // namespace

std::vector<float> rotary_inverse_frequencies(const ModelConfig& config) {
  std::vector<float> frequencies(config.head_size / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_size);
    const float divisor =
        static_cast<float>(power(config.rotary_theta, static_cast<double>(exponent)));
    frequencies[i] = 1.0f / divisor;
    if (config.rotary_scaling.kind == RotaryScaling::Kind::kLinear) {
      frequencies[i] /= static_cast<float>(config.rotary_scaling.factor);
    } else if (config.rotary_scaling.kind == RotaryScaling::Kind::kLlama3) {
      frequencies[i] = llama3_frequency(frequencies[i], config.rotary_scaling);
    }
  }
  return frequencies;
}

RotaryTable rotary_table(const ModelConfig& config, size_t num_positions) {
  const std::vector<float> frequencies = rotary_inverse_frequencies(config);
  RotaryTable table;
  table.cos.reserve(num_positions * frequencies.size());
  table.sin.reserve(num_positions * frequencies.size());
  for (size_t position = 0; position < num_positions; ++position) {
    for (const float frequency : frequencies) {
      // The angle is rounded to float32, as the reference implementation does.
      const auto [sine, cosine] = sine_cosine(static_cast<float>(position) * frequency);
      table.cos.push_back(static_cast<float>(cosine));
      table.sin.push_back(static_cast<float>(sine));
    }
  }
  return table;
}

}  // namespace tunemesh
