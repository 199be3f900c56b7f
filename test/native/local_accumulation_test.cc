// Local steps of several micro-batches (TrainSpec::local_micro_batches): their gradients are added
// on the device in their order. The sum is that of one micro-batch with all documents, within
// float32's rounding; the same bits again, with any number of threads, recorded or not.
//
//   local_accumulation_test [tunemesh_cuda.so]   where there is a card, on it too
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "cuda_device.h"
#include "half_case.h"
#include "host_groups.h"
#include "recording_backend.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

// Document `d` as a micro-batch of its own.
struct Document {
  Document(const Case& from, size_t d)
      : first(static_cast<size_t>(from.starts[d])),
        starts{0, from.starts[d + 1] - from.starts[d]},
        batch{from.tokens.data() + first, from.targets.data() + first,
              static_cast<size_t>(starts[1]), starts.data(), 1} {}
  Document(const Document&) = delete;
  size_t first;
  std::vector<int32_t> starts;
  TokenBatch batch;
};

size_t num_documents(const Case& made) { return made.starts.size() - 1; }

TrainSpec local_spec(const Case& made, const Modules& modules, size_t micro_batches) {
  TrainSpec spec = spec_of(made, modules);
  spec.is_local = true;
  spec.local_micro_batches = micro_batches;
  return spec;
}

// Moves each weight by its gradient, nearly: epsilon is far above the gradient.
AdamWNumbers along_gradient() {
  AdamWNumbers numbers = {};
  numbers.learning_rate = 1e3f;
  numbers.clip_factor = 1;
  numbers.bias_correction1 = 0.1f;
  numbers.bias_correction2_sqrt = std::sqrt(0.001f);
  return numbers;
}

// One step, document by document. Answers the sum of the losses.
double step_by_documents(Engine& engine, const Case& made, size_t step,
                         const AdamWNumbers& numbers) {
  const auto divisor = static_cast<double>(made.num_targets());
  double loss = 0;
  for (size_t d = 0; d < num_documents(made); ++d) {
    loss += engine.local_micro_batch(Document(made, d).batch, divisor).loss_sum;
  }
  engine.local_sum_squares();
  engine.apply_local_update(step, numbers);
  return loss;
}

std::vector<float> all_weights(const Engine& engine) {
  std::vector<float> all;
  for (const TensorValues& tensor : engine.weights()) {
    all.insert(all.end(), tensor.values.begin(), tensor.values.end());
  }
  return all;
}

// |a - b| beside |a - start|
double difference(const std::vector<float>& a, const std::vector<float>& b,
                  const std::vector<float>& start) {
  double error = 0, moved = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    error += std::pow(double{a[i]} - double{b[i]}, 2);
    moved += std::pow(double{a[i]} - double{start[i]}, 2);
  }
  return std::sqrt(error / moved);
}

void check_refusals(Engine& engine, const Case& made) {
  const auto divisor = static_cast<double>(made.num_targets());
  for (size_t d = 0; d < num_documents(made); ++d) {
    engine.local_micro_batch(Document(made, d).batch, divisor);
  }
  CHECK_THROWS(engine.local_micro_batch(Document(made, 0).batch, divisor), "STATE_CONFLICT",
               "apply its update first");
}

// Of a sum in another order: float32's rounding, some sums in double.
constexpr double kTolerance = 2e-5;

// The sum against one micro-batch of all documents: norm, loss and the step that follows.
void test_sum(const Case& made, const Modules& modules, const TmBackend* backend) {
  const std::string what = std::string(backend->name) + ", hidden " +
                           std::to_string(made.config.hidden_size) +
                           (modules.empty() ? ", full" : ", LoRA");
  const Choice choice = {2, "auto", backend};
  const auto divisor = static_cast<double>(made.num_targets());
  const auto whole = engine_of(made, choice), parts = engine_of(made, choice);
  TrainSpec spec = local_spec(made, modules, 1);
  spec.epsilon = 1e3f;
  whole->prepare(spec);
  spec.local_micro_batches = num_documents(made);
  const MemoryPlan planned = parts->plan(spec);
  CHECK(planned.total_bytes == parts->prepare(spec).total_bytes, what + ": plan");
  for (size_t step = 1; step <= 2; ++step) {
    const auto start = all_weights(*whole);
    const double loss = whole->local_micro_batch(made.batch(), divisor).loss_sum;
    const double squares = whole->local_sum_squares();
    whole->apply_local_update(step, along_gradient());
    double sum = 0;
    for (size_t d = 0; d < num_documents(made); ++d) {
      sum += parts->local_micro_batch(Document(made, d).batch, divisor).loss_sum;
    }
    CHECK_BELOW(std::fabs(sum - loss) / loss, 1e-6, what + ": loss");
    CHECK_BELOW(std::fabs(parts->local_sum_squares() - squares) / squares, kTolerance,
                what + ": norm");
    parts->apply_local_update(step, along_gradient());
    CHECK_BELOW(difference(all_weights(*whole), all_weights(*parts), start), kTolerance,
                what + ": weights after step " + std::to_string(step));
  }
  check_refusals(*parts, made);
}

// Bits of three steps, whoever computes them.
void test_same_bits(const Modules& modules) {
  const Case made = random_case(4);
  const Choice choices[] = {{1, "generic"},
                            {2, "auto"},
                            {1, "auto", recording_backend(host_group_backend())},
                            {1, "auto", recording_backend(host_group_backend()), TM_FP32, false}};
  std::vector<std::vector<float>> found;
  for (const Choice& choice : choices) {
    const auto engine = engine_of(made, choice);
    engine->prepare(local_spec(made, modules, num_documents(made)));
    for (size_t step = 1; step <= 3; ++step) {
      step_by_documents(*engine, made, step, numbers_of(step, 1e-2f));
    }
    found.push_back(all_weights(*engine));
  }
  CHECK(found[0] == found[1], "other bits with two threads");
  CHECK(found[2] == found[3], "other bits where calls are recorded");
}

// A step that was given up leaves nothing in the next one; a short step is one of its own.
void test_short_and_void_steps() {
  const Case made = random_case(5);
  const auto divisor = static_cast<double>(made.num_targets());
  const auto clean = engine_of(made), disturbed = engine_of(made);
  clean->prepare(local_spec(made, {}, num_documents(made)));
  disturbed->prepare(local_spec(made, {}, num_documents(made)));
  disturbed->local_micro_batch(Document(made, 0).batch, divisor);
  disturbed->gradients(made.batch(), divisor);
  for (Engine* engine : {clean.get(), disturbed.get()}) {
    engine->local_micro_batch(Document(made, 1).batch, divisor);
    engine->apply_local_update(1, numbers_of(1, 1e-2f));
  }
  CHECK(all_weights(*clean) == all_weights(*disturbed), "an earlier gradient is in the sum");
  Case untrained = made;
  for (int32_t& target : untrained.targets) target = kUntrained;
  for (Engine* engine : {clean.get(), disturbed.get()}) {
    engine->local_micro_batch(Document(made, 0).batch, divisor);
  }
  disturbed->local_micro_batch(Document(untrained, 1).batch, divisor);
  CHECK(clean->local_sum_squares() == disturbed->local_sum_squares(),
        "a micro-batch that trains nothing changes the sum");
}

// bf16 weights and moments: the sum is kept in float32, whatever the elements are.
void test_half_states(bool has_groups) {
  const Case made = random_case(6);
  const std::string what = has_groups ? "half states, groups" : "half states";
  TrainSpec spec = half_spec(made);
  spec.is_local = true;
  const size_t one = half_engine(made, has_groups)->plan(spec).total_bytes;
  spec.local_micro_batches = num_documents(made);
  const auto engine = half_engine(made, has_groups), again = half_engine(made, has_groups);
  CHECK(engine->plan(spec).total_bytes > one, what + ": gradients of float32 are not planned");
  engine->prepare(spec);
  again->prepare(spec);
  const auto divisor = static_cast<double>(made.num_targets());
  std::vector<double> wanted;
  for (size_t d = 0; d < num_documents(made); ++d) {
    size_t at = 0;
    for (const TensorValues& tensor : engine->gradients(Document(made, d).batch, divisor)) {
      wanted.resize(std::max(wanted.size(), at + tensor.values.size()));
      for (const float value : tensor.values) wanted[at++] += double{value};
    }
  }
  double squares = 0;
  for (const double value : wanted) squares += value * value;
  for (size_t step = 1; step <= 2; ++step) {
    for (Engine* each : {engine.get(), again.get()}) {
      for (size_t d = 0; d < num_documents(made); ++d) {
        each->local_micro_batch(Document(made, d).batch, divisor);
      }
      const double found = each->local_sum_squares();
      if (step == 1) CHECK_BELOW(std::fabs(found - squares) / squares, 1e-5, what + ": norm");
      each->apply_local_update(step, numbers_of(step, 1e-3f));
    }
  }
  CHECK(all_weights(*engine) == all_weights(*again), what + ": other bits again");
}

void test_card(const std::string& plugin) {
  const TmBackend* const card = cuda_backend_or_skip(plugin);
  if (card == nullptr) return;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    test_sum(even_case(seed), {}, card);
    test_sum(even_case(seed), kAllModules, card);
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  for (const TmBackend* backend : {tm_cpu_backend(), host_group_backend()}) {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      test_sum(random_case(seed), {}, backend);
      test_sum(random_case(seed), kAllModules, backend);
    }
    test_sum(random_case(5), {"q_proj", "down_proj"}, backend);
  }
  test_same_bits({});
  test_same_bits(kAllModules);
  test_short_and_void_steps();
  test_half_states(false);
  test_half_states(true);
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  test_card(argc > 1 ? argv[1] : here.parent_path() / "native" / "tunemesh_cuda.so");
  return finish("local_accumulation_test");
}
