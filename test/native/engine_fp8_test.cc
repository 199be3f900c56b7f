// The engine on a device with an fp8 base: gradients near those of float32, the same bits again,
// the plan, and what is refused. On the host's groups, and where there is a card
// on the CUDA backend.
//
//   engine_fp8_test [tunemesh_cuda.so]
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "bench/native/separate_quantise.h"
#include "cuda_device.h"
#include "engine_case.h"
#include "host_groups.h"
#include "own_path.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

using Gradients = std::vector<TensorValues>;

struct Likeness {
  double cosine, norm_ratio;
};

Likeness likeness(const std::vector<float>& a, const std::vector<float>& b) {
  double product = 0, a2 = 0, b2 = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    product += double{a[i]} * double{b[i]};
    a2 += double{a[i]} * double{a[i]};
    b2 += double{b[i]} * double{b[i]};
  }
  return {product / std::sqrt(a2 * b2), std::sqrt(a2 / b2)};
}

std::vector<float> together(const Gradients& gradients) {
  std::vector<float> all;
  for (const TensorValues& tensor : gradients) {
    all.insert(all.end(), tensor.values.begin(), tensor.values.end());
  }
  return all;
}

bool same_bits(const Gradients& a, const Gradients& b) {
  const std::vector<float> x = together(a), y = together(b);
  return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

std::string what_of(uint64_t seed, const Modules& modules, const char* device) {
  std::string text = std::string(device) + ", seed " + std::to_string(seed);
  for (const std::string& module : modules) text += " " + module;
  return text;
}

// Against float32, of the whole gradient. e4m3 keeps 4 bits: each operand is off by 2.6 % at root
// mean square, a product of two by 3.7 %, and the errors of layers add up.
constexpr double kLeastCosine = 0.99;
constexpr double kMostNormError = 0.05;

void test_case(uint64_t seed, const Modules& modules, const Choice& choice) {
  const Case made = even_case(seed);
  const TrainSpec spec = spec_of(made, modules);
  const std::string what = what_of(seed, modules, choice.backend->name);
  const auto exact = engine_of(made), fp8 = engine_of(made, choice);
  const MemoryPlan planned = fp8->plan(spec);
  CHECK(planned.total_bytes == fp8->prepare(spec).total_bytes,
        what + ": plan() is not what was reserved");
  exact->prepare(spec);
  // With an adapter that adds something.
  move_adapter(*exact, made, 0.01f);
  const std::string state = own_path("engine_fp8_test.safetensors");
  exact->write_state(state, 1);
  fp8->read_state(state);
  std::remove(state.c_str());
  const double divisor = static_cast<double>(made.num_targets());
  const Gradients got = fp8->gradients(made.batch(), divisor);
  const Gradients wanted = exact->gradients(made.batch(), divisor);
  const Likeness found = likeness(together(got), together(wanted));
  const double loss = exact->evaluate(made.batch()).loss_sum;
  const double loss_error = std::fabs(fp8->evaluate(made.batch()).loss_sum - loss) / loss;
  std::printf("%s: cosine %.5f, norm %.4f, loss off by %.5f\n", what.c_str(), found.cosine,
              found.norm_ratio, loss_error);
  CHECK(found.cosine >= kLeastCosine, what + ": cosine " + std::to_string(found.cosine));
  CHECK_BELOW(std::fabs(found.norm_ratio - 1), kMostNormError, what + ": norm");
  CHECK_BELOW(loss_error, 0.01, what + ": loss");
  CHECK(found.cosine < 1 - 1e-6, what + ": nothing was rounded to fp8");
  CHECK(same_bits(fp8->gradients(made.batch(), divisor), got), what + ": other bits again");
}

// Rows quantised where they are made, or each right before its product: the same bits, whatever
// layers keep.
void test_separate(uint64_t seed, const Modules& modules, const Choice& choice) {
  const Case made = even_case(seed);
  Choice separate = choice;
  separate.backend = bench::separately_quantising(choice.backend);
  const double divisor = static_cast<double>(made.num_targets());
  for (const Use checkpointing : {Use::kNever, Use::kAuto, Use::kAlways}) {
    TrainSpec spec = spec_of(made, modules);
    spec.gradient_checkpointing = checkpointing;
    const auto gradients = [&](const Choice& on) {
      const auto engine = engine_of(made, on);
      engine->prepare(spec);
      move_adapter(*engine, made, 0.01f);
      return engine->gradients(made.batch(), divisor);
    };
    CHECK(same_bits(gradients(choice), gradients(separate)),
          what_of(seed, modules, choice.backend->name) + ": other bits where rows are quantised " +
              "apart, checkpointing " + std::to_string(static_cast<int>(checkpointing)));
  }
}

// All that a job does beside its steps runs on an fp8 base too.
void test_generation(const Choice& choice) {
  const Case made = even_case(2);
  const auto engine = engine_of(made, choice);
  engine->prepare(spec_of(made, kAllModules));
  GenerateOptions options;
  options.prompt.assign(made.tokens.begin(), made.tokens.begin() + 5);
  options.max_new_tokens = 4;
  options.temperature = 0;
  options.top_p = 1;
  std::atomic<bool> is_aborted = false;
  const auto answer = [&] { return engine->generate(options, {[](int32_t) {}, &is_aborted}).ids; };
  const auto first = answer();
  CHECK(!first.empty() && answer() == first, std::string(choice.backend->name) + ": generation");
}

void test_refusals(const Choice& choice) {
  const Case odd = random_case(3), even = even_case(3);
  const auto engine = engine_of(odd, choice);
  CHECK_THROWS(engine->plan(spec_of(odd, kAllModules)), "JOB_INVALID", "multiples of 16");
  CHECK_THROWS(engine_of(even, choice)->plan(spec_of(even, {})), "JOB_INVALID", "frozen");
  Choice cpu = choice;
  cpu.backend = tm_cpu_backend();
  CHECK_THROWS(engine_of(even, cpu), "ENGINE_FAILED", "fp8 need a GPU");
}

void test_cuda(const std::string& path) {
  const TmBackend* const backend = cuda_backend_or_skip(path);
  if (backend == nullptr) return;
  const Choice choice = {0, "auto", backend, TM_FP8};
  for (uint64_t seed = 1; seed <= 6; ++seed) test_case(seed, kAllModules, choice);
  test_case(7, {"q_proj", "v_proj"}, choice);
  test_case(9, {"down_proj"}, choice);
  for (uint64_t seed = 1; seed <= 6; ++seed) test_separate(seed, kAllModules, choice);
  test_separate(8, {"q_proj", "down_proj"}, choice);
  test_generation(choice);
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh;
  using namespace tunemesh::test;
  const Choice host = {2, "auto", host_group_backend(), TM_FP8};
  for (uint64_t seed = 1; seed <= 6; ++seed) test_case(seed, kAllModules, host);
  for (const char* module : {"q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"}) {
    test_case(9, {module}, host);
  }
  for (uint64_t seed = 1; seed <= 6; ++seed) test_separate(seed, kAllModules, host);
  for (const char* module : {"v_proj", "o_proj", "up_proj", "down_proj"}) {
    test_separate(8, {module}, host);
  }
  test_generation(host);
  test_refusals(host);
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  test_cuda(argc > 1 ? argv[1] : here.parent_path() / "native" / "tunemesh_cuda.so");
  return finish("engine_fp8_test");
}
