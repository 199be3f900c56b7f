#include "engine/model_config.h"

#include <cmath>

#include "engine/error.h"

namespace tunemesh {
namespace {

constexpr size_t kMaxExtent = size_t{1} << 24;
constexpr size_t kMaxLayers = 1024;

void check_range(const char* field, size_t value, size_t limit) {
  if (value >= 1 && value <= limit) return;
  throw EngineError("MODEL_INVALID", std::string("config: ") + field + " is " +
                                         std::to_string(value) + "; 1 to " + std::to_string(limit) +
                                         " is allowed.");
}

void check_positive(const char* field, double value) {
  if (std::isfinite(value) && value > 0) return;
  throw EngineError("MODEL_INVALID", std::string("config: ") + field + " is " +
                                         std::to_string(value) + "; it must be above 0.");
}

}  // namespace

void check_model_config(const ModelConfig& config) {
  if (config.family != "llama" && config.family != "mistral" && config.family != "qwen2" &&
      config.family != "qwen3") {
    throw EngineError("MODEL_UNSUPPORTED",
                      "config: the family " + config.family +
                          " is not supported; llama, mistral, qwen2 and qwen3 are.");
  }
  check_range("vocabSize", config.vocab_size, kMaxExtent);
  check_range("hiddenSize", config.hidden_size, kMaxExtent);
  check_range("intermediateSize", config.intermediate_size, kMaxExtent);
  check_range("numLayers", config.num_layers, kMaxLayers);
  check_range("numHeads", config.num_heads, 1 << 14);
  check_range("numKvHeads", config.num_kv_heads, config.num_heads);
  check_range("headSize", config.head_size, 1 << 12);
  check_range("maxPositionEmbeddings", config.max_position_embeddings, size_t{1} << 31);
  check_positive("rmsNormEpsilon", config.rms_norm_epsilon);
  check_positive("rotaryTheta", config.rotary_theta);
  if (config.num_heads % config.num_kv_heads != 0) {
    throw EngineError("MODEL_INVALID", "config: numHeads " + std::to_string(config.num_heads) +
                                           " is not a multiple of numKvHeads " +
                                           std::to_string(config.num_kv_heads) + ".");
  }
  if (config.head_size % 2 != 0) {
    throw EngineError("MODEL_INVALID", "config: headSize " + std::to_string(config.head_size) +
                                           " is odd; rotary positions need pairs.");
  }
  const RotaryScaling& scaling = config.rotary_scaling;
  if (scaling.kind == RotaryScaling::Kind::kNone) return;
  check_positive("rotaryScaling.factor", scaling.factor);
  if (scaling.kind == RotaryScaling::Kind::kLinear) return;
  check_positive("rotaryScaling.originalMaxPosition", scaling.original_max_position);
  check_positive("rotaryScaling.lowFreqFactor", scaling.low_freq_factor);
  check_positive("rotaryScaling.highFreqFactor - lowFreqFactor",
                 scaling.high_freq_factor - scaling.low_freq_factor);
}

std::array<LinearShape, kNumLinears> linear_shapes(const ModelConfig& config) {
  const size_t hidden = config.hidden_size;
  const size_t query = config.query_width();
  const size_t kv = config.kv_width();
  const size_t feed_forward = config.intermediate_size;
  return {{{"q_proj", "self_attn.q_proj", query, hidden},
           {"k_proj", "self_attn.k_proj", kv, hidden},
           {"v_proj", "self_attn.v_proj", kv, hidden},
           {"o_proj", "self_attn.o_proj", hidden, query},
           {"gate_proj", "mlp.gate_proj", feed_forward, hidden},
           {"up_proj", "mlp.up_proj", feed_forward, hidden},
           {"down_proj", "mlp.down_proj", hidden, feed_forward}}};
}

size_t TensorShape::num_elements() const {
  size_t count = 1;
  for (const size_t extent : shape) count *= extent;
  return count;
}

std::string layer_name(size_t layer, const std::string& rest) {
  return "model.layers." + std::to_string(layer) + "." + rest;
}

std::vector<TensorShape> model_tensors(const ModelConfig& config) {
  std::vector<TensorShape> tensors;
  tensors.push_back({"model.embed_tokens.weight", {config.vocab_size, config.hidden_size}});
  for (size_t layer = 0; layer < config.num_layers; ++layer) {
    auto add = [&](const std::string& rest, std::vector<size_t> shape) {
      tensors.push_back({layer_name(layer, rest), std::move(shape)});
    };
    add("input_layernorm.weight", {config.hidden_size});
    add("post_attention_layernorm.weight", {config.hidden_size});
    if (config.qk_norm) {
      add("self_attn.q_norm.weight", {config.head_size});
      add("self_attn.k_norm.weight", {config.head_size});
    }
    const auto shapes = linear_shapes(config);
    for (int which = 0; which < kNumLinears; ++which) {
      const LinearShape& linear = shapes[which];
      add(std::string(linear.path) + ".weight", {linear.out, linear.in});
      if (config.qkv_bias && which <= kValue) add(std::string(linear.path) + ".bias", {linear.out});
    }
  }
  tensors.push_back({"model.norm.weight", {config.hidden_size}});
  if (!config.tie_word_embeddings) {
    tensors.push_back({"lm_head.weight", {config.vocab_size, config.hidden_size}});
  }
  return tensors;
}

}  // namespace tunemesh
