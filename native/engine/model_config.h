// A decoder by data: one implementation covers every family. Same fields as
// proto/model-config.ts.
#pragma once
#include <array>
#include <cstddef>
#include <string>
#include <vector>

namespace tunemesh {

struct RotaryScaling {
  enum class Kind { kNone, kLinear, kLlama3 };
  Kind kind = Kind::kNone;
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_max_position = 0;
};

struct ModelConfig {
  std::string family;
  size_t vocab_size = 0, hidden_size = 0, intermediate_size = 0;
  size_t num_layers = 0, num_heads = 0, num_kv_heads = 0, head_size = 0;
  size_t max_position_embeddings = 0;
  double rms_norm_epsilon = 0;
  double rotary_theta = 0;
  RotaryScaling rotary_scaling;
  size_t sliding_window = 0;  // 0: none
  bool qkv_bias = false;
  bool qk_norm = false;
  bool tie_word_embeddings = false;

  size_t query_width() const { return num_heads * head_size; }
  size_t kv_width() const { return num_kv_heads * head_size; }
};

// Throws MODEL_UNSUPPORTED or MODEL_INVALID with the field, its value and the
// limit.
void check_model_config(const ModelConfig& config);

// The seven linears of a layer, in this order everywhere.
enum Linear { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kNumLinears };

struct LinearShape {
  const char* module;  // "q_proj", as target_modules has it
  const char* path;    // "self_attn.q_proj"
  size_t out, in;
};
std::array<LinearShape, kNumLinears> linear_shapes(const ModelConfig& config);

struct TensorShape {
  std::string name;
  std::vector<size_t> shape;
  size_t num_elements() const;
};
// Every tensor of the model under its Hugging Face name, embedding first. A
// tied head is not listed.
std::vector<TensorShape> model_tensors(const ModelConfig& config);

std::string layer_name(size_t layer, const std::string& rest);

}  // namespace tunemesh
