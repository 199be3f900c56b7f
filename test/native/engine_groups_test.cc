// Layers in linear groups (kernels/backend.h) give what layers of single linears give: losses,
// logits, gradients of every trained tensor, updates and generated text, for LoRA on any subset of
// the linears and for full fine-tuning. The groups are plain loops (host_groups.h); the single
// linears are checked against a float64 model in engine_test.cc.
#include <atomic>
#include <cstdio>

#include "engine/engine.h"
#include "engine_case.h"
#include "host_groups.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

using Modules = std::vector<std::string>;

double distance(const std::vector<float>& found, const std::vector<float>& wanted) {
  double error = 0;
  double norm = 1e-14;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = double{found[i]} - double{wanted[i]};
    error += difference * difference;
    norm += double{wanted[i]} * double{wanted[i]};
  }
  return std::sqrt(error / norm);
}

void compare(const std::vector<TensorValues>& found, const std::vector<TensorValues>& wanted,
             const std::string& what) {
  CHECK(found.size() == wanted.size(), what + ": other tensors");
  for (size_t i = 0; i < wanted.size(); ++i) {
    CHECK(found[i].name == wanted[i].name, what + ": other names");
    // Two orders of the same float32 sums through a few layers, as in engine_test.cc.
    CHECK_BELOW(distance(found[i].values, wanted[i].values), 2e-5, what + " of " + wanted[i].name);
  }
}

std::vector<int32_t> generated(Engine& engine, const Case& made) {
  GenerateOptions options;
  options.prompt.assign(made.tokens.begin(), made.tokens.begin() + 5);
  options.max_new_tokens = 7;
  options.temperature = 0;
  options.top_p = 1;
  std::atomic<bool> is_aborted = false;
  return engine.generate(options, {[](int32_t) {}, &is_aborted}).ids;
}

// Where no row of the batch is trained, only the loss of the others stays; untrained modules of a
// layer have no border.
void test_case(uint64_t seed, const Modules& modules) {
  const Case made = random_case(seed);
  const TrainSpec spec = spec_of(made, modules);
  std::string what = "seed " + std::to_string(seed) + (modules.empty() ? " full" : "");
  for (const std::string& module : modules) what += " " + module;
  const auto single = engine_of(made);
  const auto grouped = engine_of(made, {2, "auto", host_group_backend()});
  CHECK_BELOW(distance(grouped->logits(made.batch()), single->logits(made.batch())), 1e-5,
              what + ": logits of the base model");
  const MemoryPlan planned = grouped->plan(spec);
  const MemoryPlan reserved = grouped->prepare(spec);
  CHECK(planned.total_bytes == reserved.total_bytes, what + ": plan() is not what was reserved");
  single->prepare(spec);
  const double divisor = static_cast<double>(made.num_targets());
  // The second round runs with a B that is not zero and with refreshed weights.
  for (int round = 0; round < 2; ++round) {
    const std::string which = what + ", round " + std::to_string(round);
    const double loss = single->evaluate(made.batch()).loss_sum;
    CHECK_BELOW(std::fabs(grouped->evaluate(made.batch()).loss_sum - loss) / loss, 1e-6,
                which + ": loss");
    compare(grouped->gradients(made.batch(), divisor), single->gradients(made.batch(), divisor),
            which + ": gradient");
    CHECK_BELOW(distance(grouped->logits(made.batch()), single->logits(made.batch())), 1e-5,
                which + ": logits");
    CHECK(generated(*grouped, made) == generated(*single, made), which + ": other text");
    if (round > 0) break;
    move_adapter(*single, made);
    const std::string state = "engine_groups_test.safetensors";
    single->write_state(state, 1);
    grouped->read_state(state);
    std::remove(state.c_str());
  }
}

// An engine that answered without adapter packs its base anew for a job's.
void test_job_after_inference() {
  const Case made = random_case(2);
  const auto grouped = engine_of(made, {2, "auto", host_group_backend()});
  grouped->logits(made.batch());
  const TrainSpec spec = spec_of(made, {"q_proj", "down_proj"});
  grouped->prepare(spec);
  const auto fresh = engine_of(made, {2, "auto", host_group_backend()});
  fresh->prepare(spec);
  compare(grouped->gradients(made.batch(), 3), fresh->gradients(made.batch(), 3),
          "job after inference");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  const Modules all = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
  // Biases, q/k norm, windows, tied and untied heads by the seed (random_case).
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    test_case(seed, {});
    test_case(seed, all);
  }
  for (const char* module :
       {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}) {
    test_case(7, {module});
    test_case(9, {module});
  }
  test_case(4, {"q_proj", "v_proj"});
  test_case(5, {"k_proj", "v_proj", "up_proj"});
  test_case(6, {"o_proj", "gate_proj"});
  test_job_after_inference();
  return finish("engine_groups_test");
}
