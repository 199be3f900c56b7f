// What the step benchmarks train: shapes by name, random weights and tokens. No files are read.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "kernels/philox.h"

namespace tunemesh::bench {

struct ModelShape {
  const char* name;
  const char* family;
  size_t vocabulary, hidden, feed_forward, layers, heads, kv_heads, head_size;
  bool is_tied;
  double rotary_theta;
};
constexpr ModelShape kModelShapes[] = {
    {"llama-8b", "llama", 128256, 4096, 14336, 32, 32, 8, 128, false, 500000},
    {"llama-3b", "llama", 128256, 3072, 8192, 28, 24, 8, 128, true, 500000},
    {"llama-1b", "llama", 128256, 2048, 8192, 16, 32, 8, 64, true, 500000},
    {"qwen2.5-7b", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, false, 1000000},
    {"smollm2-135m", "llama", 49152, 576, 1536, 30, 9, 3, 64, true, 10000},
    {"tiny-5m", "llama", 4096, 256, 704, 5, 4, 2, 64, true, 10000},
};

inline const ModelShape* find_model_shape(const std::string& name) {
  for (const ModelShape& shape : kModelShapes) {
    if (name == shape.name) return &shape;
  }
  return nullptr;
}

inline ModelConfig config_of(const ModelShape& shape, size_t longest_document) {
  ModelConfig config;
  config.family = shape.family;
  config.vocab_size = shape.vocabulary;
  config.hidden_size = shape.hidden;
  config.intermediate_size = shape.feed_forward;
  config.num_layers = shape.layers;
  config.num_heads = shape.heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_size = shape.head_size;
  config.max_position_embeddings = std::max<size_t>(longest_document, 8192);
  config.rms_norm_epsilon = 1e-5;
  config.rotary_theta = shape.rotary_theta;
  config.qkv_bias = config.family == "qwen2";
  config.tie_word_embeddings = shape.is_tied;
  return config;
}

// One micro-batch: rows of full length.
struct StepWork {
  bool is_full;
  size_t rows, row_tokens, loss_rows;
  size_t num_tokens() const { return rows * row_tokens; }
};

// LoRA r = 16, alpha = 32 on all seven linears.
inline TrainSpec spec_of(const StepWork& work) {
  TrainSpec spec;
  spec.is_full = work.is_full;
  if (!work.is_full) {
    spec.lora = {16,
                 32,
                 {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
                 false};
  }
  spec.tokens_per_micro_batch = work.num_tokens();
  spec.longest_document = work.row_tokens;
  spec.loss_chunk_rows = std::min(work.loss_rows, work.num_tokens());
  spec.beta1 = 0.9;
  spec.beta2 = 0.999;
  spec.epsilon = 1e-8f;
  return spec;
}

// Uniform in +-0.035, standard deviation 0.02; norms 1. A tensor is a window of one table of random
// values, at a place that its name gives: eight billion of them are made as fast as memory copies.
class RandomSource : public WeightSource {
 public:
  explicit RandomSource(const ModelConfig& config) : table_(kTableSize) {
    for (const TensorShape& tensor : model_tensors(config)) shapes_[tensor.name] = tensor.shape;
    for (size_t i = 0; i < kTableSize; ++i) {
      table_[i] = (philox_uniform(1, PhiloxStream::kTest, i) - 0.5f) * 0.07f;
    }
  }
  bool has(const std::string& name) const override { return shapes_.count(name) != 0; }
  std::vector<std::string> names() const override { return {}; }
  std::vector<size_t> shape(const std::string& name) const override { return shapes_.at(name); }
  void read(const std::string& name, size_t first, size_t count, float* out) const override {
    if (name.find("norm") != std::string::npos) {
      std::fill_n(out, count, 1.0f);
      return;
    }
    size_t at = (std::hash<std::string>()(name) + first) % kTableSize;
    while (count > 0) {
      const size_t part = std::min(count, kTableSize - at);
      std::memcpy(out, table_.data() + at, part * sizeof(float));
      out += part;
      count -= part;
      at = 0;
    }
  }
  std::string fingerprint() const override { return "random"; }
  std::string description() const override { return "random weights"; }
  std::string error_code() const override { return "MODEL_INVALID"; }

 private:
  static constexpr size_t kTableSize = 4194301;  // prime: rows of a matrix do not repeat
  std::map<std::string, std::vector<size_t>> shapes_;
  std::vector<float> table_;
};

// Random tokens and targets, every row a document of full length.
struct RandomTokens {
  RandomTokens(const StepWork& work, size_t vocabulary) : rows(work.rows) {
    for (size_t i = 0; i < work.num_tokens(); ++i) {
      tokens.push_back(static_cast<int32_t>(philox_bits(2, PhiloxStream::kTest, i) % vocabulary));
      targets.push_back(static_cast<int32_t>(philox_bits(3, PhiloxStream::kTest, i) % vocabulary));
    }
    for (size_t row = 0; row <= work.rows; ++row) {
      starts.push_back(static_cast<int32_t>(row * work.row_tokens));
    }
  }
  TokenBatch batch() const {
    return {tokens.data(), targets.data(), tokens.size(), starts.data(), rows};
  }
  size_t rows;
  std::vector<int32_t> tokens, targets, starts;
};

// The update of step `step` (from 1) for a gradient of this norm, clipped to 1.
inline AdamWNumbers clipped_update(size_t step, double sum_squares) {
  AdamWNumbers numbers = {};
  numbers.learning_rate = 1e-4f;
  numbers.clip_factor = static_cast<float>(std::min(1.0, 1.0 / (std::sqrt(sum_squares) + 1e-6)));
  const auto exponent = static_cast<double>(step);
  numbers.bias_correction1 = static_cast<float>(1 - std::pow(0.9, exponent));
  numbers.bias_correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(0.999, exponent)));
  return numbers;
}

}  // namespace tunemesh::bench
