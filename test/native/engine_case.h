// Seeded random models and batches of odd shapes for the engine's native tests.
#pragma once
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "kernels/philox.h"

namespace tunemesh::test {

class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}
  double uniform() { return philox_uniform(seed_, PhiloxStream::kTest, next_++); }
  double symmetric(double scale) { return scale * (2 * uniform() - 1); }
  size_t between(size_t low, size_t high) {
    return low + static_cast<size_t>(uniform() * static_cast<double>(high - low + 1));
  }

 private:
  uint64_t seed_, next_ = 0;
};

class MemorySource : public WeightSource {
 public:
  std::map<std::string, std::pair<std::vector<size_t>, std::vector<float>>> tensors;
  bool has(const std::string& name) const override { return tensors.count(name) != 0; }
  std::vector<std::string> names() const override { return {}; }
  std::vector<size_t> shape(const std::string& name) const override {
    return tensors.at(name).first;
  }
  void read(const std::string& name, size_t first, size_t count, float* out) const override {
    std::memcpy(out, tensors.at(name).second.data() + first, count * sizeof(float));
  }
  std::string fingerprint() const override { return "memory"; }
  std::string description() const override { return "memory"; }
  std::string error_code() const override { return "MODEL_INVALID"; }
};

struct Case {
  ModelConfig config;
  MemorySource source;
  std::vector<int32_t> tokens, targets, starts;
  TokenBatch batch() const {
    return {tokens.data(), targets.data(), tokens.size(), starts.data(), starts.size() - 1};
  }
  size_t num_targets() const {
    size_t count = 0;
    for (const int32_t target : targets) count += target != kUntrained ? 1 : 0;
    return count;
  }
};

// Weights up to `scale`, and three to five documents of tokens, most of them targets.
inline Case filled_case(const ModelConfig& config, Random& random, double scale) {
  Case made;
  made.config = config;
  for (const TensorShape& tensor : model_tensors(config)) {
    std::vector<float> values(tensor.num_elements());
    const bool is_norm = tensor.name.find("norm") != std::string::npos;
    for (float& value : values) {
      value = static_cast<float>(is_norm ? 1 + random.symmetric(0.3) : random.symmetric(scale));
    }
    made.source.tensors[tensor.name] = {tensor.shape, std::move(values)};
  }
  made.starts = {0};
  for (size_t document = random.between(3, 5); document-- > 0;) {
    const size_t length = random.between(document == 0 ? 6 : 1, 9);
    for (size_t i = 0; i < length; ++i) {
      made.tokens.push_back(static_cast<int32_t>(random.between(0, config.vocab_size - 1)));
      const bool is_trained = random.uniform() < 0.7 || i + 1 == length;
      made.targets.push_back(
          is_trained ? static_cast<int32_t>(random.between(0, config.vocab_size - 1)) : kUntrained);
    }
    made.starts.push_back(static_cast<int32_t>(made.tokens.size()));
  }
  return made;
}

// Odd shapes on purpose; the window is shorter than the longest document, documents are three and
// more.
inline Case random_case(uint64_t seed) {
  Random random(seed);
  ModelConfig config;
  config.family = "llama";
  config.num_kv_heads = random.between(1, 3);
  config.num_heads = config.num_kv_heads * random.between(1, 3);
  config.head_size = 2 * random.between(2, 9);
  config.hidden_size = random.between(13, 37);
  config.intermediate_size = random.between(17, 51);
  config.vocab_size = random.between(23, 61);
  config.num_layers = random.between(2, 3);
  config.max_position_embeddings = 64;
  config.rms_norm_epsilon = 1e-5;
  config.rotary_theta = 10000;
  config.sliding_window = seed % 2 == 0 ? random.between(2, 4) : 0;
  config.qkv_bias = seed % 3 == 0;
  config.qk_norm = seed % 3 == 1;
  config.tie_word_embeddings = seed % 2 == 0;
  return filled_case(config, random, 0.4);
}

// Widths that an fp8 base takes. As in a trained model a layer adds little to what it is given, so
// that its rounding does too.
inline Case even_case(uint64_t seed) {
  Random random(seed);
  ModelConfig config;
  config.family = "llama";
  config.num_kv_heads = random.between(1, 2);
  config.num_heads = config.num_kv_heads * random.between(1, 3);
  config.head_size = 16;
  config.hidden_size = 16 * random.between(2, 5);
  config.intermediate_size = 16 * random.between(2, 7);
  config.vocab_size = random.between(23, 61);
  config.num_layers = random.between(2, 3);
  config.max_position_embeddings = 64;
  config.rms_norm_epsilon = 1e-5;
  config.rotary_theta = 10000;
  config.qkv_bias = seed % 3 == 0;
  config.qk_norm = seed % 3 == 1;
  config.tie_word_embeddings = seed % 2 == 0;
  Case made = filled_case(config, random, 0.1);
  for (float& value : made.source.tensors["model.embed_tokens.weight"].second) value *= 4;
  return made;
}

using Modules = std::vector<std::string>;  // none: full fine-tuning
inline const Modules kAllModules = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                    "gate_proj", "up_proj", "down_proj"};

inline TrainSpec spec_of(const Case& from, Modules modules) {
  TrainSpec spec;
  spec.is_full = modules.empty();
  if (!spec.is_full) spec.lora = {3, 7, std::move(modules), false};
  spec.seed = 5;
  spec.tokens_per_micro_batch = from.tokens.size();
  spec.longest_document = 9;
  spec.loss_chunk_rows = 5;
  spec.beta1 = 0.9;
  spec.beta2 = 0.999;
  spec.epsilon = 1e-8f;
  spec.num_contribution_slots = 1;
  spec.slice_blocks = 8;
  spec.chunk_blocks = 4;
  return spec;
}

struct Choice {
  int num_threads = 2;
  const char* path = "auto";
  const TmBackend* backend = tm_cpu_backend();
  TmPrecision precision = TM_FP32;
  bool records_calls = true;
};

inline std::unique_ptr<Engine> engine_of(const Case& from, Choice choice = {}) {
  EngineOptions options;
  options.config = from.config;
  options.device.num_threads = choice.num_threads;
  options.device.instruction_path = choice.path;
  options.device.precision = choice.precision;
  options.device.records_calls = choice.records_calls;
  auto engine = std::make_unique<Engine>(choice.backend, options,
                                         std::make_unique<MemorySource>(from.source));
  engine->load();
  return engine;
}

// Of slot 0, by its slices' digests.
inline bool same_contribution(Engine& a, Engine& b) {
  for (size_t slice = 0; slice < a.exchange()->num_slices(); ++slice) {
    const uint64_t digest = a.exchange()->measure_contribution(0, slice).digest;
    if (digest != b.exchange()->measure_contribution(0, slice).digest) return false;
  }
  return true;
}

// Gives the adapter a B by one AdamW step away from zero along its own gradient.
inline void move_adapter(Engine& engine, const Case& from, float learning_rate = 0.1f) {
  ExchangeBuffers& exchange = *engine.exchange();
  engine.micro_batch(from.batch(), static_cast<double>(from.num_targets()), 0);
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    exchange.clear_sum(slice);
    exchange.add_own_contribution(0, slice);
    exchange.finish_slice(1, slice);
  }
  AdamWNumbers numbers = {};
  numbers.learning_rate = learning_rate;
  numbers.clip_factor = 1;
  numbers.bias_correction1 = 0.1f;
  numbers.bias_correction2_sqrt = std::sqrt(0.001f);
  engine.apply_update(1, numbers);
  exchange.clear_slot(0);
}

}  // namespace tunemesh::test
