// What the engine says on a card of bad jobs, and that the card serves the next one: more memory
// than there is, a head size without kernels, a gradient that is not finite, an impossible token.
// Without one, on the host in a card's place (host_card.cc).
//
//   card_faults_test [tunemesh_cuda.so] [--precision fp32|bf16]
#include <cmath>
#include <cstdio>
#include <string>

#include "cuda_device.h"
#include "engine/engine.h"
#include "engine_case.h"
#include "test_check.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

bool is_finite(const std::vector<TensorValues>& tensors) {
  for (const TensorValues& tensor : tensors) {
    for (const float value : tensor.values) {
      if (!std::isfinite(value)) return false;
    }
  }
  return !tensors.empty();
}

// Gate and up of so many tokens, 32 KiB each, are on no card; the engine then takes a job that
// fits.
void test_short_memory(const Choice& card, const std::string& name) {
  Random random(9);
  ModelConfig config = random_case(3).config;
  config.intermediate_size = 8192;
  const Case made = filled_case(config, random, 0.1);
  const auto engine = engine_of(made, card);
  TrainSpec spec = spec_of(made, {"q_proj"});
  spec.tokens_per_micro_batch = size_t{1} << 24;
  for (const char* part : {"are free", "Planned: ", "per_device_train_batch_size"}) {
    CHECK_THROWS(engine->prepare(spec), "DEVICE_MEMORY_SHORT", part);
  }
  engine->prepare(spec_of(made, {"q_proj"}));
  CHECK(is_finite(engine->gradients(made.batch(), 7)), name + ": no job after one that was large");
}

void test_head_size(const Choice& card) {
  Random random(9);
  ModelConfig config = random_case(3).config;
  config.num_heads = config.num_kv_heads = 1;
  config.head_size = 320;
  const Case made = filled_case(config, random, 0.1);
  const auto engine = engine_of(made, card);
  CHECK_THROWS(engine->plan(spec_of(made, {})), "MODEL_UNSUPPORTED", "320");
}

// The layer is in the tensor's name; step and micro-batch are the worker's to add.
void test_poisoned_gradient(const Choice& card, const std::string& name) {
  Case made = random_case(3);
  const Case clean = made;
  made.source.tensors["model.layers.1.mlp.up_proj.weight"].second[3] = NAN;
  for (const bool is_full : {false, true}) {
    const TrainSpec spec =
        spec_of(made, is_full ? std::vector<std::string>{} : std::vector<std::string>{"q_proj"});
    const auto engine = engine_of(made, card);
    engine->prepare(spec);
    std::string code, subject;
    try {
      engine->micro_batch(made.batch(), 1, 0);
    } catch (const EngineError& error) {
      code = error.code();
      subject = error.subject();
    }
    CHECK(code == "NON_FINITE_GRADIENT", name + ": a NaN is " + (code.empty() ? "nothing" : code));
    const bool is_named =
        is_full ? made.source.has(subject) : subject.find("q_proj") != subject.npos;
    CHECK(is_named, name + ": the tensor is \"" + subject + "\"");
    CHECK(engine->exchange()->is_poisoned(0), name + ": the slot stays usable");
    const auto next = engine_of(clean, card);
    next->prepare(spec);
    CHECK(is_finite(next->gradients(clean.batch(), 7)), name + ": no job after a NaN");
  }
}

void test_bad_token(const Choice& card, const std::string& name) {
  const Case made = random_case(3);
  const auto engine = engine_of(made, card);
  engine->prepare(spec_of(made, {}));
  std::vector<int32_t> tokens = made.tokens;
  tokens[2] = static_cast<int32_t>(made.config.vocab_size);
  TokenBatch batch = made.batch();
  batch.tokens = tokens.data();
  CHECK_THROWS(engine->evaluate(batch), "DATA_INVALID", "vocabulary");
  CHECK(std::isfinite(engine->evaluate(made.batch()).loss_sum),
        name + ": no batch after a bad one");
}

void test_card(const TestOptions& options, const std::string& plugin) {
  const TmBackend* const backend = cuda_backend_or_skip(plugin);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    const std::string name = precision == TM_BF16 ? "bf16" : "fp32";
    if (!options.wants_precision(name.c_str())) continue;
    const Choice card = {0, "auto", backend, precision};
    test_short_memory(card, name);
    test_head_size(card);
    test_poisoned_gradient(card, name);
    test_bad_token(card, name);
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  const TestOptions options = options_of(argc, argv);
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  if (std::filesystem::exists(here / "host_card.so")) test_card(options, here / "host_card.so");
  test_card(options, options.plugin);
  return finish("card_faults_test");
}
