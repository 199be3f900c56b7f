// Times the CUDA backend's operations in bf16 at the sizes of Llama models and 8192 tokens: what is
// bound by memory in bytes a second (the least that it must move) and as a share of an H100's copy,
// products in TFLOP/s.
//
//   cuda_ops_bench [tunemesh_cuda.so] [--only TEXT] [--fp32]
//
// Wall clock around as many launches as take a tenth of a second, median of five.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/plugin.h"

namespace tunemesh::bench {
namespace {

constexpr size_t kTokens = 8192;
constexpr size_t kLossRows = 2048;
constexpr size_t kVocabulary = 128256;
constexpr double kCopyRate = 3.03e12;  // bytes a second that an H100 SXM copies, both ways added
constexpr int kRounds = 5;
constexpr double kRoundSeconds = 0.1;

struct Model {
  const char* name;
  size_t c, d, heads, kv_heads, head_size;
};
constexpr Model kModels[] = {
    {"8B", 4096, 14336, 32, 8, 128}, {"3B", 3072, 8192, 24, 8, 128}, {"1B", 2048, 8192, 32, 8, 64}};

double now() {
  const auto elapsed = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(elapsed).count();
}

class Bench {
 public:
  Bench(const TmBackend* backend, TmContext* context, std::string only)
      : backend_(*backend), context_(context), only_(std::move(only)) {
    pattern_.resize(size_t{16} << 20);
    uint32_t state = 1;
    for (uint16_t& half : pattern_) {
      state = state * 1664525 + 1013904223;
      // Either sign, magnitudes of [0.25, 2): zeros would draw less power.
      half = static_cast<uint16_t>((state >> 16 & 0x8000) | (0x3e80 + (state >> 8 & 0xffff) % 384));
    }
  }

  const TmBackend& ops() const { return backend_; }
  TmContext* context() const { return context_; }
  size_t element_bytes() const { return backend_.element_bytes(context_); }

  void check(TmStatus status) const {
    if (status == TM_OK) return;
    fprintf(stderr, "status %d: %s\n", status, backend_.last_error());
    exit(1);
  }

  // Device memory with a pattern that is sound as bf16 and as float; lives until release_all.
  void* memory(size_t bytes) {
    void* memory = nullptr;
    check(backend_.allocate(context_, bytes, &memory));
    buffers_.push_back(memory);
    const size_t most = pattern_.size() * sizeof(uint16_t);
    for (size_t done = 0; done < bytes; done += most) {
      const size_t part = std::min(most, bytes - done);
      check(backend_.copy_in(context_, static_cast<char*>(memory) + done, pattern_.data(), part));
    }
    return memory;
  }
  TmElement* elements(size_t count) {
    return static_cast<TmElement*>(memory(count * element_bytes()));
  }
  float* floats(size_t count) { return static_cast<float*>(memory(count * sizeof(float))); }
  int32_t* indices(size_t count, size_t limit) {
    std::vector<int32_t> values(count);
    for (size_t i = 0; i < count; ++i) {
      values[i] = static_cast<int32_t>(i * 2654435761u % limit);
    }
    void* device = memory(count * sizeof(int32_t));
    check(backend_.copy_in(context_, device, values.data(), count * sizeof(int32_t)));
    return static_cast<int32_t*>(device);
  }
  void release_all() {
    for (void* buffer : buffers_) backend_.release(context_, buffer);
    buffers_.clear();
  }

  bool wants(const std::string& name) const { return name.find(only_) != std::string::npos; }

  double seconds_of(const std::function<TmStatus()>& call) const {
    for (int i = 0; i < 3; ++i) check(call());
    check(backend_.synchronize(context_));
    std::vector<double> times;
    size_t launches = 1;
    while (times.size() < kRounds) {
      const double start = now();
      for (size_t i = 0; i < launches; ++i) check(call());
      check(backend_.synchronize(context_));
      const double seconds = now() - start;
      if (seconds < kRoundSeconds / 2) {
        launches = std::max(launches + 1, static_cast<size_t>(static_cast<double>(launches) *
                                                              kRoundSeconds / seconds));
        continue;
      }
      times.push_back(seconds / static_cast<double>(launches));
    }
    std::sort(times.begin(), times.end());
    return times[kRounds / 2];
  }

  void memory_bound(const std::string& name, double bytes, const std::function<TmStatus()>& call) {
    const double seconds = seconds_of(call);
    printf("%-34s %9.1f us  %6.3f TB/s  %5.1f %% of copy\n", name.c_str(), seconds * 1e6,
           bytes / seconds * 1e-12, 100 * bytes / seconds / kCopyRate);
    fflush(stdout);
  }
  void product(const std::string& name, double flops, const std::function<TmStatus()>& call) {
    const double seconds = seconds_of(call);
    printf("%-34s %9.1f us  %6.1f TFLOP/s\n", name.c_str(), seconds * 1e6, flops / seconds * 1e-12);
    fflush(stdout);
  }

 private:
  const TmBackend& backend_;
  TmContext* context_;
  std::string only_;
  std::vector<uint16_t> pattern_;
  std::vector<void*> buffers_;
};

void time_norms(Bench& b, const Model& m) {
  const double row_bytes = double(kTokens) * double(m.c) * double(b.element_bytes());
  TmElement *x = b.elements(kTokens * m.c), *y = b.elements(kTokens * m.c);
  TmElement* dx = b.elements(kTokens * m.c);
  float *gain = b.floats(m.c), *rstd = b.floats(kTokens), *dgain = b.floats(m.c);
  const TmRmsNorm forward = {x, gain, y, rstd, kTokens, m.c, m.c, m.c, 1e-5f, 0};
  b.memory_bound("rms norm forward", 2 * row_bytes,
                 [&] { return b.ops().rms_norm_forward(b.context(), &forward); });
  TmRmsNormBackward backward = {y, x, gain, rstd, dx, nullptr, kTokens, m.c, m.c, m.c, m.c, 0, 0};
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
  const TmSwiGlu forward = {both, up, out, kTokens, m.d, 2 * m.d, m.d};
  b.memory_bound("swiglu forward", 3 * row_bytes,
                 [&] { return b.ops().swiglu_forward(b.context(), &forward); });
  TmSwiGluBackward backward = {dout, both, up, both, up, nullptr, kTokens, m.d, 2 * m.d, m.d};
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

struct AdaptedGroup {
  const char* name;
  size_t n;
  TmGroupShape shape;
};

// Rank 16; beside them what cuBLASLt takes for the same matrices one by one.
void time_adapters(Bench& b, const AdaptedGroup& group) {
  constexpr size_t kBorder = 64;
  const TmGroupShape& shape = group.shape;
  TmGroupAdapterGrads call = {};
  size_t out = 0, ranks = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    out += shape.out[part];
    ranks += shape.rank;
    call.lora_a[part] = b.floats(shape.rank * shape.in);
    call.lora_b[part] = b.floats(shape.rank * shape.out[part]);
  }
  call.shape = &shape;
  call.n = group.n;
  call.x_stride = shape.in + kBorder;
  call.x = b.elements(group.n * call.x_stride);
  call.x_tail_stride = kBorder;
  call.x_tail = b.elements(group.n * kBorder);
  call.dy_stride = out + kBorder;
  TmElement* const dy = b.elements(group.n * call.dy_stride);
  call.dy = dy;
  const double bytes =
      double(group.n) * double(shape.in + out + 2 * ranks) * double(b.element_bytes());
  const std::string name = std::string("adapters of ") + group.name;
  b.memory_bound(name, bytes, [&] { return b.ops().group_adapter_grads(b.context(), &call); });
  const auto at = [&](size_t column) {
    return reinterpret_cast<TmElement*>(reinterpret_cast<char*>(dy) + column * b.element_bytes());
  };
  b.memory_bound(name + ", products", bytes, [&] {
    TmLinearWeightGrad grad = {
        at(out), call.dy_stride, call.x, call.x_stride, call.lora_a[0], group.n,
        ranks,   shape.in,       0,      1.0f};
    TmStatus status = shape.num_parts == 1 ? b.ops().linear_weight_grad(b.context(), &grad) : TM_OK;
    for (size_t part = 0, column = 0; part < shape.num_parts; column += shape.out[part++]) {
      grad = {at(column),
              call.dy_stride,
              call.x_tail,
              call.x_tail_stride,
              call.lora_b[part],
              group.n,
              shape.out[part],
              shape.rank,
              0,
              1.0f};
      if (status == TM_OK) status = b.ops().linear_weight_grad(b.context(), &grad);
      if (shape.num_parts == 1) continue;
      grad = {at(out + part * shape.rank),
              call.dy_stride,
              call.x,
              call.x_stride,
              call.lora_a[part],
              group.n,
              shape.rank,
              shape.in,
              0,
              1.0f};
      if (status == TM_OK) status = b.ops().linear_weight_grad(b.context(), &grad);
    }
    return status;
  });
  b.release_all();
}

// A group's tail: 64 columns by the plugin's kernel, 72 by cuBLASLt.
void time_tails(Bench& b) {
  const struct {
    const char* name;
    size_t n, k;
    bool is_forward;
  } tails[] = {{"8B qkv forward", kTokens, 4096, true},
               {"8B down forward", kTokens, 14336, true},
               {"8B gate, up backward", kTokens, 28672, false},
               {"135M qkv forward", 4096, 576, true},
               {"135M gate, up backward", 4096, 3072, false}};
  for (const auto& tail : tails) {
    for (const size_t m : {size_t{64}, size_t{72}}) {
      const size_t out = tail.is_forward ? m : tail.k, in = tail.is_forward ? tail.k : m;
      TmElement *x = b.elements(tail.n * in), *y = b.elements(tail.n * out);
      const TmLinear call = {x, in,  {nullptr, b.elements(out * in), out, in}, y, out, tail.n,
                             0, 0.5f};
      const double bytes = double(tail.n) * double(tail.k + m) * double(b.element_bytes());
      b.memory_bound(std::string("tail ") + tail.name + " " + std::to_string(m), bytes, [&] {
        return tail.is_forward ? b.ops().linear_forward(b.context(), &call)
                               : b.ops().linear_backward_input(b.context(), &call);
      });
      b.release_all();
    }
  }
}

void time_all_adapters(Bench& b) {
  const AdaptedGroup groups[] = {
      {"8B qkv", kTokens, {4096, 3, {4096, 1024, 1024}, {1, 1, 1}, 16, 0, 0}},
      {"8B o", kTokens, {4096, 1, {4096}, {1, 0, 0}, 16, 0, 0}},
      {"8B gate, up", kTokens, {4096, 2, {14336, 14336}, {1, 1, 0}, 16, 0, 0}},
      {"8B down", kTokens, {14336, 1, {4096}, {1, 0, 0}, 16, 0, 0}},
      {"135M qkv", 4096, {576, 3, {576, 192, 192}, {1, 1, 1}, 16, 0, 0}},
      {"135M gate, up", 4096, {576, 2, {1536, 1536}, {1, 1, 0}, 16, 0, 0}},
      {"135M down", 4096, {1536, 1, {576}, {1, 0, 0}, 16, 0, 0}},
  };
  for (const AdaptedGroup& group : groups) time_adapters(b, group);
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
    const TmLinearWeightGrad grad = {y,   s.out, x,    s.in, b.floats(s.out * s.in),
                                     s.n, s.out, s.in, 0,    1.0f};
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
  if (b.wants("packing")) time_packing(b);
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
