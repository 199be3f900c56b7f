// Steps whose parts are recorded and launched give the bits of steps issued call by call: losses,
// gradients, weights after updates; for LoRA and full fine-tuning, alone and in a mesh, while
// document layouts, trained rows and token counts change from one micro-batch to the next.
//
//   recorded_steps_test [tunemesh_cuda.so]   without a GPU by a host's table that records; where
//                                            there is a card, its graphs too, in float32 and bf16
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "cuda_device.h"
#include "engine/engine.h"
#include "engine_case.h"
#include "host_groups.h"
#include "recording_backend.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

using Lengths = std::vector<size_t>;

// A micro-batch of random tokens in documents of these lengths; some rows are trained.
Case batch_of(const Case& model, const Lengths& lengths, uint64_t seed) {
  Random random(seed);
  Case made;
  made.starts = {0};
  const size_t vocabulary = model.config.vocab_size;
  const double share = 0.2 + 0.7 * random.uniform();
  for (const size_t length : lengths) {
    for (size_t i = 0; i < length; ++i) {
      made.tokens.push_back(static_cast<int32_t>(random.between(0, vocabulary - 1)));
      const bool is_trained = random.uniform() < share || i == 0;
      made.targets.push_back(is_trained ? static_cast<int32_t>(random.between(0, vocabulary - 1))
                                        : kUntrained);
    }
    made.starts.push_back(static_cast<int32_t>(made.tokens.size()));
  }
  return made;
}

bool same_bits(const std::vector<TensorValues>& a, const std::vector<TensorValues>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].name != b[i].name || a[i].values.size() != b[i].values.size()) return false;
    if (std::memcmp(a[i].values.data(), b[i].values.data(), a[i].values.size() * sizeof(float))) {
      return false;
    }
  }
  return true;
}

AdamWNumbers numbers_of(size_t step, double sum_squares) {
  AdamWNumbers numbers = {};
  numbers.learning_rate = 1e-2f;
  numbers.clip_factor = static_cast<float>(std::fmin(1.0, 1.0 / (std::sqrt(sum_squares) + 1e-6)));
  numbers.bias_correction1 = static_cast<float>(1 - std::pow(0.9, static_cast<double>(step)));
  numbers.bias_correction2_sqrt =
      static_cast<float>(std::sqrt(1 - std::pow(0.999, static_cast<double>(step))));
  return numbers;
}

struct Steps {
  Case model;
  TrainSpec spec;
  std::vector<Lengths> layouts;  // of the micro-batches, in turn
  size_t num_steps;
  std::string name;
  size_t accumulation = 1;  // micro-batches of a local step
};

// `Both`: an engine that records, and one that does not.
struct Both {
  std::unique_ptr<Engine> recorded, direct;
};
Both engines_of(const Steps& steps, Choice recording, Choice direct) {
  Both both = {engine_of(steps.model, recording), engine_of(steps.model, direct)};
  both.recorded->prepare(steps.spec);
  both.direct->prepare(steps.spec);
  return both;
}

double step_of(Engine& engine, const std::vector<Case>& batches, size_t step) {
  double loss = 0;
  for (const Case& batch : batches) {
    const double divisor = static_cast<double>(batches.size() * batch.num_targets());
    loss += engine.local_micro_batch(batch.batch(), divisor).loss_sum;
  }
  engine.apply_local_update(step, numbers_of(step, engine.local_sum_squares()));
  return loss;
}

// Whole steps of one worker: the backward is one part.
void test_local(Steps steps, const Choice& recording, const Choice& direct) {
  steps.spec.is_local = true;
  steps.spec.local_micro_batches = steps.accumulation;
  const Both both = engines_of(steps, recording, direct);
  for (size_t step = 1; step <= steps.num_steps; ++step) {
    std::vector<Case> batches;
    for (size_t i = 0; i < steps.accumulation; ++i) {
      const size_t layout = (step + i) % steps.layouts.size();
      batches.push_back(batch_of(steps.model, steps.layouts[layout], 1000 * (i + 1) + step));
    }
    const std::string what = steps.name + ", local step " + std::to_string(step);
    CHECK(step_of(*both.recorded, batches, step) == step_of(*both.direct, batches, step),
          what + ": another loss");
    CHECK(same_bits(both.recorded->weights(), both.direct->weights()), what + ": other weights");
  }
  const Case batch = batch_of(steps.model, steps.layouts[0], 7);
  CHECK(both.recorded->evaluate(batch.batch()).loss_sum ==
            both.direct->evaluate(batch.batch()).loss_sum,
        steps.name + ": another loss of an evaluation");
  CHECK(both.recorded->logits(batch.batch()) == both.direct->logits(batch.batch()),
        steps.name + ": other logits");
}

// A worker of a mesh: each layer's gradient leaves as soon as it stands. An update after every
// third micro-batch.
void test_mesh(const Steps& steps, const Choice& recording, const Choice& direct) {
  const Both both = engines_of(steps, recording, direct);
  for (size_t step = 1; step <= steps.num_steps; ++step) {
    const Case batch =
        batch_of(steps.model, steps.layouts[step % steps.layouts.size()], 2000 + step);
    const std::string what = steps.name + ", micro-batch " + std::to_string(step);
    const double divisor = static_cast<double>(batch.num_targets());
    const double loss = both.direct->micro_batch(batch.batch(), divisor, 0).loss_sum;
    CHECK(both.recorded->micro_batch(batch.batch(), divisor, 0).loss_sum == loss,
          what + ": another loss");
    CHECK(same_contribution(*both.recorded, *both.direct), what + ": other sums");
    if (step % 3 != 0) continue;
    for (Engine* engine : {both.recorded.get(), both.direct.get()}) {
      move_adapter(*engine, batch, 0.01f);
    }
    CHECK(same_bits(both.recorded->weights(), both.direct->weights()), what + ": other weights");
  }
}

Steps small_steps(uint64_t seed, std::vector<std::string> modules) {
  Steps steps;
  steps.model = random_case(seed);
  steps.name = "seed " + std::to_string(seed) + (modules.empty() ? ", full" : ", LoRA");
  steps.spec = spec_of(steps.model, std::move(modules));
  steps.spec.tokens_per_micro_batch = 24;
  steps.layouts = {{9, 8, 7}, {3, 1, 9, 2, 9}, {9, 9}, {1, 2, 3, 4, 5, 9}};
  steps.num_steps = 9;
  return steps;
}

void test_host(const TmBackend* host, uint64_t seed, const std::vector<std::string>& modules) {
  const Choice direct = {1, "auto", host};
  const Choice recorded = {1, "auto", recording_backend(host)};
  const Steps steps = small_steps(seed, modules);
  recording.num_launched = 0;
  test_local(steps, recorded, direct);
  CHECK(recording.num_launched > 0, steps.name + ": nothing was launched in local steps");
  Steps summed = steps;
  summed.accumulation = 2;
  summed.name += ", 2 micro-batches";
  test_local(summed, recorded, direct);
  recording.num_launched = 0;
  test_mesh(steps, recorded, direct);
  CHECK(recording.num_launched > 0, steps.name + ": nothing was launched in a mesh");
}

// What could not be recorded is issued once more, and the bits stay.
void test_failures() {
  const Choice direct = {1, "auto", host_group_backend()};
  const Choice recorded = {1, "auto", recording_backend(host_group_backend())};
  recording.num_failed = 0;
  recording.num_failures_left = 2;
  test_local(small_steps(3, {"q_proj", "down_proj"}), recorded, direct);
  CHECK(recording.num_failed == 2, "recordings did not fail as they were told to");
}

// Heads and lengths that cuDNN serves; two layouts of one bucket each, and equal documents.
Steps card_steps(std::vector<std::string> modules) {
  Steps steps;
  steps.model = random_case(2);
  ModelConfig& config = steps.model.config;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_size = 64;
  config.hidden_size = 136;
  config.intermediate_size = 200;
  config.vocab_size = 328;
  config.num_layers = 2;
  config.sliding_window = 0;
  config.qkv_bias = true;
  config.max_position_embeddings = 512;
  steps.model.source.tensors.clear();
  Random random(5);
  for (const TensorShape& tensor : model_tensors(config)) {
    std::vector<float> values(tensor.num_elements());
    const bool is_norm = tensor.name.find("norm") != std::string::npos;
    for (float& value : values) {
      value = static_cast<float>(is_norm ? 1 + random.symmetric(0.3) : random.symmetric(0.15));
    }
    steps.model.source.tensors[tensor.name] = {tensor.shape, std::move(values)};
  }
  steps.name = modules.empty() ? "full" : "LoRA";
  steps.spec = spec_of(steps.model, std::move(modules));
  steps.spec.lora.rank = 8;  // which the card's own kernels take
  steps.spec.tokens_per_micro_batch = 384;
  steps.spec.longest_document = 384;
  steps.spec.loss_chunk_rows = 100;
  steps.spec.slice_blocks = 512;
  steps.spec.chunk_blocks = 128;
  steps.layouts = {
      {128, 128, 128}, {60, 60, 60, 60, 60, 84}, {100, 150, 134},          {80, 80, 80, 80, 64},
      {90, 134, 160},  {128, 128, 128},          {84, 60, 60, 60, 60, 60}, {150, 100, 50}};
  steps.num_steps = 24;
  return steps;
}

void test_cuda(const std::string& path) {
  const TmBackend* const backend = cuda_backend_or_skip(path);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    const Choice recorded = {0, "auto", backend, precision};
    const Choice direct = {0, "auto", backend, precision, false};
    for (const auto& modules : {kAllModules, Modules{}}) {
      Steps steps = card_steps(modules);
      steps.name = std::string(precision == TM_BF16 ? "cuda bf16, " : "cuda fp32, ") + steps.name;
      test_local(steps, recorded, direct);
      Steps summed = steps;
      summed.accumulation = 3;
      summed.name += ", 3 micro-batches";
      test_local(summed, recorded, direct);
      if (!modules.empty()) test_mesh(steps, recorded, direct);
      std::printf("%s: done\n", steps.name.c_str());
    }
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  for (const tunemesh::test::Choice& host : {Choice{}, Choice{2, "auto", host_group_backend()}}) {
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      test_host(host.backend, seed, kAllModules);
      test_host(host.backend, seed, {});
    }
  }
  test_failures();
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  test_cuda(argc > 1 ? argv[1] : here.parent_path() / "native" / "tunemesh_cuda.so");
  return finish("recorded_steps_test");
}
