// The cases whose errors torch's own are known of: bench/peers/op_errors.py makes the same inputs,
// by the same seeds and order of draws, and records what torch loses on a card against float64 in
// torch_op_errors.json, which CMake puts into the program.
#pragma once
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "adamw_case.h"
#include "engine/json.h"
#include "op_attention_cases.h"
#include "op_linear_cases.h"
#include "torch_op_errors.h"

namespace tunemesh {

struct TorchCase {
  const char* key;
  OpCase op;
};

// p, m and v after one step, the tenth.
inline OpCase adamw_step_case(Random random) {
  constexpr size_t kCount = 2051;
  const Floats p = random.normals(kCount, 1), m = random.normals(kCount, 1e-3);
  Floats v = random.normals(kCount, 1e-3);
  for (float& value : v) value *= value;
  const Floats gradient = random.normals(kCount, 1e-3);
  const double correction1 = 1 - pow(0.9, 10), correction2 = 1 - pow(0.999, 10);
  auto kernel = [=](const Device& d) {
    Outputs state = {p, m, v};
    VectorUpdate update(state, gradient);
    update.call.learning_rate = 1e-3f;
    update.call.clip_factor = 1;
    update.call.bias_correction1 = static_cast<float>(correction1);
    update.call.bias_correction2_sqrt = static_cast<float>(sqrt(correction2));
    update.call.weight_decay = 0.01f;
    require(d.backend->adamw(d.context, &update.call), d);
    return state;
  };
  return make_case("adamw", kernel, [=](auto) {
    auto ps = as<double>(p), ms = as<double>(m), vs = as<double>(v);
    for (size_t i = 0; i < kCount; ++i) {
      const double g = gradient[i];
      ms[i] = 0.9 * ms[i] + 0.1 * g;
      vs[i] = 0.999 * vs[i] + 0.001 * g * g;
      ps[i] -= 1e-3 * 0.01 * ps[i] +
               1e-3 * (ms[i] / correction1) / (sqrt(vs[i]) / sqrt(correction2) + 1e-8);
    }
    return Exact{ps, ms, vs};
  });
}

inline std::vector<TorchCase> torch_cases() {
  const bool is_bf16 = Random::rounds_to_bf16;
  const auto linear = [&](uint64_t seed, Product product) {
    return linear_case(Random(seed), {product, 257, 576, 192, 1, false, 0, is_bf16, is_bf16});
  };
  return {
      {"linear forward", linear(7001, Product::kForward)},
      {"linear backward input", linear(7002, Product::kBackwardInput)},
      {"linear weight grad", linear(7003, Product::kWeightGrad)},
      {"rms norm", norm_case(Random(7004), 129, 577, 0, false)},
      {"bias, add", bias_case(Random(7005), 1025, 130, 0)},
      {"rope", rope_case(Random(7006), 9, 64, 0)},
      {"swiglu", swiglu_case(Random(7007), 31, 1536, 1)},
      {"cross entropy", loss_case(Random(7008), 5, 4111, 3)},
      {"attention", attention_case(Random(7009), {{0, 37, 38, 120, 233}, 6, 2, 64, 0, 0})},
      {"embedding, gather, scatter", embedding_case(Random(7010), 700, 129, 5)},
      {"adamw", adamw_step_case(Random(7011))},
  };
}

// The device's error is at most twice torch's, with half a unit of float32 (6e-8) allowed where
// torch is exact. Outputs that torch does not have are null.
// `path`: another file than the recorded one; empty: that one.
inline void compare_with_torch(const Device& device, const std::string& path, Tally& tally) {
  std::string text = kTorchOpErrors;
  if (!path.empty()) {
    std::ifstream in(path);
    text.assign(std::istreambuf_iterator<char>(in), {});
    tally.check(!text.empty(), path + " can't be read");
  }
  if (text.empty()) return;
  const bool is_bf16 = Random::rounds_to_bf16;
  const Json file = parse_json({text, "torch_op_errors.json", "INTERNAL"});
  const JsonObject& recorded =
      file.object("the file").at(is_bf16 ? "bf16" : "fp32").object("dtype");
  for (const TorchCase& made : torch_cases()) {
    // In bf16 its moments are bf16 too: those here are of the CPU's bits (adamw_checks.h).
    if (is_bf16 && std::string(made.key) == "adamw") continue;
    const JsonArray& outputs = recorded.at(made.key).array(made.key);
    const Exact want = made.op.oracle();
    const Outputs got = made.op.kernel(device);
    tally.check(outputs.size() == want.size(), std::string(made.key) + ": torch has other outputs");
    for (size_t i = 0; i < want.size(); ++i) {
      if (!outputs[i].is_object()) continue;
      const JsonObject& theirs = outputs[i].object(made.key);
      const double rms = theirs.at("rms").number("rms"), most = theirs.at("max").number("max");
      const Distance mine = distance(got[i], want[i]);
      char line[256];
      snprintf(line, sizeof line, "%s %s, output %zu: error %.2g rms %.2g max, torch %.2g, %.2g",
               is_bf16 ? "bf16" : "fp32", made.key, i, mine.rms, mine.largest, rms, most);
      tally.check(mine.rms <= 2 * rms + 6e-8 && mine.largest <= 2 * most + 6e-8, line);
      if (getenv("OPS_VERBOSE")) printf("%s\n", line);
    }
  }
}

}  // namespace tunemesh
