// Times whole training steps of the engine (micro-batch, rounding and sum, clip norm, AdamW) on
// random weights, beside the multiply-add peak measured around every step: one JSON object a line.
// bench/cpu-step.ts prints the table.
//
//   step_bench [--threads N] [--path auto|avx2|avx512] [--rounds N] [--only TEXT]
//
// flops of a step: 6 P N for full, (4 P_frozen + 6 P_adapter) N for LoRA, P the matrices' elements
// with the tied head counted once; attention 6 T^2 H F per layer and row of T tokens (causal,
// forward once and backward twice).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "bench/native/bench_model.h"
#include "bench/native/fma_peak.h"

namespace tunemesh::bench {
namespace {

struct Work {
  const char* name;
  const char* model;
  StepWork step;
};
constexpr Work kWorks[] = {{"5M full 8x256", "tiny-5m", {true, 8, 256, 256}},
                           {"135M LoRA r=16 2x256", "smollm2-135m", {false, 2, 256, 256}}};

struct Options {
  int threads = 0, rounds = 5;
  std::string path = "auto", only;
};

double flops_of(const Work& work, const ModelConfig& config, size_t num_trained) {
  double matrices = 0;
  for (const TensorShape& tensor : model_tensors(config)) {
    if (tensor.shape.size() == 2) matrices += static_cast<double>(tensor.num_elements());
  }
  const double tokens = static_cast<double>(work.step.num_tokens());
  const double attention = 6.0 * static_cast<double>(work.step.row_tokens * config.query_width()) *
                           static_cast<double>(config.num_layers);
  const double products =
      work.step.is_full ? 6 * matrices : 4 * matrices + 6 * static_cast<double>(num_trained);
  return tokens * (products + attention);
}

void one_step(Engine& engine, const TokenBatch& batch, size_t step) {
  ExchangeBuffers& exchange = *engine.exchange();
  exchange.clear_slot(0);
  engine.micro_batch(batch, static_cast<double>(batch.num_tokens), 0);
  double sum_squares = 0;
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    exchange.clear_sum(slice);
    exchange.add_own_contribution(0, slice);
    sum_squares += exchange.finish_slice(step, slice).sum_squares;
  }
  engine.apply_update(step, clipped_update(step, sum_squares));
}

void run(const Work& work, const Options& options) {
  EngineOptions engine_options;
  engine_options.config = config_of(*find_model_shape(work.model), work.step.row_tokens);
  engine_options.device.num_threads = options.threads;
  engine_options.device.instruction_path = options.path;
  const ModelConfig config = engine_options.config;
  Engine engine(tm_cpu_backend(), engine_options, std::make_unique<RandomSource>(config));
  engine.load();
  TrainSpec spec = spec_of(work.step);
  spec.num_contribution_slots = 1;
  spec.slice_blocks = 4096;
  spec.chunk_blocks = 256;
  const MemoryPlan memory = engine.prepare(spec);
  const TmBackend& ops = engine.device().ops();
  const int threads = ops.num_threads(engine.device().context());
  const char* path = ops.instruction_path(engine.device().context());
  ThreadPool pool(threads);

  const size_t n = work.step.num_tokens();
  const RandomTokens tokens(work.step, config.vocab_size);
  const TokenBatch batch = tokens.batch();
  const double flops = flops_of(work, config, memory.num_trained_parameters);

  one_step(engine, batch, 1);
  std::vector<double> seconds, shares;
  for (int round = 0; round < options.rounds; ++round) {
    const double before = fma_peak(pool, std::strcmp(path, "avx512") == 0);
    const auto start = std::chrono::steady_clock::now();
    one_step(engine, batch, static_cast<size_t>(round) + 2);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    const double after = fma_peak(pool, std::strcmp(path, "avx512") == 0);
    seconds.push_back(elapsed.count());
    shares.push_back(flops / elapsed.count() / ((before + after) / 2));
  }
  std::sort(seconds.begin(), seconds.end());
  std::sort(shares.begin(), shares.end());
  const double median = seconds[seconds.size() / 2];
  const double share = shares[shares.size() / 2];
  std::printf(
      "{\"work\":\"%s\",\"path\":\"%s\",\"threads\":%d,\"ms\":%.1f,\"min_ms\":%.1f,"
      "\"tokens_per_second\":%.1f,\"gflops\":%.1f,\"peak_gflops\":%.1f,\"share\":%.4f,"
      "\"plan_bytes\":%zu}\n",
      work.name, path, threads, median * 1e3, seconds[0] * 1e3, static_cast<double>(n) / median,
      flops / median * 1e-9, flops / median / share * 1e-9, share, memory.total_bytes);
  std::fflush(stdout);
}

}  // namespace
}  // namespace tunemesh::bench

int main(int argc, char** argv) {
  using namespace tunemesh::bench;
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i];
    if (key == "--threads") options.threads = std::atoi(argv[i + 1]);
    if (key == "--rounds") options.rounds = std::max(1, std::atoi(argv[i + 1]));
    if (key == "--path") options.path = argv[i + 1];
    if (key == "--only") options.only = argv[i + 1];
  }
  try {
    for (const Work& work : kWorks) {
      if (std::string(work.name).find(options.only) != std::string::npos) run(work, options);
    }
  } catch (const tunemesh::EngineError& error) {
    std::fprintf(stderr, "%s %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return 0;
}
