// Prints the memory plan of a real model's training step on a card of 80 GB, without one:
// sizes are those of the CUDA plugin with cuDNN, the plan is the engine's own. Local mode, as in
// gpu_step_bench, whose `plan_bytes` on the card must be the same.
//
//   memory_plan_bench --model NAME --method lora|full --batch N --seq N [--memory-gib X]
//                     [--checkpointing auto|never|always] [--offloading auto|never|always]
//                     [--embedding auto|never|always (on the host)] [--loss-rows N]
//                     [--fp32-master 1] [--adamw-8bit 1] [--mode deterministic|free]
//                     [--accumulation N] [--precision bf16|fp8]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "bench/native/bench_model.h"
#include "kernels/cuda/attention_chunks.h"
#include "kernels/cuda/fp8_layout.h"

namespace tunemesh::bench {
namespace {

constexpr size_t kCardBytes = 85029158912;  // an H100 80GB
constexpr double kGib = 1 << 30;

size_t rounded_to_64(size_t value) { return (value + 63) / 64 * 64; }

// As kernels/cuda/linear_group.cc lays them out.
size_t group_border(const TmGroupShape* shape) {
  size_t ranks = 0;
  for (size_t part = 0; part < shape->num_parts; ++part) {
    if (shape->is_adapted[part]) ranks += shape->rank;
  }
  return rounded_to_64(ranks);
}
size_t group_packed_elements(const TmGroupShape* shape) {
  const size_t border = group_border(shape);
  const cuda::Fp8Places fp8(*shape, border);
  if (shape->is_fp8) return fp8.packed_elements();
  const size_t out = fp8.out;
  return (out + border) * rounded_to_64(shape->in + border) +
         (shape->has_bias ? rounded_to_64(out) : 0);
}

bool g_is_free = false;  // --mode free

// As kernels/cuda/attention_cudnn.cc takes it.
size_t attention_scratch_bytes(TmContext*, const TmAttentionJob* job) {
  constexpr size_t kAlign = 256, kLimit = size_t{3} << 29;
  const cuda::AttentionHeads heads = {job->num_heads, job->num_kv_heads, job->head_size, g_is_free};
  const size_t least = cuda::least_chunk_bytes(std::min(job->tokens, job->longest_document), heads);
  const size_t best = cuda::best_chunk_bytes(job->tokens, job->longest_document, heads);
  const size_t room = kLimit - cuda::kChunkSlack - kAlign;
  return std::max(least, std::min(best, room)) + cuda::kChunkSlack + kAlign;
}

// A card that only plans.
TmBackend planned_card() {
  TmBackend card = *tm_cpu_backend();
  card.name = "planned card";
  card.create = [](const TmContextOptions* options, TmContext** out) {
    TmContextOptions of_cpu = *options;
    of_cpu.precision = TM_FP32;
    return tm_cpu_backend()->create(&of_cpu, out);
  };
  card.element_bytes = [](TmContext*) -> size_t { return 2; };
  card.reads_rows = [](TmContext*) { return 0; };
  card.packs_row_major = [](TmContext*) { return 1; };
  card.packed_weight_elements = [](size_t out, size_t in) { return out * in; };
  card.memory_bytes = card.free_bytes = [](TmContext*) { return kCardBytes; };
  card.allocate_host = card.allocate;
  card.release_host = card.release;
  card.group_border = group_border;
  card.group_packed_elements = group_packed_elements;
  card.group_forward = [](TmContext*, const TmGroupForward*) { return TM_BAD_ARGUMENT; };
  card.attention_scratch_bytes = attention_scratch_bytes;
  return card;
}

using Options = std::map<std::string, std::string>;

std::string text(const Options& options, const char* name, const char* otherwise) {
  const auto found = options.find(name);
  return found == options.end() ? otherwise : found->second;
}

size_t count(const Options& options, const char* name, const char* otherwise) {
  return static_cast<size_t>(std::max(0L, std::atol(text(options, name, otherwise).c_str())));
}

Use use_of(const Options& options, const char* name) {
  const std::string value = text(options, name, "auto");
  if (value == "auto") return Use::kAuto;
  if (value == "never" || value == "always") return value == "never" ? Use::kNever : Use::kAlways;
  throw EngineError("JOB_INVALID",
                    std::string("--") + name + " is " + value + "; use auto, never or always.");
}

void print_plan(const MemoryPlan& plan) {
  std::printf("%.2f GiB on the card, %.2f GiB on the host\n",
              static_cast<double>(plan.total_bytes) / kGib,
              static_cast<double>(plan.host_bytes) / kGib);
  for (const MemoryUse& use : plan.uses) {
    std::printf("  %7.2f GiB %s\n", static_cast<double>(use.size_bytes) / kGib,
                use.purpose.c_str());
  }
  const ActivationCounts& layers = plan.activations;
  std::printf(
      "  layers: %zu keep everything, %zu products, %zu all but gate and up, %zu their "
      "input; %zu offloaded\n",
      layers.everything, layers.products, layers.attention_half, layers.input, layers.offloaded);
}

void run(const Options& options) {
  const ModelShape* shape = find_model_shape(text(options, "model", ""));
  const std::string method = text(options, "method", "lora");
  if (shape == nullptr || (method != "lora" && method != "full")) {
    throw EngineError("JOB_INVALID", "name a --model of bench_model.h, and --method lora or full.");
  }
  const StepWork work = {method == "full", count(options, "batch", "1"),
                         count(options, "seq", "512"), count(options, "loss-rows", "2048")};
  const std::string precision = text(options, "precision", "bf16");
  if (precision != "bf16" && precision != "fp8") {
    throw EngineError("JOB_INVALID", "--precision is " + precision + "; use bf16 or fp8.");
  }
  g_is_free = text(options, "mode", "deterministic") == "free";
  EngineOptions engine_options;
  engine_options.config = config_of(*shape, work.row_tokens);
  engine_options.device.precision = precision == "fp8" ? TM_FP8 : TM_BF16;
  static const TmBackend card = planned_card();
  const Engine engine(&card, engine_options, std::make_unique<RandomSource>(engine_options.config));
  TrainSpec spec = spec_of(work);
  spec.is_local = true;
  spec.local_micro_batches = count(options, "accumulation", "1");
  spec.has_half_states = work.is_full && options.count("fp32-master") == 0;
  spec.has_byte_moments = options.count("adamw-8bit") != 0;
  spec.gradient_checkpointing = use_of(options, "checkpointing");
  spec.activation_offloading = use_of(options, "offloading");
  spec.host_embedding = use_of(options, "embedding");
  spec.device_memory_bytes =
      static_cast<size_t>(std::atof(text(options, "memory-gib", "0").c_str()) * kGib);
  print_plan(engine.plan(spec));
}

}  // namespace
}  // namespace tunemesh::bench

int main(int argc, char** argv) {
  tunemesh::bench::Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strncmp(argv[i], "--", 2) == 0) options[argv[i] + 2] = argv[i + 1];
  }
  try {
    tunemesh::bench::run(options);
  } catch (const tunemesh::EngineError& error) {
    std::fprintf(stderr, "%s %s\n", error.code().c_str(), error.what());
    return 1;
  }
  return 0;
}
