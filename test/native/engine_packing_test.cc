// Loss and gradients do not depend on how rows travel: loss chunks of other sizes, documents packed
// into one micro-batch against each alone, and rows that are not trained. LoRA and full
// fine-tuning; by the CPU, by hosts that behave like a card (float32 and bf16), and on a card where
// there is one.
//
//   engine_packing_test [tunemesh_cuda.so] [--precision fp32|bf16]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda_device.h"
#include "device_like_backend.h"
#include "engine/engine.h"
#include "engine_case.h"
#include "half_backend.h"
#include "own_path.h"
#include "test_check.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

struct Where {
  std::string name;
  Choice choice;
};

// What one way gives: the loss summed over targets, and the gradient in float64.
struct Result {
  double loss_sum = 0;
  std::vector<double> gradient;

  void add(Engine& engine, const TokenBatch& batch, double divisor) {
    loss_sum += engine.evaluate(batch).loss_sum;
    size_t at = 0;
    for (const TensorValues& tensor : engine.gradients(batch, divisor)) {
      gradient.resize(std::max(gradient.size(), at + tensor.values.size()));
      for (const float value : tensor.values) gradient[at++] += value;
    }
  }
};

// Float32 agrees to 1e-5; bf16 within what `npm run golden` allows it.
void compare(const Where& where, const Result& found, const Result& wanted,
             const std::string& what) {
  const bool is_bf16 = where.choice.precision == TM_BF16;
  double error = 0, dot = 0, found_squares = 1e-30, wanted_squares = 1e-30;
  CHECK(found.gradient.size() == wanted.gradient.size(), what + ": other tensors");
  for (size_t i = 0; i < wanted.gradient.size(); ++i) {
    const double a = found.gradient[i], b = wanted.gradient[i];
    error += (a - b) * (a - b);
    dot += a * b;
    found_squares += a * a;
    wanted_squares += b * b;
  }
  const double loss = std::fabs(found.loss_sum - wanted.loss_sum) / wanted.loss_sum;
  if (std::getenv("PACKING_VERBOSE") != nullptr) {
    std::printf("%s: loss %.2g, gradient %.2g\n", what.c_str(), loss,
                std::sqrt(error / wanted_squares));
  }
  CHECK_BELOW(loss, is_bf16 ? 1e-2 : 1e-5, what + ": loss");
  if (!is_bf16) {
    CHECK_BELOW(std::sqrt(error / wanted_squares), 1e-5, what + ": gradient");
    return;
  }
  CHECK_BELOW(1 - dot / std::sqrt(found_squares * wanted_squares), 1e-2, what + ": direction");
  CHECK_BELOW(std::fabs(std::sqrt(found_squares / wanted_squares) - 1), 2e-2, what + ": norm");
}

class Packing {
 public:
  Packing(const Where& where, uint64_t seed, const Modules& modules)
      : where_(where),
        what_(where.name + ", seed " + std::to_string(seed) +
              (modules.empty() ? " full" : " lora")),
        made_(random_case(seed)),
        spec_(spec_of(made_, modules)),
        engine_(engine_of(made_, where.choice)) {
    engine_->prepare(spec_);
    move_adapter(*engine_, made_, spec_.is_full ? 0.01f : 0.1f);
    wanted_.add(*engine_, made_.batch(), divisor());
  }

  void test() {
    test_chunks();
    test_documents();
    test_parts_of_targets();
    test_untrained_rows();
  }

 private:
  double divisor() const { return static_cast<double>(made_.num_targets()); }

  void test_chunks() const {
    const std::string state = own_path("engine_packing_test.safetensors");
    engine_->write_state(state, 1);
    for (const size_t rows : {1, 2, 7, 64}) {
      TrainSpec spec = spec_;
      spec.loss_chunk_rows = rows;
      const auto other = engine_of(made_, where_.choice);
      other->prepare(spec);
      other->read_state(state);
      Result found;
      found.add(*other, made_.batch(), divisor());
      compare(where_, found, wanted_, what_ + ", loss chunks of " + std::to_string(rows) + " rows");
    }
    std::remove(state.c_str());
  }

  void test_documents() const {
    Result found;
    for (size_t i = 0; i + 1 < made_.starts.size(); ++i) {
      const auto first = static_cast<size_t>(made_.starts[i]);
      const int32_t starts[] = {0, made_.starts[i + 1] - made_.starts[i]};
      found.add(*engine_,
                {made_.tokens.data() + first, made_.targets.data() + first,
                 static_cast<size_t>(starts[1]), starts, 1},
                divisor());
    }
    compare(where_, found, wanted_, what_ + ", documents one by one");
  }

  // Every target counts once: those of even rows, and those of odd ones.
  void test_parts_of_targets() const {
    Result found;
    for (const size_t part : {0, 1}) {
      std::vector<int32_t> targets = made_.targets;
      for (size_t i = part; i < targets.size(); i += 2) targets[i] = kUntrained;
      TokenBatch batch = made_.batch();
      batch.targets = targets.data();
      found.add(*engine_, batch, divisor());
    }
    compare(where_, found, wanted_, what_ + ", targets in two parts");
  }

  // What stands behind a document's last trained row is seen by nobody that counts.
  void test_untrained_rows() const {
    std::vector<int32_t> targets = made_.targets, tokens = made_.tokens;
    const auto vocabulary = static_cast<int32_t>(made_.config.vocab_size);
    for (size_t i = 0; i + 1 < made_.starts.size(); ++i) {
      const auto first = static_cast<size_t>(made_.starts[i]);
      const auto end = static_cast<size_t>(made_.starts[i + 1]);
      for (size_t j = first + (end - first + 1) / 2; j < end; ++j) {
        targets[j] = kUntrained;
        tokens[j] = (tokens[j] + 1) % vocabulary;
      }
    }
    TokenBatch batch = made_.batch();
    batch.targets = targets.data();
    Result wanted, found;
    wanted.add(*engine_, batch, divisor());
    batch.tokens = tokens.data();
    found.add(*engine_, batch, divisor());
    compare(where_, found, wanted, what_ + ", other tokens behind the last trained row");
  }

  Where where_;
  std::string what_;
  Case made_;
  TrainSpec spec_;
  std::unique_ptr<Engine> engine_;
  Result wanted_;
};

void test_where(const Where& where) {
  // Biases, q/k norm, windows, tied and untied heads by the seed (random_case).
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Packing(where, seed, {}).test();
    Packing(where, seed, kAllModules).test();
  }
}

void test_cuda(const TestOptions& options) {
  const TmBackend* const backend = cuda_backend_or_skip(options.plugin);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    const char* const name = precision == TM_BF16 ? "bf16" : "fp32";
    if (!options.wants_precision(name)) continue;
    test_where({std::string("cuda ") + name, {0, "auto", backend, precision}});
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  test_where({"cpu", {2, "auto"}});
  test_where({"groups", {2, "auto", host_group_backend()}});
  test_where({"device", {2, "auto", device_like_backend()}});
  for (const bool has_groups : {false, true}) {
    const Choice half = {2, "auto", half_backend(has_groups), TM_BF16};
    test_where({has_groups ? "bf16, groups" : "bf16", half});
  }
  test_cuda(options_of(argc, argv));
  return finish("engine_packing_test");
}
