// Engines that train with bf16 weights and moments, and their steps.
#pragma once
#include <cmath>
#include <memory>

#include "engine_case.h"
#include "half_backend.h"

namespace tunemesh::test {

// Whose products read the half weights where they lie.
inline std::unique_ptr<Engine> half_engine(const Case& made, bool has_groups) {
  return engine_of(made, {2, "auto", half_backend(has_groups), TM_BF16});
}

inline TrainSpec half_spec(const Case& made) {
  TrainSpec spec = spec_of(made, {});
  spec.has_half_states = true;
  spec.seed = 0x123456789abcdefull;
  spec.weight_decay = 0.01f;
  return spec;
}

inline AdamWNumbers numbers_of(size_t step, float learning_rate) {
  AdamWNumbers numbers = {};
  numbers.learning_rate = learning_rate;
  numbers.clip_factor = 0.9f;
  const auto exponent = static_cast<double>(step);
  numbers.bias_correction1 = static_cast<float>(1 - std::pow(0.9, exponent));
  numbers.bias_correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(0.999, exponent)));
  return numbers;
}

// The published gradient of a step, made by this engine.
inline void publish(Engine& engine, const Case& made, size_t step) {
  ExchangeBuffers& exchange = *engine.exchange();
  exchange.clear_slot(0);
  engine.micro_batch(made.batch(), static_cast<double>(made.num_targets()), 0);
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    exchange.clear_sum(slice);
    exchange.add_own_contribution(0, slice);
    exchange.finish_slice(step, slice);
  }
}

}  // namespace tunemesh::test
