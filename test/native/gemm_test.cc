// Matrix products of the CPU backend: against a product in double, against the definition (one fma
// chain an element) to the bit, on every instruction path and with 1, 2 and 3 threads.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "kernels/backend.h"

namespace {

int num_passed = 0, num_failed = 0;

void check(bool ok, const std::string& what) {
  ok ? num_passed++ : num_failed++;
  if (!ok) printf("FAILED %s\n", what.c_str());
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  size_t below(size_t limit) { return next() % limit; }
  float value() { return static_cast<float>(next() % 2000001) / 1e6f - 1.0f; }
};

// A row-major matrix with a stride beyond its width; the gaps hold a value that must survive.
struct Matrix {
  static constexpr float kGap = 12345.0f;
  size_t rows, columns, stride;
  std::vector<float> data;

  Matrix(size_t r, size_t c, size_t gap) : rows(r), columns(c), stride(c + gap) {
    data.assign(rows * stride, kGap);
  }
  void fill(Random& random) {
    for (size_t i = 0; i < rows; i++) {
      for (size_t j = 0; j < columns; j++) at(i, j) = random.value();
    }
  }
  float& at(size_t i, size_t j) { return data[i * stride + j]; }
  float at(size_t i, size_t j) const { return data[i * stride + j]; }
  bool has_same_bits(const Matrix& other) const {
    return memcmp(data.data(), other.data.data(), data.size() * sizeof(float)) == 0;
  }
};

enum class Product { kForward, kBackwardInput, kWeightGrad };
const char* const kProductNames[] = {"forward", "backward_input", "weight_grad"};

struct Case {
  Product product;
  size_t n, in, out;
  float alpha;
  bool accumulate;
  size_t gap;
};

std::string describe(const Case& c) {
  char text[200];
  snprintf(text, sizeof text, "%s n=%zu in=%zu out=%zu alpha=%g accumulate=%d gap=%zu",
           kProductNames[static_cast<int>(c.product)], c.n, c.in, c.out,
           static_cast<double>(c.alpha), c.accumulate, c.gap);
  return text;
}

// The operands of a case; `result` holds the values that the product adds to.
struct Operands {
  Matrix x, w, y, result;

  explicit Operands(const Case& c, Random& random)
      : x(c.n, c.in, c.gap), w(c.out, c.in, 0), y(c.n, c.out, c.gap * 2), result(0, 0, 0) {
    x.fill(random);
    w.fill(random);
    y.fill(random);
    result = c.product == Product::kForward ? y : c.product == Product::kBackwardInput ? x : w;
  }
};

// Element (i, j) of the product: its length, and the two factors at k.
struct Factors {
  const Case& c;
  const Operands& o;
  size_t depth() const {
    return c.product == Product::kForward         ? c.in
           : c.product == Product::kBackwardInput ? c.out
                                                  : c.n;
  }
  float a(size_t i, size_t k) const {
    return c.product == Product::kForward         ? o.x.at(i, k)
           : c.product == Product::kBackwardInput ? o.y.at(i, k)
                                                  : o.y.at(k, i);
  }
  float b(size_t k, size_t j) const {
    return c.product == Product::kForward         ? o.w.at(j, k)
           : c.product == Product::kBackwardInput ? o.w.at(k, j)
                                                  : o.x.at(k, j);
  }
};

// The definition: one fma chain an element. Also checks it against the product in double; the bound
// is the usual one for a chain of k + 1 roundings, (k + 2) u sum |a b|, u = 2^-24.
Matrix expected_of(const Case& c, const Operands& o) {
  const Factors f{c, o};
  Matrix expected = o.result;
  bool is_close = true;
  for (size_t i = 0; i < expected.rows; i++) {
    for (size_t j = 0; j < expected.columns; j++) {
      float chain = c.accumulate ? o.result.at(i, j) : 0.0f;
      double exact = static_cast<double>(chain), size = fabs(exact);
      for (size_t k = 0; k < f.depth(); k++) {
        const float a = f.a(i, k) * c.alpha, b = f.b(k, j);
        chain = fmaf(a, b, chain);
        const double term =
            static_cast<double>(f.a(i, k)) * static_cast<double>(c.alpha) * static_cast<double>(b);
        exact += term;
        size += fabs(term);
      }
      const double bound = (static_cast<double>(f.depth()) + 2.0) * ldexp(1.0, -24) * size;
      is_close = is_close && fabs(static_cast<double>(chain) - exact) <= bound + 1e-300;
      expected.at(i, j) = chain;
    }
  }
  check(is_close, describe(c) + ": the chain is within its bound of the product in double");
  return expected;
}

enum class WeightForm { kRows, kPacked, kBoth };
const char* const kFormNames[] = {"rows", "packed", "rows and packed"};

TmStatus run(const TmBackend& cpu, TmContext* context, const Case& c, Operands& o,
             const float* packed, WeightForm form) {
  if (c.product == Product::kWeightGrad) {
    TmLinearWeightGrad args{};
    args.dy = o.y.data.data();
    args.dy_stride = o.y.stride;
    args.x = o.x.data.data();
    args.x_stride = o.x.stride;
    args.dw = o.result.data.data();
    args.n = c.n;
    args.out = c.out;
    args.in = c.in;
    args.accumulate = c.accumulate;
    args.alpha = c.alpha;
    return cpu.linear_weight_grad(context, &args);
  }
  const bool is_forward = c.product == Product::kForward;
  TmLinear args{};
  args.x = is_forward ? o.x.data.data() : o.result.data.data();
  args.x_stride = o.x.stride;
  args.y = is_forward ? o.result.data.data() : o.y.data.data();
  args.y_stride = o.y.stride;
  args.w.rows = form == WeightForm::kPacked ? nullptr : o.w.data.data();
  args.w.packed = form == WeightForm::kRows ? nullptr : packed;
  args.w.out = c.out;
  args.w.in = c.in;
  args.n = c.n;
  args.accumulate = c.accumulate;
  args.alpha = c.alpha;
  return is_forward ? cpu.linear_forward(context, &args)
                    : cpu.linear_backward_input(context, &args);
}

struct Context {
  const TmBackend& cpu;
  std::string name;
  TmContext* handle = nullptr;
};

std::vector<Context> all_contexts(const TmBackend& cpu) {
  std::vector<Context> contexts;
  for (const char* path : {"generic", "avx2", "avx512"}) {
    for (int threads : {1, 2, 3}) {
      TmContextOptions options{};
      options.size = sizeof options;
      options.num_threads = threads;
      options.instruction_path = path;
      Context context{cpu, std::string(path) + " x" + std::to_string(threads)};
      if (cpu.create(&options, &context.handle) != TM_OK) {
        printf("skipped %s: %s\n", context.name.c_str(), cpu.last_error());
        continue;
      }
      check(std::string(cpu.instruction_path(context.handle)) == path, "path of " + context.name);
      check(cpu.num_threads(context.handle) == threads, "threads of " + context.name);
      contexts.push_back(context);
    }
  }
  return contexts;
}

void check_case(const std::vector<Context>& contexts, const Case& c, uint64_t seed) {
  Random random{seed};
  const Operands operands(c, random);
  const Matrix expected = expected_of(c, operands);
  std::vector<float> first_packed;
  for (const Context& context : contexts) {
    const TmBackend& cpu = context.cpu;
    std::vector<float> packed(cpu.packed_weight_elements(c.out, c.in), -7.0f);
    cpu.pack_weight(context.handle, operands.w.data.data(), c.out, c.in, packed.data());
    if (first_packed.empty()) first_packed = packed;
    check(packed == first_packed, describe(c) + ": packed weight of " + context.name);
    const int num_forms = c.product == Product::kWeightGrad ? 1 : 3;
    for (int form = 0; form < num_forms; form++) {
      Operands copy = operands;
      const TmStatus status =
          run(cpu, context.handle, c, copy, packed.data(), static_cast<WeightForm>(form));
      check(status == TM_OK && copy.result.has_same_bits(expected),
            describe(c) + ", weight as " + kFormNames[form] + ": bits on " + context.name);
    }
  }
}

void check_shapes(const std::vector<Context>& contexts) {
  constexpr size_t kSizes[][3] = {
      {1, 1, 1},      {1, 64, 96},   {1, 385, 33},  {2, 31, 65},   {3, 17, 16},
      {5, 16, 130},   {7, 100, 4},   {11, 8, 48},   {12, 32, 32},  {13, 384, 64},
      {25, 385, 31},  {64, 20, 100}, {97, 770, 16}, {33, 16, 770}, {200, 40, 61},
      {130, 33, 257}, {400, 36, 40}, {9, 40, 1100}, {9, 1100, 40},
  };
  uint64_t seed = 1;
  for (const auto& size : kSizes) {
    for (int product = 0; product < 3; product++) {
      for (int variant = 0; variant < 3; variant++) {
        const Case c{static_cast<Product>(product),
                     size[0],
                     size[1],
                     size[2],
                     variant == 1 ? 0.37f : 1.0f,
                     variant == 2,
                     static_cast<size_t>(variant)};
        check_case(contexts, c, seed++);
      }
    }
  }
}

void check_random_shapes(const std::vector<Context>& contexts) {
  Random random{20261124};
  for (int i = 0; i < 40; i++) {
    Case c{};
    c.product = static_cast<Product>(random.below(3));
    c.n = 1 + random.below(150);
    c.in = 1 + random.below(150);
    c.out = 1 + random.below(150);
    c.alpha = random.below(2) == 0 ? 1.0f : random.value();
    c.accumulate = random.below(2) == 0;
    c.gap = random.below(20);
    check_case(contexts, c, 1000 + static_cast<uint64_t>(i));
  }
}

void check_empty(const Context& context) {
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    float dw[6] = {1, 2, 3, 4, 5, 6};
    TmLinearWeightGrad args{};
    args.dw = dw;
    args.out = args.dy_stride = 2;
    args.in = args.x_stride = 3;
    args.alpha = 1.0f;
    args.accumulate = accumulate;
    const bool is_ok = context.cpu.linear_weight_grad(context.handle, &args) == TM_OK;
    check(is_ok && dw[5] == (accumulate ? 6.0f : 0.0f), "no tokens give a gradient of zero");
  }
}

void check_refusals(const Context& context) {
  const TmBackend& cpu = context.cpu;
  TmLinear args{};
  args.x_stride = args.y_stride = 8;
  args.w.out = args.w.in = 8;
  check(cpu.linear_forward(context.handle, &args) == TM_BAD_ARGUMENT, "a weight without data");
  float w[64] = {};
  args.w.rows = w;
  args.x_stride = 7;
  check(cpu.linear_backward_input(context.handle, &args) == TM_BAD_ARGUMENT, "a short stride");

  TmContextOptions options{};
  TmContext* handle = nullptr;
  check(cpu.create(&options, &handle) == TM_BAD_ARGUMENT && !handle, "options without a size");
  options.size = sizeof options;
  options.instruction_path = "sse9";
  check(cpu.create(&options, &handle) == TM_BAD_ARGUMENT && !handle, "an unknown path");
  check(strstr(cpu.last_error(), "sse9") != nullptr, "the error names the path");
  options.instruction_path = "auto";
  options.num_threads = -1;
  check(cpu.create(&options, &handle) == TM_BAD_ARGUMENT && !handle, "a negative thread count");
}

void check_memory(const Context& context) {
  const TmBackend& cpu = context.cpu;
  void* memory = nullptr;
  check(cpu.allocate(context.handle, 100, &memory) == TM_OK, "allocate");
  check(reinterpret_cast<uintptr_t>(memory) % 64 == 0, "memory is aligned to 64 bytes");
  char in[100], out[100];
  memset(in, 7, sizeof in);
  cpu.copy_in(context.handle, memory, in, sizeof in);
  cpu.fill_zero(context.handle, static_cast<char*>(memory) + 50, 50);
  cpu.copy_out(context.handle, out, memory, sizeof out);
  check(out[49] == 7 && out[50] == 0 && out[99] == 0, "copy in, fill with zeros, copy out");
  check(cpu.synchronize(context.handle) == TM_OK, "synchronize");
  cpu.release(context.handle, memory);
  check(cpu.allocate(context.handle, SIZE_MAX - 8, &memory) == TM_OUT_OF_MEMORY && !memory,
        "an impossible size is refused");
}

}  // namespace

int main() {
  const TmBackend& cpu = *tm_cpu_backend();
  std::vector<Context> contexts = all_contexts(cpu);
  check_refusals(contexts.front());
  check_memory(contexts.front());
  for (const Context& context : contexts) check_empty(context);
  check_shapes(contexts);
  check_random_shapes(contexts);
  for (Context& context : contexts) cpu.destroy(context.handle);
  printf("%d passed, %d failed\n", num_passed, num_failed);
  return num_failed == 0 ? 0 : 1;
}
