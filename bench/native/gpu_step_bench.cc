// Times the engine's own training step on one device, without a mesh: one micro-batch or several,
// gradient norm, clip at 1.0 and AdamW, on random weights of a real shape (local mode). Prints one
// JSON object; bench/gpu.ts makes rows and tables of it. With --exchange the step is that of a
// mesh's worker on its own (exchange_step.h), rounding on the device or on the host.
//
//   gpu_step_bench --model NAME --method lora|full --batch N --seq N [--precision bf16|fp32|fp8]
//                  [--warmup N] [--steps N] [--loss-rows N] [--profile 1] [--ceilings 1]
//                  [--accumulation N] [--memory-gib X] [--graphs on|off]
//                  [--mode deterministic|free] [--device cuda|cpu] [--plugin PATH]
//                  [--libraries DIR] [--threads N] [--fp32-master 1] [--adamw-8bit 1]
//                  [--exchange off|device|host] [--fused-quantise on|off]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "bench/native/bench_model.h"
#include "bench/native/card.h"
#include "bench/native/exchange_step.h"
#include "bench/native/gpu_ceilings.h"
#include "bench/native/separate_quantise.h"
#include "bench/native/timed_backend.h"
#include "engine/backend_plugin.h"

namespace tunemesh::bench {
namespace {

struct Options {
  std::map<std::string, std::string> values;

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = values.find(name);
    return found == values.end() ? otherwise : found->second;
  }
  size_t count(const std::string& name, size_t otherwise) const {
    const auto found = values.find(name);
    if (found == values.end()) return otherwise;
    const long value = std::atol(found->second.c_str());
    if (value >= 1) return static_cast<size_t>(value);
    throw EngineError("JOB_INVALID", "--" + name + " is " + found->second + "; use 1 or more.");
  }
  // 0 where it is not given.
  size_t gibibytes(const std::string& name) const {
    const auto found = values.find(name);
    if (found == values.end()) return 0;
    const double value = std::atof(found->second.c_str());
    if (value > 0 && value < 4096) return static_cast<size_t>(value * 0x1p30);
    throw EngineError("JOB_INVALID", "--" + name + " is " + found->second + "; use a size in GiB.");
  }
  bool is_set(const std::string& name) const { return values.count(name) != 0; }
};

std::string built_plugin() {
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  return here.parent_path() / "native" / "tunemesh_cuda.so";
}

const ModelShape& shape_of(const Options& options) {
  const std::string name = options.text("model", "");
  if (const ModelShape* found = find_model_shape(name)) return *found;
  std::string known;
  for (const ModelShape& shape : kModelShapes) known += std::string(" ") + shape.name;
  throw EngineError("JOB_INVALID", "--model is \"" + name + "\"; there are:" + known + ".");
}

StepWork work_of(const Options& options) {
  const std::string method = options.text("method", "lora");
  if (method != "lora" && method != "full") {
    throw EngineError("JOB_INVALID", "--method is " + method + "; use lora or full.");
  }
  return {method == "full", options.count("batch", 1), options.count("seq", 512),
          options.count("loss-rows", 2048)};
}

// On where it is not given.
bool is_on(const Options& options, const std::string& name) {
  const std::string value = options.text(name, "on");
  if (value == "on" || value == "off") return value == "on";
  throw EngineError("JOB_INVALID", "--" + name + " is " + value + "; use on or off.");
}

EngineOptions engine_options(const Options& options, const ModelConfig& config) {
  EngineOptions result;
  result.config = config;
  const std::string precision = options.text("precision", "bf16");
  if (precision != "bf16" && precision != "fp32" && precision != "fp8") {
    throw EngineError("JOB_INVALID", "--precision is " + precision + "; use bf16, fp32 or fp8.");
  }
  result.device.precision = precision == "fp8" ? TM_FP8 : precision == "bf16" ? TM_BF16 : TM_FP32;
  result.device.library_folder = options.text("libraries", "");
  result.device.records_calls = is_on(options, "graphs");
  const std::string mode = options.text("mode", "deterministic");
  if (mode != "deterministic" && mode != "free") {
    throw EngineError("JOB_INVALID", "--mode is " + mode + "; use deterministic or free.");
  }
  result.device.is_deterministic = mode == "deterministic";
  result.device.num_threads =
      options.is_set("threads") ? static_cast<int>(options.count("threads", 1)) : 0;
  return result;
}

struct StepInput {
  const TokenBatch& batch;
  ExchangeMode mode;
  size_t accumulation;  // times that the batch is taken
};

struct StepTime {
  double seconds = 0, micro_batch_seconds = 0;
  size_t wire_bytes = 0;
};

StepTime one_step(Engine& engine, const StepInput& input, size_t step) {
  StepTime time;
  const bool is_local = input.mode == ExchangeMode::kOff;
  const auto divisor = static_cast<double>(input.batch.num_tokens * input.accumulation);
  const auto start = Clock::now();
  for (size_t i = 0; is_local && i < input.accumulation; ++i) {
    engine.local_micro_batch(input.batch, divisor);
  }
  if (!is_local) time.wire_bytes = exchange_micro_batch(engine, input.batch);
  time.micro_batch_seconds = seconds_since(start);
  if (is_local) {
    engine.apply_local_update(step, clipped_update(step, engine.local_sum_squares()));
  } else {
    engine.apply_update(step, clipped_update(step, 1));
  }
  wait_for(engine.device());
  time.seconds = seconds_since(start);
  return time;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One step whose operations are timed. Answers the share of it in which the device had no work to
// do; nothing where the device has no clock, and every operation waits.
std::optional<double> profile_step(Engine& engine, const StepInput& input, size_t step) {
  std::vector<double> waits;
  for (int i = 0; i < 50; ++i) {
    const auto start = Clock::now();
    wait_for(engine.device());
    waits.push_back(seconds_since(start));
  }
  op_times.wait_seconds = median(waits);
  op_times.is_on = true;
  const double seconds = one_step(engine, input, step).seconds;
  op_times.is_on = false;
  if (!op_times.card.has_clock()) return std::nullopt;
  return 1 - read_marks(engine.device().context()) / seconds;
}

void print_profile() {
  std::printf(",\"profile\":[");
  const char* comma = "";
  for (const auto& [op, time] : op_times.by_op) {
    std::printf("%s{\"op\":\"%s\",\"calls\":%zu,\"ms\":%.4f,\"flops\":%.6g,\"bytes\":%.6g}", comma,
                op.c_str(), time.calls, time.seconds * 1e3, time.flops, time.bytes);
    comma = ",";
  }
  std::printf("]");
}

void print_ceilings(const std::vector<ProductCeiling>& products) {
  std::printf(",\"products\":[");
  const char* comma = "";
  for (const ProductCeiling& product : products) {
    std::printf("%s{\"shape\":\"%zux%zux%zu\",\"flops_per_second\":%.6g}", comma, product.n,
                product.in, product.out, product.flops_per_second);
    comma = ",";
  }
  std::printf("]");
}

void print_memory(const MemoryPlan& memory) {
  std::printf(",\"plan_bytes\":%zu,\"host_bytes\":%zu,\"trained_parameters\":%zu",
              memory.total_bytes, memory.host_bytes, memory.num_trained_parameters);
  const ActivationCounts& layers = memory.activations;
  std::printf(",\"layers\":{\"everything\":%zu,\"products\":%zu,\"attention_half\":%zu",
              layers.everything, layers.products, layers.attention_half);
  std::printf(",\"input\":%zu,\"offloaded\":%zu},\"embedding_on_host\":%s,\"uses\":{", layers.input,
              layers.offloaded, memory.embedding_on_host ? "true" : "false");
  const char* comma = "";
  for (const MemoryUse& use : memory.uses) {
    std::printf("%s\"%s\":%zu", comma, use.purpose.c_str(), use.size_bytes);
    comma = ",";
  }
  std::printf("}");
}

void print_optional(const char* name, std::optional<double> value) {
  std::printf(",\"%s\":", name);
  value.has_value() ? static_cast<void>(std::printf("%.12g", *value))
                    : static_cast<void>(std::printf("null"));
}

struct StepTimes {
  double load_seconds = 0;
  std::vector<double> seconds, micro_batch_seconds;
  size_t wire_bytes = 0;
  std::optional<double> outside_share;  // of the profiled step, whose calls are issued one by one
  bool has_graphs = false, is_deterministic = true;
  size_t accumulation = 1;
};

StepTimes measure(Engine& engine, const Options& options, const StepWork& work) {
  StepTimes times;
  times.has_graphs = engine.device().records_calls();
  times.is_deterministic = engine.device().is_deterministic();
  const RandomTokens tokens(work, engine.config().vocab_size);
  times.accumulation = options.count("accumulation", 1);
  const TokenBatch batch = tokens.batch();
  const ExchangeMode mode = exchange_mode(options.text("exchange", "off"));
  const StepInput input = {batch, mode, times.accumulation};
  const size_t warmup = options.count("warmup", 5), steps = options.count("steps", 9);
  for (size_t step = 1; step <= warmup + steps; ++step) {
    const StepTime time = one_step(engine, input, step);
    if (step <= warmup) continue;
    times.seconds.push_back(time.seconds);
    times.micro_batch_seconds.push_back(time.micro_batch_seconds);
    times.wire_bytes = time.wire_bytes;
  }
  const bool has_profile = options.is_set("profile") || op_times.card.has_clock();
  if (!has_profile) return times;
  if (op_times.card.has_clock()) {  // the first makes the marks
    profile_step(engine, input, warmup + steps + 1);
    op_times.by_op.clear();
  }
  times.outside_share = profile_step(engine, input, warmup + steps + 2);
  return times;
}

void print_step(const StepTimes& times, const StepWork& work) {
  const double middle = median(times.seconds);
  std::printf("{\"ms\":%.4f,\"min_ms\":%.4f,\"tokens_per_second\":%.1f,\"load_s\":%.2f",
              middle * 1e3, *std::min_element(times.seconds.begin(), times.seconds.end()) * 1e3,
              static_cast<double>(work.num_tokens() * times.accumulation) / middle,
              times.load_seconds);
  std::printf(",\"accumulation\":%zu", times.accumulation);
  std::printf(",\"mode\":\"%s%s\"", times.is_deterministic ? "deterministic" : "free",
              times.has_graphs ? "" : ", no graphs");
  std::printf(",\"micro_batch_ms\":%.4f,\"wire_bytes\":%zu",
              median(times.micro_batch_seconds) * 1e3, times.wire_bytes);
  print_optional("outside_share", times.outside_share);
}

void run(const Options& options) {
  const StepWork work = work_of(options);
  const ModelConfig config = config_of(shape_of(options), work.row_tokens);
  const std::string device_name = options.text("device", "cuda");
  const std::string plugin = options.text("plugin", built_plugin());
  CardWatch watch(device_name, plugin);
  const TmBackend* backend = find_backend(device_name, plugin);
  if (!is_on(options, "fused-quantise")) backend = separately_quantising(backend);
  op_times.card = card_functions(device_name, plugin);
  Engine engine(timed_backend(backend), engine_options(options, config),
                std::make_unique<RandomSource>(config));
  TmContext* context = engine.device().context();
  CardOverhead overhead;
  if (op_times.card.overhead != nullptr) overhead = op_times.card.overhead(context);
  std::vector<ProductCeiling> products;
  if (options.is_set("ceilings")) {
    products = product_ceilings(engine.device(), config, work.num_tokens());
  }
  const auto load_start = Clock::now();
  engine.load();
  TrainSpec spec = spec_of(work);
  plan_exchange(engine, exchange_mode(options.text("exchange", "off")), spec);
  spec.local_micro_batches = options.count("accumulation", 1);
  if (!spec.is_local && spec.local_micro_batches > 1) {
    throw EngineError("JOB_INVALID", "--accumulation is of the local mode: leave --exchange out.");
  }
  spec.device_memory_bytes = options.gibibytes("memory-gib");
  const bool is_half = engine.device().element_bytes() == 2;
  spec.has_half_states = work.is_full && is_half && !options.is_set("fp32-master");
  spec.has_byte_moments = options.is_set("adamw-8bit");
  const size_t planned_bytes = engine.plan(spec).total_bytes;
  const MemoryPlan memory = engine.prepare(spec);
  const double load_seconds = seconds_since(load_start);
  StepTimes times = measure(engine, options, work);
  for (const std::string& note : engine.device().take_notes()) {
    std::fprintf(stderr, "note       %s\n", note.c_str());
  }
  times.load_seconds = load_seconds;
  const std::optional<size_t> driver_bytes = watch.used_bytes();
  print_step(times, work);
  std::printf(",\"device\":\"%s\",\"predicted_bytes\":%zu", backend->describe(context),
              planned_bytes + overhead.total_bytes);
  std::printf(",\"workspace_bytes\":%zu,\"overhead_bytes\":%zu", overhead.workspace_bytes,
              overhead.total_bytes);
  print_optional("driver_bytes", driver_bytes);
  print_memory(memory);
  print_ceilings(products);
  if (!op_times.by_op.empty()) print_profile();
  std::printf("}\n");
}

}  // namespace
}  // namespace tunemesh::bench

int main(int argc, char** argv) {
  tunemesh::bench::Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strncmp(argv[i], "--", 2) == 0) options.values[argv[i] + 2] = argv[i + 1];
  }
  try {
    tunemesh::bench::run(options);
  } catch (const tunemesh::EngineError& error) {
    std::fprintf(stderr, "%s %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return 0;
}
