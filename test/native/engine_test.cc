// The engine's analytic gradients against a float64 model, whose own backward is checked by finite
// differences; the same bits whatever threads and instruction path; plan, arena and error
// behaviour.
#include "engine/engine.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "engine_case.h"
#include "reference_model.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

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
  for (const bool is_full : {true, false}) {
    const TrainSpec spec = spec_of(made, is_full ? Modules{} : kAllModules);
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

// One update of each tensor by the backend's AdamW alone, from zero moments.
void check_updated(const std::vector<TensorValues>& before,
                   const std::vector<TensorValues>& gradients, const Engine& engine,
                   const AdamWNumbers& numbers) {
  const Device& device = engine.device();
  const std::vector<TensorValues> after = engine.weights();
  for (size_t i = 0; i < before.size(); ++i) {
    std::vector<float> p = before[i].values, m(p.size()), v(p.size());
    TmTrainedTensor tensor = {};
    tensor.p = p.data();
    tensor.m = m.data();
    tensor.v = v.data();
    tensor.n = tensor.columns = tensor.p_stride = p.size();
    TmAdamW call = {};
    call.tensors = call.host_tensors = &tensor;
    call.num_tensors = 1;
    call.num_blocks = (p.size() + 255) / 256;
    call.gradient = gradients[i].values.data();
    call.learning_rate = numbers.learning_rate;
    call.clip_factor = numbers.clip_factor;
    call.bias_correction1 = numbers.bias_correction1;
    call.bias_correction2_sqrt = numbers.bias_correction2_sqrt;
    call.beta1 = 0.9;
    call.beta2 = 0.999;
    call.epsilon = 1e-8f;
    TM_RUN(device, adamw, &call);
    CHECK(std::memcmp(p.data(), after[i].values.data(), p.size() * sizeof(float)) == 0,
          "local update of " + before[i].name + " differs from AdamW of its gradient");
  }
}

void test_local_mode(uint64_t seed, const std::vector<std::string>& modules) {
  const Case made = random_case(seed);
  const double divisor = static_cast<double>(made.num_targets());
  TrainSpec spec = spec_of(made, modules);
  const auto meshed = engine_of(made);
  const MemoryPlan meshed_plan = meshed->prepare(spec);
  spec.is_local = true;
  spec.num_contribution_slots = 0;
  const auto engine = engine_of(made);
  const MemoryPlan planned = engine->plan(spec);
  const MemoryPlan reserved = engine->prepare(spec);
  CHECK(planned.total_bytes == reserved.total_bytes, "plan() of local mode was not reserved");
  CHECK(planned.total_bytes < meshed_plan.total_bytes, "local mode plans the exchange's memory");

  const auto gradients = meshed->gradients(made.batch(), divisor);
  const auto before = engine->weights();
  const MicroBatchResult result = engine->local_micro_batch(made.batch(), divisor);
  CHECK(result.loss_sum == engine->evaluate(made.batch()).loss_sum, "loss of local mode");
  double squares = 0;
  for (const TensorValues& tensor : gradients) {
    for (const float value : tensor.values) squares += double{value} * double{value};
  }
  // Two orders of the same float64 sum.
  CHECK_BELOW(std::fabs(engine->local_sum_squares() - squares) / squares, 1e-12, "norm");
  AdamWNumbers numbers = {};
  numbers.learning_rate = 0.1f;
  numbers.clip_factor = 0.5f;
  numbers.bias_correction1 = 0.1f;
  numbers.bias_correction2_sqrt = std::sqrt(0.001f);
  engine->apply_local_update(1, numbers);
  check_updated(before, gradients, *engine, numbers);

  CHECK_THROWS(engine->exchange(), "STATE_CONFLICT", "local mode");
  CHECK_THROWS(engine->micro_batch(made.batch(), 1, 0), "STATE_CONFLICT", "local mode");
  CHECK_THROWS(meshed->local_micro_batch(made.batch(), 1), "STATE_CONFLICT", "local mode");
}

void test_local_non_finite() {
  Case made = random_case(3);
  made.source.tensors["model.layers.1.mlp.up_proj.weight"].second[3] = NAN;
  TrainSpec spec = spec_of(made, {"q_proj"});
  spec.is_local = true;
  const auto engine = engine_of(made);
  engine->prepare(spec);
  engine->local_micro_batch(made.batch(), 1);
  CHECK_THROWS(engine->local_sum_squares(), "NON_FINITE_GRADIENT", "not finite");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    test_gradients(seed, {});
    test_gradients(seed, kAllModules);
  }
  // Where backward may stop early in the first layer.
  for (const char* module : {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}) {
    test_gradients(7, {module});
  }
  test_same_bits();
  test_plan_and_errors();
  test_local_mode(1, {});
  test_local_mode(2, {"q_proj", "v_proj", "down_proj"});
  test_local_non_finite();
  return finish("engine_test");
}
