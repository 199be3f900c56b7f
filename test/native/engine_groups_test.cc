// Layers in linear groups (kernels/backend.h) give what layers of single linears give: losses,
// logits, gradients of every trained tensor, updates and generated text, for LoRA on any subset of
// the linears and for full fine-tuning. The groups are plain loops (host_groups.h); the single
// linears are checked against a float64 model in engine_test.cc.
//
//   engine_groups_test [tunemesh_cuda.so]   where there is a card, CUDA's groups against CUDA's
//                                           single linears too: no further from the CPU than those
#include <atomic>
#include <bit>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "cuda_device.h"
#include "engine/engine.h"
#include "engine_case.h"
#include "host_groups.h"
#include "own_path.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

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
    const std::string state = own_path("engine_groups_test.safetensors");
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

// Relative distance of all gradients together.
double distance(const std::vector<TensorValues>& found, const std::vector<TensorValues>& wanted) {
  std::vector<float> a, b;
  for (size_t i = 0; i < wanted.size(); ++i) {
    a.insert(a.end(), found[i].values.begin(), found[i].values.end());
    b.insert(b.end(), wanted[i].values.begin(), wanted[i].values.end());
  }
  return distance(a, b);
}

// To one of the two neighbours in bf16, the nearer the likelier.
float rounded_either_way(float value, Random& random) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto added = static_cast<uint32_t>(random.uniform() * 0x10000);
  return std::bit_cast<float>((bits + added) & 0xffff0000);
}

// A state's file with its floats so rounded.
void round_state(const std::string& from, const std::string& to, Random& random) {
  std::ifstream file(from, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), sizeof header);
  for (size_t i = sizeof header + header; i + sizeof(float) <= bytes.size(); i += sizeof(float)) {
    float value = 0;
    std::memcpy(&value, &bytes[i], sizeof value);
    value = rounded_either_way(value, random);
    std::memcpy(&bytes[i], &value, sizeof value);
  }
  std::ofstream(to, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// What the gradients of a case move by at most, of four draws, where nothing but the weights is
// rounded to bf16: the noise in which two ways of computing in bf16 differ.
double noise_of_rounding(const Case& made, const TrainSpec& spec, const std::string& state,
                         const std::vector<TensorValues>& wanted) {
  const std::string rounded_state = own_path("engine_groups_test.rounded.safetensors");
  Random random(11);
  double largest = 0;
  for (int draw = 0; draw < 4; ++draw) {
    Case rounded = made;
    for (auto& [name, tensor] : rounded.source.tensors) {
      for (float& value : tensor.second) value = rounded_either_way(value, random);
    }
    round_state(state, rounded_state, random);
    const auto cpu = engine_of(rounded);
    cpu->prepare(spec);
    cpu->read_state(rounded_state);
    const double divisor = static_cast<double>(made.num_targets());
    largest = std::fmax(largest, distance(cpu->gradients(made.batch(), divisor), wanted));
  }
  std::remove(rounded_state.c_str());
  return largest;
}

// Of the step that moves a case away from its start. All weights of these models at once by 0.1
// would leave gradients of no meaning in bf16: seed 6 then moves by 0.017 to 0.21 from one rounding
// of its weights to the next, by 0.015 to 0.021 after steps of 0.01.
constexpr float kAdapterStep = 0.1f;
constexpr float kFullStep = 0.01f;

struct Devices {
  Choice single, grouped;
};

void test_device_case(const Devices& devices, uint64_t seed, const Modules& modules) {
  const Case made = random_case(seed);
  const TrainSpec spec = spec_of(made, modules);
  const bool is_bf16 = devices.grouped.precision == TM_BF16;
  const std::string what = std::string(is_bf16 ? "cuda bf16" : "cuda fp32") + ", seed " +
                           std::to_string(seed) + ", modules " + std::to_string(modules.size());
  const auto cpu = engine_of(made);
  const auto single = engine_of(made, devices.single);
  const auto grouped = engine_of(made, devices.grouped);
  for (Engine* engine : {cpu.get(), single.get(), grouped.get()}) engine->prepare(spec);
  move_adapter(*cpu, made, spec.is_full ? kFullStep : kAdapterStep);
  const std::string state = own_path("engine_groups_test.safetensors");
  cpu->write_state(state, 1);
  for (Engine* engine : {single.get(), grouped.get()}) engine->read_state(state);
  const double divisor = static_cast<double>(made.num_targets());
  const auto wanted = cpu->gradients(made.batch(), divisor);
  const double noise = is_bf16 ? noise_of_rounding(made, spec, state, wanted) : 0;
  std::remove(state.c_str());
  const double of_single = distance(single->gradients(made.batch(), divisor), wanted);
  const double of_grouped = distance(grouped->gradients(made.batch(), divisor), wanted);
  std::printf("%s: gradients %.2g from the CPU in single linears, %.2g in groups, noise %.2g\n",
              what.c_str(), of_single, of_grouped, noise);
  // Either way rounds at other places; in float32 both are at the noise of a few layers.
  CHECK_BELOW(of_grouped, 2 * std::fmax(of_single, noise) + 2e-5, what + ": gradients");
  const auto logits = cpu->logits(made.batch());
  CHECK_BELOW(distance(grouped->logits(made.batch()), logits),
              2 * distance(single->logits(made.batch()), logits) + 1e-5, what + ": logits");
  if (!is_bf16) CHECK(generated(*grouped, made) == generated(*cpu, made), what + ": other text");
}

void test_cuda(const std::string& path) {
  const TmBackend* const backend = cuda_backend_or_skip(path);
  if (backend == nullptr) return;
  static TmBackend single = *backend;
  single.group_forward = nullptr;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    const Devices devices = {{0, "auto", &single, precision}, {0, "auto", backend, precision}};
    for (uint64_t seed = 1; seed <= 6; ++seed) {
      test_device_case(devices, seed, kAllModules);
      if (precision == TM_BF16) test_device_case(devices, seed, {});
    }
    test_device_case(devices, 7, {"q_proj", "v_proj"});
    test_device_case(devices, 8, {"down_proj"});
    test_device_case(devices, 9, {"o_proj", "up_proj"});
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  // Biases, q/k norm, windows, tied and untied heads by the seed (random_case).
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    test_case(seed, {});
    test_case(seed, kAllModules);
  }
  for (const std::string& module : kAllModules) {
    test_case(7, {module});
    test_case(9, {module});
  }
  test_case(4, {"q_proj", "v_proj"});
  test_case(5, {"k_proj", "v_proj", "up_proj"});
  test_case(6, {"o_proj", "gate_proj"});
  test_job_after_inference();
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  test_cuda(argc > 1 ? argv[1] : here.parent_path() / "native" / "tunemesh_cuda.so");
  return finish("engine_groups_test");
}
