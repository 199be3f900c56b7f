// Stochastic rounding: right in the mean, and twenty steps of training stay close to float64 where
// rounding to nearest does not.
#include <bit>
#include <cmath>
#include <cstdio>
#include <map>

#include "half_case.h"
#include "kernels/stochastic_rounding.h"
#include "reference_model.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

// A mean over many draws is the value; what bf16 holds stays.
void test_rounding() {
  for (const float value : {1.0f + 0x1p-9f, -0.3001f, 1e-39f, 3.1e38f}) {
    double sum = 0;
    constexpr uint32_t kDraws = 65536;
    for (uint32_t noise = 0; noise < kDraws; ++noise) {
      sum += widened(stochastic_bfloat16(std::bit_cast<uint32_t>(value), noise));
    }
    CHECK_BELOW(std::fabs(sum / kDraws / value - 1), 1e-6, "mean of " + std::to_string(value));
  }
  for (const uint16_t bits : {0x0000, 0x8000, 0x3f80, 0x0001, 0x7f7f, 0x7f80, 0xff80, 0x7fc1}) {
    for (const uint32_t noise : {0u, 0x7fffu, 0xffffu}) {
      CHECK(stochastic_bfloat16(uint32_t{bits} << 16, noise) == bits, "bf16 numbers stay");
    }
  }
  CHECK(stochastic_bfloat16(0x7f7fffffu, 1) == 0x7f80, "above the largest: infinity");
  CHECK(stochastic_bfloat16(0xffffffffu, 0xffff) == 0xffff, "NaN stays NaN");
}

// AdamW of a model in float64.
struct Exact {
  ReferenceModel model;
  std::map<std::string, Values> m, v;

  const bool rounds;  // states are stored as the nearest bf16, vectors excepted as in the engine

  Exact(const Case& from, bool is_rounded) : model(from.config, LoraSpec{}), rounds(is_rounded) {
    for (const auto& [name, tensor] : from.source.tensors) {
      model.weights[name] = Values(tensor.second.begin(), tensor.second.end());
      m[name].resize(tensor.second.size());
      v[name].resize(tensor.second.size());
    }
  }
  void step(const Case& made, size_t step, double learning_rate) {
    model.backward(made.batch(), static_cast<double>(made.num_targets()));
    const double correction1 = 1 - std::pow(0.9, static_cast<double>(step));
    const double correction2 = 1 - std::pow(0.999, static_cast<double>(step));
    for (auto& [name, weights] : model.weights) {
      const bool is_rounded = rounds && made.source.tensors.at(name).first.size() > 1;
      const auto stored = [&](double value) {
        return is_rounded ? widened(narrowed(static_cast<float>(value))) : value;
      };
      for (size_t i = 0; i < weights.size(); ++i) {
        const double g = model.grads[name][i];
        const double first = 0.9 * m[name][i] + 0.1 * g;
        const double second = 0.999 * v[name][i] + 0.001 * g * g;
        const double move = first / correction1 / (std::sqrt(second / correction2) + 1e-8);
        weights[i] = stored(weights[i] - learning_rate * move);
        m[name][i] = stored(first);
        v[name][i] = stored(second);
      }
    }
  }
  double loss(const Case& made) {
    return model.loss(made.batch(), static_cast<double>(made.num_targets()));
  }
};

// A model that bf16 holds, of a few thousand weights.
Case trial_case(uint64_t seed) {
  Case made = random_case(seed);
  for (auto& [name, tensor] : made.source.tensors) {
    for (float& value : tensor.second) value = widened(narrowed(value));
  }
  return made;
}

// Updates of 2e-4 beside weights of 0.2, whose neighbours in bf16 are 1e-3 apart.
void test_trial(bool has_bytes) {
  constexpr double kLearningRate = 2e-4;
  constexpr size_t kSteps = 20;
  double stochastic_error = 0, nearest_error = 0;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    const Case made = trial_case(seed);
    const auto divisor = static_cast<double>(made.num_targets());
    TrainSpec spec = half_spec(made);
    spec.weight_decay = 0;
    spec.has_byte_moments = has_bytes;
    const auto engine = engine_of(made);
    engine->prepare(spec);
    Exact exact(made, false), plain(made, true);
    const double start = exact.loss(made);
    for (size_t step = 1; step <= kSteps; ++step) {
      publish(*engine, made, step);
      AdamWNumbers numbers = numbers_of(step, static_cast<float>(kLearningRate));
      numbers.clip_factor = 1;
      engine->apply_update(step, numbers);
      exact.step(made, step, kLearningRate);
      plain.step(made, step, kLearningRate);
    }
    const double wanted = exact.loss(made);
    const double stochastic = engine->evaluate(made.batch()).loss_sum / divisor;
    std::printf("trial, seed %zu: loss %.5f to %.5f; stochastic %+.3f %%, nearest %+.3f %%\n",
                static_cast<size_t>(seed), start, wanted, 100 * (stochastic / wanted - 1),
                100 * (plain.loss(made) / wanted - 1));
    stochastic_error += std::fabs(stochastic / wanted - 1) / 6;
    nearest_error += std::fabs(plain.loss(made) / wanted - 1) / 6;
  }
  std::printf("trial%s, mean: stochastic %.3f %%, nearest %.3f %% off float64\n",
              has_bytes ? ", 8-bit moments" : "", 100 * stochastic_error, 100 * nearest_error);
  CHECK_BELOW(stochastic_error, 3e-3, "stochastic rounding after 20 steps, against float64");
  CHECK(nearest_error > 3 * stochastic_error, "rounding to nearest is not worse");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  test_rounding();
  for (const bool has_bytes : {false, true}) test_trial(has_bytes);
  return finish("half_trial_test");
}
