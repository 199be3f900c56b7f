// Times the CUDA backend's operations in bf16 at the sizes of Llama models and 8192 tokens: what is
// bound by memory in bytes a second (the least that it must move) and as a share of an H100's copy,
// products in TFLOP/s.
//
//   cuda_ops_bench [tunemesh_cuda.so] [--only TEXT] [--fp32]
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#include "bench/native/adamw_bench.h"
#include "bench/native/adapter_bench.h"
#include "bench/native/cuda_bench.h"
#include "bench/native/quantise_bench.h"
#include "kernels/cuda/plugin.h"

namespace tunemesh::bench {
namespace {

constexpr size_t kLossRows = 2048;
constexpr size_t kVocabulary = 128256;

struct Model {
  const char* name;
  size_t c, d, heads, kv_heads, head_size;
};
constexpr Model kModels[] = {
    {"8B", 4096, 14336, 32, 8, 128}, {"3B", 3072, 8192, 24, 8, 128}, {"1B", 2048, 8192, 32, 8, 64}};

void time_norms(Bench& b, const Model& m) {
  const double row_bytes = double(kTokens) * double(m.c) * double(b.element_bytes());
  TmElement *x = b.elements(kTokens * m.c), *y = b.elements(kTokens * m.c);
  TmElement* dx = b.elements(kTokens * m.c);
  float *gain = b.floats(m.c), *rstd = b.floats(kTokens), *dgain = b.floats(m.c);
  const TmRmsNorm forward = {x, gain, y, rstd, kTokens, m.c, m.c, m.c, 1e-5f, 0, {}};
  b.memory_bound("rms norm forward", 2 * row_bytes,
                 [&] { return b.ops().rms_norm_forward(b.context(), &forward); });
  TmRmsNormBackward backward = {y,   x,   gain, rstd, dx, nullptr, kTokens,
                                m.c, m.c, m.c,  m.c,  0,  0,       {}};
  const auto run = [&] { return b.ops().rms_norm_backward(b.context(), &backward); };
  b.memory_bound("rms norm backward", 3 * row_bytes, run);
  backward.dx_add = 1;
  b.memory_bound("rms norm backward, dx added", 4 * row_bytes, run);
  backward.dgain = dgain;
  b.memory_bound("rms norm backward, dx added, dgain", 4 * row_bytes, run);
  b.memory_bound("add", 3 * row_bytes,
                 [&] { return b.ops().add(b.context(), y, x, kTokens * m.c); });
  b.memory_bound("bias add", 2 * row_bytes,
                 [&] { return b.ops().bias_add(b.context(), y, kTokens, m.c, m.c, gain); });
  b.memory_bound("bias grad", row_bytes,
                 [&] { return b.ops().bias_grad_add(b.context(), y, kTokens, m.c, m.c, dgain); });
}

void time_activations(Bench& b, const Model& m) {
  const double row_bytes = double(kTokens) * double(m.d) * double(b.element_bytes());
  // As the engine lays them out: gate and up side by side.
  TmElement* both = b.elements(kTokens * 2 * m.d);
  auto* up = reinterpret_cast<TmElement*>(reinterpret_cast<char*>(both) + m.d * b.element_bytes());
  TmElement *out = b.elements(kTokens * m.d), *dout = b.elements(kTokens * m.d);
  const TmSwiGlu forward = {both, up, out, kTokens, m.d, 2 * m.d, m.d, {}};
  b.memory_bound("swiglu forward", 3 * row_bytes,
                 [&] { return b.ops().swiglu_forward(b.context(), &forward); });
  TmSwiGluBackward backward = {dout, both, up, both, up, nullptr, kTokens, m.d, 2 * m.d, m.d, {}};
  const auto run = [&] { return b.ops().swiglu_backward(b.context(), &backward); };
  b.memory_bound("swiglu backward", 5 * row_bytes, run);
  backward.out = out;
  b.memory_bound("swiglu backward, out again", 6 * row_bytes, run);
  const size_t width = m.heads * m.head_size;
  const TmRope rope = {out,
                       width,
                       b.indices(kTokens, kTokens),
                       b.floats(kTokens * 128),
                       b.floats(kTokens * 128),
                       kTokens,
                       m.heads,
                       m.head_size,
                       0,
                       {},
                       0};
  b.memory_bound("rope", 2.0 * double(kTokens) * double(width) * double(b.element_bytes()),
                 [&] { return b.ops().rope(b.context(), &rope); });
}

void time_rows(Bench& b, const Model& m) {
  TmElement* table = b.elements(kVocabulary * m.c);
  TmElement* out = b.elements(kTokens * m.c);
  const int32_t* tokens = b.indices(kTokens, kVocabulary);
  const double row_bytes = double(kTokens) * double(m.c) * double(b.element_bytes());
  b.memory_bound("gather rows", 2 * row_bytes, [&] {
    return b.ops().gather_rows(b.context(), table, tokens, kTokens, m.c, out);
  });
  b.memory_bound("scatter rows", 3 * row_bytes, [&] {
    return b.ops().scatter_rows_add(b.context(), out, tokens, kTokens, m.c, table);
  });
  float* table_grad = b.floats(kVocabulary * m.c);
  const double grad_bytes = double(kTokens) * double(m.c) * double(b.element_bytes() + 8);
  const auto embed = [&](const int32_t* indices) {
    return [&b, &m, indices, out, table_grad] {
      return b.ops().embedding_backward_add(b.context(), indices, kTokens, out, m.c, kVocabulary,
                                            table_grad);
    };
  };
  b.memory_bound("embedding gradient", grad_bytes, embed(tokens));
  // Eight occurrences of each row: the table's rows are touched once.
  const double eighth_bytes = double(kTokens) * double(m.c) * double(b.element_bytes() + 1);
  b.memory_bound("embedding gradient, rows 8 times", eighth_bytes,
                 embed(b.indices(kTokens, kTokens / 8)));
  b.release_all();
  TmElement* logits = b.elements(kLossRows * kVocabulary);
  auto* losses = static_cast<double*>(b.memory(kLossRows * sizeof(double)));
  TmCrossEntropy loss = {
      logits, kVocabulary, b.indices(kLossRows, kVocabulary), losses, kLossRows, kVocabulary, 1e-4f,
      0};
  const double logit_bytes = double(kLossRows) * double(kVocabulary) * double(b.element_bytes());
  const auto run = [&] { return b.ops().cross_entropy(b.context(), &loss); };
  b.memory_bound("cross entropy", logit_bytes, run);
  loss.dlogits = 1;
  b.memory_bound("cross entropy, gradient", 2 * logit_bytes, run);
}

// From pageable host memory, as the engine reads a model.
void time_packing(Bench& b) {
  constexpr size_t kOut = 14336, kIn = 4096;
  std::vector<float> rows(kOut * kIn, 0.25f);
  TmElement* packed = b.elements(kOut * kIn);
  const double bytes = double(rows.size()) * double(b.element_bytes());
  const double seconds = b.seconds_of(
      [&] { return b.ops().pack_weight(b.context(), rows.data(), kOut, kIn, packed); });
  printf("%-34s %9.1f us  %6.1f GB/s of elements\n", "pack weight", seconds * 1e6,
         bytes / seconds * 1e-9);
}

struct Size {
  const char* name;
  size_t n, in, out;
};

void time_product(Bench& b, const Model& m, const Size& s) {
  const std::string name = std::string(m.name) + " " + s.name;
  TmElement *x = b.elements(s.n * s.in), *w = b.elements(s.out * s.in),
            *y = b.elements(s.n * s.out);
  const double flops = 2.0 * double(s.n) * double(s.in) * double(s.out);
  const TmLinear linear = {x, s.in, {nullptr, w, s.out, s.in}, y, s.out, s.n, 0, 1.0f};
  b.product(name + " forward", flops, [&] { return b.ops().linear_forward(b.context(), &linear); });
  b.product(name + " input gradient", flops,
            [&] { return b.ops().linear_backward_input(b.context(), &linear); });
  if (s.n == kTokens) {  // the head's is of a chunk of rows, and frozen in LoRA
    const TmLinearWeightGrad grad = {y,    s.out, x,    s.in, b.floats(s.out * s.in), s.n, s.out,
                                     s.in, 0,     1.0f, 0};
    b.product(name + " weight gradient", flops,
              [&] { return b.ops().linear_weight_grad(b.context(), &grad); });
  }
  b.release_all();
}

void run_all(Bench& b) {
  const struct {
    const char* name;
    void (*run)(Bench&, const Model&);
  } groups[] = {{"norms", time_norms}, {"activations", time_activations}, {"rows", time_rows}};
  for (const auto& group : groups) {
    if (!b.wants(group.name)) continue;
    group.run(b, kModels[0]);
    b.release_all();
  }
  if (b.wants("small")) time_norms(b, {"135M", 576, 1536, 9, 3, 64});
  b.release_all();
  if (b.wants("adapters")) time_all_adapters(b);
  if (b.wants("tails")) time_tails(b);
  b.release_all();
  if (b.wants("adamw")) time_adamw(b);
  if (b.wants("packing")) time_packing(b);
  if (b.wants("quantised")) {
    for (const Model& m : {kModels[0], kModels[2]}) {
      printf("rows of %s as e4m3 numbers too\n", m.name);
      time_quantised(b, {m.c, m.d, m.heads, m.kv_heads, m.head_size});
    }
  }
  b.release_all();
  if (!b.wants("products")) return;
  for (const Model& m : kModels) {
    const size_t width = m.heads * m.head_size;
    const Size sizes[] = {{"qkv", kTokens, m.c, width + 2 * m.kv_heads * m.head_size},
                          {"o", kTokens, width, m.c},
                          {"gate and up", kTokens, m.c, 2 * m.d},
                          {"down", kTokens, m.d, m.c},
                          {"head", kLossRows, m.c, kVocabulary}};
    for (const Size& size : sizes) time_product(b, m, size);
  }
}

int run(const std::string& path, const std::string& only, TmPrecision precision) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  const auto entry =
      reinterpret_cast<decltype(&::tm_cuda_backend)>(dlsym(library, "tm_cuda_backend"));
  const TmBackend* backend = entry();
  TmContextOptions options{};
  options.size = sizeof options;
  options.precision = precision;
  TmContext* context = nullptr;
  if (backend->create(&options, &context) != TM_OK) {
    fprintf(stderr, "%s\n", backend->last_error());
    return 1;
  }
  printf("%s\n", backend->describe(context));
  Bench bench(backend, context, only);
  run_all(bench);
  backend->destroy(context);
  return 0;
}

}  // namespace
}  // namespace tunemesh::bench

int main(int argc, char** argv) {
  std::string path = "build/native/tunemesh_cuda.so", only;
  TmPrecision precision = TM_BF16;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--fp32") == 0) {
      precision = TM_FP32;
    } else if (strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
      only = argv[++i];
    } else {
      path = argv[i];
    }
  }
  return tunemesh::bench::run(path, only, precision);
}
