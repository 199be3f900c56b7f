// Every operation of the CUDA backend, with elements of float and of bf16: against the reference in
// double as the CPU's, the same bits when run again, AdamW and the exchange's rounding to the bit
// as on the CPU, and what is refused.
//
//   cuda_ops_test [tunemesh_cuda.so] [--small] [--only WORD] [--rest]
//     [--torch torch_op_errors.json]
//
// The plugin is otherwise sought in build/native; the options are those of test_options.h.
// Without a plugin or a card it says so and passes nothing.
#include <dlfcn.h>

#include "adamw_checks.h"
#include "codec_inputs.h"
#include "engine/codec.h"
#include "kernels/cuda/plugin.h"
#include "op_cases.h"
#include "op_linear_cases.h"
#include "op_refusals.h"
#include "op_small_cases.h"
#include "staged_backend.h"
#include "test_options.h"
#include "torch_cases.h"

namespace tunemesh {
namespace {

using test::TestOptions;

struct Plugin {
  decltype(&::tm_cuda_backend) backend = nullptr;
  decltype(&::tm_cuda_num_devices) num_devices = nullptr;
};

// Null where it is not built; a plugin that does not load is a failure, told by `why`.
Plugin load_plugin(const std::string& path, std::string* why) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  Plugin plugin;
  if (library == nullptr) {
    *why = dlerror();
    return plugin;
  }
  plugin.backend = reinterpret_cast<decltype(plugin.backend)>(dlsym(library, "tm_cuda_backend"));
  plugin.num_devices =
      reinterpret_cast<decltype(plugin.num_devices)>(dlsym(library, "tm_cuda_num_devices"));
  if (plugin.backend == nullptr || plugin.num_devices == nullptr) *why = "it lacks its entries";
  return plugin;
}

int skip(const std::string& why) {
  printf("skipped: %s\n0 passed, 0 failed, 1 skipped\n", why.c_str());
  return 0;
}

std::vector<OpCase> linear_cases() {
  constexpr size_t kSizes[][3] = {
      {1, 1, 1},     {1, 64, 96},    {1, 385, 33},    {2, 31, 65},     {3, 17, 16},
      {7, 100, 4},   {13, 384, 64},  {25, 385, 31},   {97, 770, 16},   {33, 16, 770},
      {200, 40, 61}, {130, 33, 257}, {9, 40, 1100},   {257, 576, 192}, {64, 1536, 576},
      {515, 8, 576}, {300, 520, 64}, {260, 64, 1000},
  };
  std::vector<OpCase> cases;
  uint64_t seed = 100;
  for (const auto& size : kSizes) {
    for (const Product product :
         {Product::kForward, Product::kBackwardInput, Product::kWeightGrad}) {
      for (size_t variant = 0; variant < 3; ++variant) {
        const LinearShape shape = {product,
                                   size[0],
                                   size[1],
                                   size[2],
                                   variant == 1 ? 0.37f : 1,
                                   variant == 2,
                                   variant,
                                   variant == 1 || Random::rounds_to_bf16};
        cases.push_back(linear_case(Random(seed++), shape));
      }
    }
  }
  Random random(20261124);
  for (int i = 0; i < 40; ++i) {
    const auto below = [&](size_t limit) { return random.next() % limit; };
    const LinearShape shape = {static_cast<Product>(below(3)),
                               1 + below(300),
                               1 + below(300),
                               1 + below(300),
                               below(2) == 0 ? 1.0f : random.normal(1),
                               below(2) == 0,
                               below(20),
                               below(2) == 0 || Random::rounds_to_bf16,
                               i % 2 == 0};
    cases.push_back(linear_case(Random(seed++), shape));
  }
  return cases;
}

// Beyond the cases of the CPU: heads of every kernel's size, more tiles, groups of many heads.
std::vector<OpCase> further_cases() {
  uint64_t seed = 300;
  const auto random = [&] { return Random(seed++); };
  const AttentionShape attention[] = {
      {{0, 300}, 4, 2, 96, 0, 0},
      {{0, 70, 151}, 2, 1, 256, 0, 1},
      {{0, 200}, 2, 2, 200, 33, 0},
      {{0, 1, 513}, 8, 1, 64, 0, 0},
      {{0, 640}, 3, 1, 128, 200, 2},
      {{0, 63, 64, 65, 129}, 2, 1, 33, 0, 0},
      {{0, 31, 95, 96, 97}, 4, 2, 128, 17, 0},
  };
  std::vector<OpCase> cases;
  for (const AttentionShape& shape : attention) cases.push_back(attention_case(random(), shape));
  cases.push_back(norm_case(random(), 3, 4096, 0, false));
  cases.push_back(norm_case(random(), 1000, 64, 0, true));
  // Rows of a warp, of four and of eight; several rows a block; rows that are not kept whole.
  cases.push_back(norm_case(random(), 2200, 584, 8, true));
  cases.push_back(norm_case(random(), 700, 2056, 0, false));
  cases.push_back(norm_case(random(), 9, 9003, 2, true));
  cases.push_back(norm_case(random(), 3, 8200, 0, false));
  cases.push_back(bias_case(random(), 1025, 2050, 1));
  cases.push_back(swiglu_case(random(), 2, 8193, 1));
  cases.push_back(loss_case(random(), 2, 128256, 1));
  cases.push_back(embedding_case(random(), 700, 2051, 5));
  cases.push_back(embedding_case(random(), 900, 1032, 400));
  cases.push_back(bias_case(random(), 5000, 72, 8));
  cases.push_back(decode_case(random(), {5, 2000, 4, 1, 256, 0}));
  cases.push_back(decode_case(random(), {0, 77, 2, 1, 300, 1}));
  return cases;
}

// One call on the device and on the CPU: status, first bad block, and the sums where both succeed.
struct Rounding {
  const TmBackend* backend;
  TmContext* context;
  std::string name;
  bool on_host;  // the accumulator stays in the host's memory
};

void compare_rounding(const Rounding& r, const Floats& gradient, Fixed sum, int bits,
                      Tally& tally) {
  Fixed want = sum;
  size_t bad = 99, wanted_bad = 99;
  const size_t num_blocks = gradient.size() / kBlockElements;
  const TmStatus wanted =
      round_and_add({gradient.data(), want.data(), num_blocks, bits, &wanted_bad});
  TmRoundAndAdd call = {gradient.data(), sum.data(), num_blocks, bits, &bad};
  TmStatus got = TM_OK;
  if (r.on_host) {
    Staging staging(r.context);
    call.gradient = staging.in(call.gradient, gradient.size());
    got = staging.finish(r.backend->round_and_add(r.context, &call));
  } else {
    got = r.backend->round_and_add(r.context, &call);
  }
  const std::string what = "round_and_add, " + std::to_string(bits) + " bits, " + r.name;
  tally.check(got == wanted,
              what + ": status " + std::to_string(got) + ", not " + std::to_string(wanted));
  tally.check(bad == wanted_bad,
              what + ": bad block " + std::to_string(bad) + ", not " + std::to_string(wanted_bad));
  if (wanted == TM_OK) tally.check(sum == want, what + ": other sums");
}

void compare_roundings(const Rounding& r, Tally& tally) {
  for (const int bits : {2, 8, 16, 24}) {
    const Floats gradient = gradient_like(61, static_cast<uint64_t>(bits));
    Fixed sum(gradient.size());
    compare_rounding(r, gradient, sum, bits, tally);
    if (round_and_add({gradient.data(), sum.data(), 61, bits, nullptr}) != TM_OK) continue;
    compare_rounding(r, gradient_like(61, 500), sum, bits, tally);
  }
  Floats tiny(3 * kBlockElements, 1e-44f), large(3 * kBlockElements, 32767.99f);
  compare_rounding(r, tiny, Fixed(tiny.size()), 24, tally);
  compare_rounding(r, large, Fixed(large.size()), 24, tally);
  compare_rounding(r, large, Fixed(large.size(), INT64_MAX - 5), 24, tally);
  const struct {
    size_t element;
    float value;
  } bad_values[] = {{700, kPoison}, {300, INFINITY}, {5000, 32768.0f}, {5119, -40000.0f}};
  Floats gradient = gradient_like(20, 9);
  for (auto bad = std::rbegin(bad_values); bad != std::rend(bad_values); ++bad) {
    gradient[bad->element] = bad->value;
    compare_rounding(r, gradient, Fixed(gradient.size()), 24, tally);
  }
  // More than one piece of a host's accumulator.
  Floats longer = gradient_like(5000, 3);
  compare_rounding(r, longer, Fixed(longer.size(), 12345), 16, tally);
  longer[4500 * kBlockElements + 3] = kPoison;
  compare_rounding(r, longer, Fixed(longer.size()), 16, tally);
}

void run_cases(const std::vector<Device>& devices, const TestOptions& options, Tally& tally) {
  const auto run_all = [&](const std::vector<OpCase>& cases) {
    for (const OpCase& op : cases) {
      if (options.wants(op.name)) run_case(op, devices, tally);
    }
  };
  if (options.is_small) {
    run_all(small_cases());
    return run_all(small_linear_cases());
  }
  run_all(all_cases());
  run_all(further_cases());
  run_all(linear_cases());
}

void run_bf16(const Device& cuda, const TestOptions& options, Tally& tally) {
  tally.check(
      cuda.backend->element_bytes(cuda.context) == 2 && cuda.backend->reads_rows(cuda.context) == 0,
      "bf16: elements of 2 bytes, and rows of floats are not read");
  Random::rounds_to_bf16 = true;
  run_cases({cuda, {cuda.backend, cuda.context, cuda.name + ", again"}}, options, tally);
  if (!options.is_small && options.wants("torch")) {
    compare_with_torch(cuda, options.torch_errors, tally);
  }
  if (options.only.empty()) {
    compare_updates({cuda}, true, tally);
    check_packing(cuda, tally);
    refused_indices(cuda, tally);
    refused_attention(cuda, tally);
  }
  Random::rounds_to_bf16 = false;
}

void run_fp32(const Device& cuda, const TestOptions& test_options, Tally& tally) {
  const std::vector<Device> devices = {cuda, {cuda.backend, cuda.context, cuda.name + ", again"}};
  run_cases(devices, test_options, tally);
  if (!test_options.is_small && test_options.wants("torch")) {
    compare_with_torch(cuda, test_options.torch_errors, tally);
  }
  if (!test_options.only.empty()) return;
  if (!test_options.is_small) adamw_vectors({cuda}, "", tally);
  compare_updates(devices, false, tally);
  TmContextOptions options{};
  options.size = sizeof options;
  Device cpu = {tm_cpu_backend(), nullptr, "cpu"};
  require(cpu.backend->create(&options, &cpu.context), cpu);
  compare_sum_squares({staged_device, cuda.context, "cuda"}, cpu, tally);
  compare_large_update(cuda, cpu, tally);
  compare_half_squares({{staged_device, cuda.context, "cuda"}}, cpu, tally);
  cpu.backend->destroy(cpu.context);
  compare_roundings({cuda.backend, cuda.context, "sums on the device", false}, tally);
  compare_roundings({staged_device, cuda.context, "sums on the host", true}, tally);
  refused_indices(cuda, tally);
  refused_attention(cuda, tally);
  refused_calls(cuda, tally);
  check_memory(cuda, tally);
  if (test_options.allows_failures) refused_memory(cuda, tally);
}

int run(const TestOptions& test_options) {
  const std::string& path = test_options.plugin;
  if (!std::filesystem::exists(path)) {
    return skip("no CUDA plugin at " + path + "; node scripts/build.mjs cuda builds it");
  }
  Tally tally;
  std::string why;
  const Plugin plugin = load_plugin(path, &why);
  tally.check(why.empty(), path + " does not load: " + why);
  if (!why.empty()) return tally.finish();
  const char* reason = "";
  if (plugin.num_devices(&reason) == 0) {
    return skip(std::string("no CUDA device (") + reason + ")");
  }
  const TmBackend* backend = plugin.backend();
  tally.check(backend->abi == TM_BACKEND_ABI && backend->size == sizeof(TmBackend),
              "the plugin is of another ABI: rebuild it");
  TmContextOptions options{};
  options.size = sizeof options;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    options.precision = precision;
    const bool is_half = precision == TM_BF16;
    if (!test_options.wants_precision(is_half ? "bf16" : "fp32")) continue;
    Device cuda = {staged_backend(backend), nullptr, is_half ? "cuda, bf16" : "cuda"};
    require(backend->create(&options, &cuda.context), cuda);
    printf("%s\n", backend->describe(cuda.context));
    is_half ? run_bf16(cuda, test_options, tally) : run_fp32(cuda, test_options, tally);
    backend->destroy(cuda.context);
  }
  return tally.finish();
}

}  // namespace
}  // namespace tunemesh

int main(int argc, char** argv) { return tunemesh::run(tunemesh::test::options_of(argc, argv)); }
