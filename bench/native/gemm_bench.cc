// Times the CPU backend's matrix products beside a register-only multiply-add loop on the same
// threads: one JSON object a line. bench/cpu-gemm.ts runs it and prints the table.
//
//   gemm_bench [--threads N] [--path auto|avx2|avx512] [--rounds N] [--only TEXT]
//
// Each round times the loop and then the product, so that both see the same machine. A share is the
// product's rate over the loop's; `share` of wall time (median of the rounds' quotients) and
// `cpu_share` of CPU time, which other processes on the machine disturb less.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bench/native/fma_peak.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"

namespace {

enum class Product { kForward, kForwardRows, kBackwardInput, kBackwardInputRows, kWeightGrad };
const char* const kProductNames[] = {"forward, packed", "forward, rows", "dX, packed", "dX, rows",
                                     "dW"};

struct Shape {
  const char* group;
  Product product;
  size_t n, in, out;
  float alpha;
  bool accumulate;
};

constexpr Product kF = Product::kForward, kFR = Product::kForwardRows;
constexpr Product kB = Product::kBackwardInput, kBR = Product::kBackwardInputRows;
constexpr Product kW = Product::kWeightGrad;

constexpr Shape kShapes[] = {
    {"square", kF, 1024, 1024, 1024, 1, false}, {"square", kFR, 1024, 1024, 1024, 1, false},
    {"square", kB, 1024, 1024, 1024, 1, false}, {"square", kBR, 1024, 1024, 1024, 1, false},
    {"square", kW, 1024, 1024, 1024, 1, false}, {"large", kF, 512, 2048, 8192, 1, false},
    {"large", kF, 512, 8192, 2048, 1, false},   {"large", kF, 64, 2048, 2048, 1, false},
    {"large", kB, 64, 2048, 2048, 1, false},    {"lora", kFR, 512, 2048, 16, 2, false},
    {"lora", kFR, 512, 16, 2048, 1, true},      {"lora", kBR, 512, 16, 2048, 2, false},
    {"lora", kBR, 512, 2048, 16, 1, true},      {"lora", kW, 512, 2048, 16, 1, false},
    {"lora", kW, 512, 16, 2048, 1, false},      {"lora", kFR, 512, 576, 16, 2, false},
    {"lora", kFR, 512, 16, 576, 1, true},       {"lora", kBR, 512, 16, 576, 2, false},
    {"lora", kBR, 512, 576, 16, 1, true},       {"lora", kW, 512, 576, 16, 1, false},
    {"lora", kW, 512, 16, 576, 1, false},       {"smollm2", kF, 512, 576, 576, 1, false},
    {"smollm2", kF, 512, 576, 1536, 1, false},  {"smollm2", kF, 512, 1536, 576, 1, false},
    {"smollm2", kF, 512, 576, 192, 1, false},   {"smollm2", kF, 128, 576, 49152, 1, false},
    {"smollm2", kB, 512, 576, 576, 1, false},   {"smollm2", kB, 512, 576, 1536, 1, false},
    {"smollm2", kB, 512, 1536, 576, 1, false},  {"smollm2", kB, 128, 576, 49152, 1, false},
    {"smollm2", kW, 512, 576, 1536, 1, false},  {"smollm2", kW, 512, 1536, 576, 1, false},
    {"5M", kFR, 2048, 256, 256, 1, false},      {"5M", kFR, 2048, 256, 704, 1, false},
    {"5M", kFR, 2048, 704, 256, 1, false},      {"5M", kFR, 512, 256, 4096, 1, false},
    {"5M", kBR, 2048, 256, 256, 1, false},      {"5M", kBR, 2048, 256, 704, 1, false},
    {"5M", kBR, 2048, 704, 256, 1, false},      {"5M", kBR, 512, 256, 4096, 1, false},
    {"5M", kW, 2048, 256, 256, 1, true},        {"5M", kW, 2048, 256, 704, 1, true},
    {"5M", kW, 2048, 704, 256, 1, true},        {"5M", kW, 512, 256, 4096, 1, true},
    {"one token", kF, 1, 576, 576, 1, false},   {"one token", kF, 1, 576, 1536, 1, false},
    {"one token", kF, 1, 1536, 576, 1, false},  {"one token", kF, 1, 576, 49152, 1, false},
    {"one token", kF, 1, 2048, 8192, 1, false}, {"one token", kFR, 1, 576, 16, 1, false},
    {"one token", kFR, 1, 16, 576, 1, true},
};

double seconds_of(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Time {
  double wall = 0, cpu = 0;
};

template <typename F>
Time time_of(const F& f) {
  const double wall = seconds_of(CLOCK_MONOTONIC), cpu = seconds_of(CLOCK_PROCESS_CPUTIME_ID);
  f();
  return {seconds_of(CLOCK_MONOTONIC) - wall, seconds_of(CLOCK_PROCESS_CPUTIME_ID) - cpu};
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

using tunemesh::bench::kSpinSteps;
using tunemesh::bench::spin;

struct Options {
  int threads = 0, rounds = 15;
  std::string path = "auto", only;
};

struct Bench {
  const TmBackend& cpu;
  TmContext* context;
  tunemesh::ThreadPool pool;
  bool is_avx512;
  Options options;

  // The multiply-add loop on all threads, some 5 ms: rates in flop/s.
  struct Rate {
    double wall, cpu;
  };
  Rate peak() {
    const size_t tasks = 8 * static_cast<size_t>(pool.num_threads());
    std::vector<double> flops(tasks);
    const Time time = time_of([&] {
      pool.parallel_for(tasks,
                        [&](size_t task, int) { flops[task] = spin(is_avx512, kSpinSteps); });
    });
    const double total = flops[0] * static_cast<double>(tasks);
    return {total / time.wall, total / time.cpu};
  }

  float* buffer(size_t floats) {
    void* memory = nullptr;
    if (cpu.allocate(context, floats * sizeof(float), &memory) != TM_OK) exit(3);
    float* data = static_cast<float*>(memory);
    for (size_t i = 0; i < floats; i++)
      data[i] = static_cast<float>(i * 7919 % 1000) * 1e-3f - 0.5f;
    return data;
  }

  void report(const Shape& shape, const std::vector<Time>& times, const std::vector<Rate>& peaks);
  void run(const Shape& shape);
};

void Bench::report(const Shape& shape, const std::vector<Time>& times,
                   const std::vector<Rate>& peaks) {
  const double flops = 2.0 * static_cast<double>(shape.n * shape.in * shape.out);
  std::vector<double> walls, shares, cpu_shares, rates;
  for (size_t i = 0; i < times.size(); i++) {
    const double peak_wall = (peaks[i].wall + peaks[i + 1].wall) / 2;
    const double peak_cpu = (peaks[i].cpu + peaks[i + 1].cpu) / 2;
    walls.push_back(times[i].wall);
    rates.push_back(peak_wall);
    shares.push_back(flops / times[i].wall / peak_wall);
    cpu_shares.push_back(flops / times[i].cpu / peak_cpu);
  }
  const double bytes = 4.0 * static_cast<double>(shape.n * shape.in + shape.in * shape.out +
                                                 shape.n * shape.out * (shape.accumulate ? 2 : 1));
  const double wall = median(walls);
  printf(
      "{\"group\":\"%s\",\"product\":\"%s\",\"n\":%zu,\"in\":%zu,\"out\":%zu,\"path\":\"%s\","
      "\"threads\":%d,\"ms\":%.4f,\"min_ms\":%.4f,\"gflops\":%.1f,\"peak_gflops\":%.1f,"
      "\"share\":%.3f,\"cpu_share\":%.3f,\"gb_per_second\":%.1f}\n",
      shape.group, kProductNames[static_cast<int>(shape.product)], shape.n, shape.in, shape.out,
      cpu.instruction_path(context), pool.num_threads(), wall * 1e3,
      *std::min_element(walls.begin(), walls.end()) * 1e3, flops / wall * 1e-9,
      median(rates) * 1e-9, median(shares), median(cpu_shares), bytes / wall * 1e-9);
  fflush(stdout);
}

void Bench::run(const Shape& s) {
  float* x = buffer(s.n * s.in);
  float* y = buffer(s.n * s.out);
  float* w = buffer(s.out * s.in);
  float* packed = buffer(cpu.packed_weight_elements(s.out, s.in));
  cpu.pack_weight(context, w, s.out, s.in, packed);
  const bool is_rows = s.product == kFR || s.product == kBR;
  TmLinear linear{x,
                  s.in,
                  {is_rows ? w : nullptr, is_rows ? nullptr : packed, s.out, s.in},
                  y,
                  s.out,
                  s.n,
                  s.accumulate,
                  s.alpha};
  TmLinearWeightGrad grad{y, s.out, x, s.in, w, s.n, s.out, s.in, s.accumulate, s.alpha, 0};
  const auto product = [&] {
    if (s.product == kW) return cpu.linear_weight_grad(context, &grad);
    const bool is_forward = s.product == kF || s.product == kFR;
    return is_forward ? cpu.linear_forward(context, &linear)
                      : cpu.linear_backward_input(context, &linear);
  };
  // A sample is at least about 3 ms long.
  product();
  const double once = std::max(time_of(product).wall, 1e-7);
  const size_t repeats =
      std::max<size_t>(1, std::min<size_t>(1000, static_cast<size_t>(3e-3 / once)));
  std::vector<Time> times;
  std::vector<Rate> peaks{peak()};
  for (int round = 0; round < options.rounds; round++) {
    Time time = time_of([&] {
      for (size_t i = 0; i < repeats; i++) product();
    });
    time.wall /= static_cast<double>(repeats);
    time.cpu /= static_cast<double>(repeats);
    times.push_back(time);
    peaks.push_back(peak());
  }
  report(s, times, peaks);
  for (float* memory : {x, y, w, packed}) cpu.release(context, memory);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--threads") options.threads = atoi(argv[i + 1]);
    if (key == "--rounds") options.rounds = std::max(1, atoi(argv[i + 1]));
    if (key == "--path") options.path = argv[i + 1];
    if (key == "--only") options.only = argv[i + 1];
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = parse(argc, argv);
  const TmBackend& cpu = *tm_cpu_backend();
  TmContextOptions context_options{};
  context_options.size = sizeof context_options;
  context_options.num_threads = options.threads;
  context_options.instruction_path = options.path.c_str();
  TmContext* context = nullptr;
  if (cpu.create(&context_options, &context) != TM_OK) {
    fprintf(stderr, "%s\n", cpu.last_error());
    return 2;
  }
  const bool is_avx512 = strcmp(cpu.instruction_path(context), "avx512") == 0;
  {
    Bench bench{cpu, context, tunemesh::ThreadPool(options.threads), is_avx512, options};
    for (const Shape& shape : kShapes) {
      char name[100];
      snprintf(name, sizeof name, "%s %s %zux%zux%zu", shape.group,
               kProductNames[static_cast<int>(shape.product)], shape.n, shape.in, shape.out);
      if (std::string(name).find(options.only) != std::string::npos) bench.run(shape);
    }
  }
  cpu.destroy(context);
  return 0;
}
