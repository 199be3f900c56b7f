// An engine of bfloat16 elements against one of floats, where there is no GPU (half_backend.h):
// losses, gradients, updates and text, for LoRA and full fine-tuning, with linear groups and
// without. The limits are those of `npm run golden -- --precision bf16`.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "engine_case.h"
#include "half_backend.h"
#include "own_path.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

constexpr const char* kFile = "engine_half_test.safetensors";

struct Agreement {
  double cosine, norm_ratio;
};

Agreement agreement(const std::vector<float>& found, const std::vector<float>& wanted) {
  double dot = 0, found_squares = 1e-30, wanted_squares = 1e-30;
  for (size_t i = 0; i < wanted.size(); ++i) {
    dot += double{found[i]} * double{wanted[i]};
    found_squares += double{found[i]} * double{found[i]};
    wanted_squares += double{wanted[i]} * double{wanted[i]};
  }
  return {dot / std::sqrt(found_squares * wanted_squares),
          std::sqrt(found_squares / wanted_squares)};
}

// Weights that bfloat16 holds: what differs is then the arithmetic's.
Case half_case(uint64_t seed) {
  Case made = random_case(seed);
  for (auto& [name, tensor] : made.source.tensors) {
    for (float& value : tensor.second) value = widened(narrowed(value));
  }
  return made;
}

std::unique_ptr<Engine> half_engine(const Case& made, bool has_groups) {
  return engine_of(made, {2, "auto", half_backend(has_groups), TM_BF16});
}

// The whole gradient within the golden run's limits of bf16. A tensor behind the softmax of a few
// tokens is small differences of rounded numbers: its own limit only tells a wrong row or stride,
// which leaves nothing of the direction.
void compare_gradients(Engine& half, Engine& whole, const Case& made, const std::string& what) {
  const double divisor = static_cast<double>(made.num_targets());
  const auto found = half.gradients(made.batch(), divisor);
  const auto wanted = whole.gradients(made.batch(), divisor);
  CHECK(found.size() == wanted.size(), what + ": other tensors");
  std::vector<float> all_found, all_wanted;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const std::vector<float>& values = wanted[i].values;
    all_found.insert(all_found.end(), found[i].values.begin(), found[i].values.end());
    all_wanted.insert(all_wanted.end(), values.begin(), values.end());
    const bool is_zero =
        std::all_of(values.begin(), values.end(), [](float value) { return value == 0; });
    if (is_zero) continue;  // an adapter's A before its B has moved
    CHECK_BELOW(1 - agreement(found[i].values, values).cosine, 0.1, what + " of " + wanted[i].name);
  }
  const auto [cosine, ratio] = agreement(all_found, all_wanted);
  CHECK_BELOW(1 - cosine, 0.01, what + ", direction");
  CHECK_BELOW(std::fabs(ratio - 1), 0.02, what + ", norm");
}

void compare(Engine& half, Engine& whole, const Case& made, const std::string& what) {
  const double loss = whole.evaluate(made.batch()).loss_sum;
  CHECK_BELOW(std::fabs(half.evaluate(made.batch()).loss_sum - loss) / loss, 0.01, what + ": loss");
  compare_gradients(half, whole, made, what + ": gradient");
}

// An engine of floats at another's weights, rounded where that one's products read them rounded.
std::unique_ptr<Engine> float_twin(Engine& half, const Case& made, const Modules& modules) {
  Case twin = made;
  if (modules.empty()) {
    for (const TensorValues& tensor : half.weights()) {
      auto& [shape, values] = twin.source.tensors.at(tensor.name);
      values = tensor.values;
      if (shape.size() < 2) continue;
      for (float& value : values) value = widened(narrowed(value));
    }
  }
  auto engine = engine_of(twin);
  engine->prepare(spec_of(made, modules));
  if (modules.empty()) return engine;
  half.write_state(own_path(kFile), 1);
  engine->read_state(own_path(kFile));
  std::filesystem::remove(own_path(kFile));
  return engine;
}

void test_against_floats(uint64_t seed, const Modules& modules, bool has_groups) {
  const Case made = half_case(seed);
  const std::string what = "seed " + std::to_string(seed) + (modules.empty() ? " full" : " lora") +
                           (has_groups ? ", groups" : "");
  const auto half = half_engine(made, has_groups);
  const MemoryPlan planned = half->plan(spec_of(made, modules));
  CHECK(planned.total_bytes == half->prepare(spec_of(made, modules)).total_bytes,
        what + ": plan() is not what was reserved");
  compare(*half, *float_twin(*half, made, modules), made, what + ", at the start");
  move_adapter(*half, made, 0.02f);
  compare(*half, *float_twin(*half, made, modules), made, what + ", after an update");
}

// What the products read is the master, rounded; after an update as after a state that was loaded.
void test_copies(const Modules& modules, bool has_groups) {
  const Case made = half_case(2);
  const auto half = half_engine(made, has_groups), fresh = half_engine(made, has_groups);
  half->prepare(spec_of(made, modules));
  move_adapter(*half, made);
  half->write_state(own_path(kFile), 1);
  fresh->prepare(spec_of(made, modules));
  fresh->read_state(own_path(kFile));
  std::filesystem::remove(own_path(kFile));
  const std::string what = std::string(modules.empty() ? "full" : "lora") +
                           (has_groups ? ", groups" : "") + ": copies after an update";
  CHECK(half->logits(made.batch()) == fresh->logits(made.batch()), what + " differ from masters");
  CHECK(half->weights_digest() == fresh->weights_digest(), what + ": masters differ");
}

// As `chat` opens a delivered adapter: what it answers is what the job had learnt, to the bit.
void test_adapter(bool has_groups) {
  const Case made = half_case(4);
  const auto trainer = half_engine(made, has_groups), fresh = half_engine(made, has_groups);
  trainer->prepare(spec_of(made, kAllModules));
  move_adapter(*trainer, made);
  const std::string folder = own_path("engine_half_test.folder");
  std::filesystem::create_directory(folder);
  trainer->write_adapter(folder, "base");
  fresh->load_adapter(folder);
  std::filesystem::remove_all(folder);
  CHECK(fresh->logits(made.batch()) == trainer->logits(made.batch()),
        std::string("a delivered adapter answers otherwise") + (has_groups ? ", groups" : ""));
}

std::vector<int32_t> generated(Engine& engine, const Case& made) {
  GenerateOptions options;
  options.prompt.assign(made.tokens.begin(), made.tokens.begin() + 5);
  options.max_new_tokens = 6;
  std::atomic<bool> is_aborted = false;
  return engine.generate(options, {[](int32_t) {}, &is_aborted}).ids;
}

// With its cache a token sees what it would see in one batch: the same text as by whole batches.
void test_generation(uint64_t seed, bool has_groups) {
  const Case made = half_case(seed);
  const auto engine = half_engine(made, has_groups);
  const std::vector<int32_t> found = generated(*engine, made);
  std::vector<int32_t> tokens(made.tokens.begin(), made.tokens.begin() + 5);
  for (const int32_t id : found) {
    const std::vector<int32_t> starts = {0, static_cast<int32_t>(tokens.size())};
    const std::vector<float> logits =
        engine->logits({tokens.data(), nullptr, tokens.size(), starts.data(), 1});
    const size_t vocabulary = made.config.vocab_size;
    const float* const last = logits.data() + (tokens.size() - 1) * vocabulary;
    const float best = *std::max_element(last, last + vocabulary);
    // A cache and a batch add keys in other orders: two tokens may be as likely as each other.
    CHECK(last[id] >= best - 0.02f * (1 + std::fabs(best)),
          "seed " + std::to_string(seed) + ": an unlikely token is generated");
    tokens.push_back(id);
  }
  CHECK(found.size() == 6, "seed " + std::to_string(seed) + ": too short an answer");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (const bool has_groups : {false, true}) {
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      test_against_floats(seed, {}, has_groups);
      test_against_floats(seed, kAllModules, has_groups);
      test_against_floats(seed, {"q_proj", "down_proj"}, has_groups);
      test_generation(seed, has_groups);
    }
    test_copies({}, has_groups);
    test_copies(kAllModules, has_groups);
    test_adapter(has_groups);
  }
  return finish("engine_half_test");
}
