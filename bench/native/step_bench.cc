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
#include <map>

#include "bench/native/fma_peak.h"
#include "engine/engine.h"
#include "engine/philox.h"

namespace tunemesh::bench {
namespace {

class RandomSource : public WeightSource {
 public:
  explicit RandomSource(const ModelConfig& config) {
    for (const TensorShape& tensor : model_tensors(config)) shapes_[tensor.name] = tensor.shape;
  }
  bool has(const std::string& name) const override { return shapes_.count(name) != 0; }
  std::vector<std::string> names() const override { return {}; }
  std::vector<size_t> shape(const std::string& name) const override { return shapes_.at(name); }
  void read(const std::string& name, size_t first, size_t count, float* out) const override {
    const bool is_norm = shapes_.at(name).size() == 1;
    for (size_t i = 0; i < count; ++i) {
      const float unit = philox_uniform(1, PhiloxStream::kTest, first + i);
      out[i] = is_norm ? 1.0f : (unit - 0.5f) * 0.07f;
    }
  }
  std::string fingerprint() const override { return "random"; }
  std::string description() const override { return "random weights"; }
  std::string error_code() const override { return "MODEL_INVALID"; }

 private:
  std::map<std::string, std::vector<size_t>> shapes_;
};

struct Work {
  const char* name;
  bool is_full;
  size_t rows, row_tokens;
  size_t vocabulary, hidden, feed_forward, layers, heads, kv_heads;
};
constexpr Work kWorks[] = {{"5M full 8x256", true, 8, 256, 4096, 256, 704, 5, 4, 2},
                           {"135M LoRA r=16 2x256", false, 2, 256, 49152, 576, 1536, 30, 9, 3}};

struct Options {
  int threads = 0, rounds = 5;
  std::string path = "auto", only;
};

ModelConfig config_of(const Work& work) {
  ModelConfig config;
  config.family = "llama";
  config.vocab_size = work.vocabulary;
  config.hidden_size = work.hidden;
  config.intermediate_size = work.feed_forward;
  config.num_layers = work.layers;
  config.num_heads = work.heads;
  config.num_kv_heads = work.kv_heads;
  config.head_size = 64;
  config.max_position_embeddings = 2048;
  config.rms_norm_epsilon = 1e-6;
  config.rotary_theta = 10000;
  config.tie_word_embeddings = true;
  return config;
}

TrainSpec spec_of(const Work& work) {
  TrainSpec spec;
  spec.is_full = work.is_full;
  if (!work.is_full) {
    spec.lora = {16,
                 32,
                 {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
                 false};
  }
  spec.tokens_per_micro_batch = work.rows * work.row_tokens;
  spec.longest_document = work.row_tokens;
  spec.loss_chunk_rows = 256;
  spec.beta1 = 0.9;
  spec.beta2 = 0.999;
  spec.epsilon = 1e-8f;
  spec.num_contribution_slots = 1;
  spec.slice_blocks = 4096;
  spec.chunk_blocks = 256;
  return spec;
}

double flops_of(const Work& work, const ModelConfig& config, size_t num_trained) {
  double matrices = 0;
  for (const TensorShape& tensor : model_tensors(config)) {
    if (tensor.shape.size() == 2) matrices += static_cast<double>(tensor.num_elements());
  }
  const double tokens = static_cast<double>(work.rows * work.row_tokens);
  const double attention = 6.0 * static_cast<double>(work.row_tokens * config.query_width()) *
                           static_cast<double>(config.num_layers);
  const double products =
      work.is_full ? 6 * matrices : 4 * matrices + 6 * static_cast<double>(num_trained);
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
  AdamWNumbers numbers = {};
  numbers.learning_rate = 1e-4f;
  numbers.clip_factor = static_cast<float>(std::min(1.0, 1.0 / (std::sqrt(sum_squares) + 1e-6)));
  numbers.bias_correction1 = static_cast<float>(1 - std::pow(0.9, static_cast<double>(step)));
  numbers.bias_correction2_sqrt =
      static_cast<float>(std::sqrt(1 - std::pow(0.999, static_cast<double>(step))));
  engine.apply_update(step, numbers);
}

void run(const Work& work, const Options& options) {
  EngineOptions engine_options;
  engine_options.config = config_of(work);
  engine_options.device.num_threads = options.threads;
  engine_options.device.instruction_path = options.path;
  const ModelConfig config = engine_options.config;
  Engine engine(tm_cpu_backend(), engine_options, std::make_unique<RandomSource>(config));
  engine.load();
  const MemoryPlan memory = engine.prepare(spec_of(work));
  const TmBackend& ops = engine.device().ops();
  const int threads = ops.num_threads(engine.device().context());
  const char* path = ops.instruction_path(engine.device().context());
  ThreadPool pool(threads);

  const size_t n = work.rows * work.row_tokens;
  std::vector<int32_t> tokens(n), targets(n), starts;
  for (size_t i = 0; i < n; ++i) {
    tokens[i] = static_cast<int32_t>(philox_bits(2, PhiloxStream::kTest, i) % work.vocabulary);
    targets[i] = static_cast<int32_t>(philox_bits(3, PhiloxStream::kTest, i) % work.vocabulary);
  }
  for (size_t row = 0; row <= work.rows; ++row) {
    starts.push_back(static_cast<int32_t>(row * work.row_tokens));
  }
  const TokenBatch batch = {tokens.data(), targets.data(), n, starts.data(), work.rows};
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
