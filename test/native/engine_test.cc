// The engine's analytic gradients against a float64 model, whose own backward is checked by finite
// differences; the same bits whatever threads and instruction path; plan, arena and error
// behaviour.
#include "engine/engine.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine/philox.h"
#include "reference_model.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

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

// Odd shapes on purpose; the window is shorter than the longest document, documents are three and
// more.
Case random_case(uint64_t seed) {
  Random random(seed);
  Case made;
  ModelConfig& config = made.config;
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
  for (const TensorShape& tensor : model_tensors(config)) {
    std::vector<float> values(tensor.num_elements());
    const bool is_norm = tensor.name.find("norm") != std::string::npos;
    for (float& value : values) {
      value = static_cast<float>(is_norm ? 1 + random.symmetric(0.3) : random.symmetric(0.4));
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

TrainSpec spec_of(const Case& from, std::vector<std::string> modules) {
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
};

std::unique_ptr<Engine> engine_of(const Case& from, Choice choice = {}) {
  EngineOptions options;
  options.config = from.config;
  options.num_threads = choice.num_threads;
  options.instruction_path = choice.path;
  auto engine = std::make_unique<Engine>(tm_cpu_backend(), options,
                                         std::make_unique<MemorySource>(from.source));
  engine->load();
  return engine;
}

// The same weights in float64. Adapters are the engine's own, with a B that is not zero.
ReferenceModel reference_of(const Case& from, const TrainSpec& spec, const Engine& engine) {
  ReferenceModel model(from.config, spec.is_full ? LoraSpec{} : spec.lora);
  for (const auto& [name, tensor] : from.source.tensors) {
    model.weights[name] = Values(tensor.second.begin(), tensor.second.end());
  }
  if (spec.is_full) return model;
  for (const TensorValues& tensor : engine.weights()) {
    model.weights[tensor.name] = Values(tensor.values.begin(), tensor.values.end());
  }
  return model;
}

// Gives the adapter a B by one AdamW step away from zero along its own gradient.
void move_adapter(Engine& engine, const Case& from) {
  ExchangeBuffers& exchange = *engine.exchange();
  engine.micro_batch(from.batch(), static_cast<double>(from.num_targets()), 0);
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    exchange.clear_sum(slice);
    exchange.add_own_contribution(0, slice);
    exchange.finish_slice(1, slice);
  }
  AdamWNumbers numbers = {};
  numbers.learning_rate = 0.1f;
  numbers.clip_factor = 1;
  numbers.bias_correction1 = 0.1f;
  numbers.bias_correction2_sqrt = std::sqrt(0.001f);
  engine.apply_update(1, numbers);
  exchange.clear_slot(0);
}

double norm(const Values& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

// Fourth-order central difference along a random direction in one tensor.
void check_finite_difference(ReferenceModel& model, const Case& from, const std::string& name) {
  Random random(99);
  const double divisor = static_cast<double>(from.num_targets());
  Values direction(model.weights[name].size());
  for (double& value : direction) value = random.symmetric(1);
  const double length = norm(direction);
  double analytic = 0;
  for (size_t i = 0; i < direction.size(); ++i) {
    direction[i] /= length;
    analytic += direction[i] * model.grads[name][i];
  }
  const Values start = model.weights[name];
  auto loss_at = [&](double distance) {
    for (size_t i = 0; i < start.size(); ++i) {
      model.weights[name][i] = start[i] + distance * direction[i];
    }
    return model.loss(from.batch(), divisor);
  };
  const double h = 1e-3;
  const double numeric =
      (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h);
  model.weights[name] = start;
  // Relative to the tensor's gradient: along a direction nearly at right angles the quotient is
  // noise.
  const double scale = std::max(std::fabs(analytic), norm(model.grads[name]) * 1e-2) + 1e-9;
  CHECK_BELOW(std::fabs(numeric - analytic) / scale, 1e-6, "finite difference of " + name);
}

void test_gradients(uint64_t seed, const std::vector<std::string>& modules) {
  const Case made = random_case(seed);
  const TrainSpec spec = spec_of(made, modules);
  const auto engine = engine_of(made);
  engine->prepare(spec);
  if (!spec.is_full) move_adapter(*engine, made);
  ReferenceModel model = reference_of(made, spec, *engine);
  const double divisor = static_cast<double>(made.num_targets());
  const double loss = model.backward(made.batch(), divisor);
  const double engine_loss = engine->evaluate(made.batch()).loss_sum / divisor;
  CHECK_BELOW(std::fabs(engine_loss - loss) / loss, 1e-6, "loss of seed " + std::to_string(seed));
  for (const TensorValues& found : engine->gradients(made.batch(), divisor)) {
    const Values& wanted = model.grads[found.name];
    Values difference(wanted.size());
    for (size_t i = 0; i < wanted.size(); ++i) difference[i] = found.values[i] - wanted[i];
    // Float32 through a few layers; a wrong term would be off by orders more.
    CHECK_BELOW(norm(difference) / (norm(wanted) + 1e-7), 2e-5,
                "gradient of " + found.name + ", seed " + std::to_string(seed));
    check_finite_difference(model, made, found.name);
  }
}

bool same_bits(const std::vector<TensorValues>& a, const std::vector<TensorValues>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const size_t bytes = a[i].values.size() * sizeof(float);
    if (std::memcmp(a[i].values.data(), b[i].values.data(), bytes) != 0) return false;
  }
  return a.size() == b.size();
}

void test_same_bits() {
  const Case made = random_case(8);
  const std::vector<std::string> all = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                        "gate_proj", "up_proj", "down_proj"};
  for (const bool is_full : {true, false}) {
    const TrainSpec spec = spec_of(made, is_full ? std::vector<std::string>{} : all);
    std::vector<TensorValues> first;
    std::vector<float> first_logits;
    for (const Choice choice : {Choice{1, "auto"}, Choice{2, "auto"}, Choice{3, "auto"},
                                Choice{2, "generic"}, Choice{2, "avx2"}, Choice{2, "avx512"}}) {
      std::unique_ptr<Engine> engine;
      try {
        engine = engine_of(made, choice);
      } catch (const EngineError& error) {
        std::printf("skipped: %s: %s\n", choice.path, error.what());
        continue;
      }
      engine->prepare(spec);
      const auto gradients = engine->gradients(made.batch(), 3);
      const auto logits = engine->logits(made.batch());
      if (first.empty()) {
        first = gradients;
        first_logits = logits;
      }
      const std::string what = std::to_string(choice.num_threads) + " threads, " + choice.path;
      CHECK(same_bits(first, gradients), "gradients differ with " + what);
      CHECK(std::memcmp(first_logits.data(), logits.data(), logits.size() * 4) == 0,
            "logits differ with " + what);
    }
  }
}

void test_plan_and_errors() {
  Case made = random_case(3);
  const TrainSpec spec = spec_of(made, {"q_proj"});
  const auto engine = engine_of(made);
  const MemoryPlan planned = engine->plan(spec);
  const MemoryPlan reserved = engine->prepare(spec);
  CHECK(planned.total_bytes == reserved.total_bytes, "plan() differs from what was reserved");
  CHECK(planned.uses.size() == reserved.uses.size(), "plan() lists other purposes");

  const Device& device = engine->device();
  Arena arena(device);
  arena.take<float>("test", 100);
  arena.allocate();
  arena.take<float>("test", 100);
  arena.seal();
  CHECK_THROWS(arena.take<float>("test", 1), "INTERNAL", "sealed");

  made.source.tensors["model.layers.1.mlp.up_proj.weight"].second[3] = NAN;
  const auto broken = engine_of(made);
  broken->prepare(spec);
  CHECK_THROWS(broken->micro_batch(made.batch(), 1, 0), "NON_FINITE_GRADIENT", "q_proj");
  CHECK(broken->exchange()->is_poisoned(0), "the slot of a non-finite gradient stays usable");

  TokenBatch batch = made.batch();
  const std::vector<int32_t> untrained(batch.num_tokens, kUntrained);
  batch.targets = untrained.data();
  for (const TensorValues& tensor : engine->gradients(batch, 1)) {
    for (const float value : tensor.values) CHECK(value == 0, "an untrained batch has a gradient");
  }
  std::vector<int32_t> tokens = made.tokens;
  tokens[2] = static_cast<int32_t>(made.config.vocab_size);
  batch.tokens = tokens.data();
  CHECK_THROWS(engine->evaluate(batch), "DATA_INVALID", "vocabulary");

  made.source.tensors["model.norm.weight"].first[0] += 1;
  CHECK_THROWS(engine_of(made), "MODEL_INVALID", "model.norm.weight");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    test_gradients(seed, {});
    test_gradients(seed,
                   {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"});
  }
  // Where backward may stop early in the first layer.
  for (const char* module : {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}) {
    test_gradients(7, {module});
  }
  test_same_bits();
  test_plan_and_errors();
  return finish("engine_test");
}
