#include "engine/memory_choice.h"

#include <algorithm>
#include <cstdio>

#include "engine/base_weights.h"

namespace tunemesh {
namespace {

// Left free beside what is planned and what the device says that the process has besides. On an
// H100 their sum met the driver's figure within 0.07 GiB (docs/performance.md, memory).
constexpr size_t kReserveBytes = size_t{256} << 20;

// Of an H100 (bench/results/2026-11-24_cuda-ops_H100.md), the link's as PCIe 5 x16 is assumed to
// give; elsewhere their ratios are similar enough.
constexpr double kProductRate = 650e12;  // bf16; multiply-adds count 2
constexpr double kAttentionRate = 400e12;
constexpr double kFloatSlowdown = 12;
constexpr double kCopyRate = 2.5e12;  // bytes a second
constexpr double kLinkRate = 40e9;

size_t less(size_t bytes, size_t taken) { return bytes - std::min(bytes, taken); }

size_t available_host_bytes() {
  std::FILE* const file = std::fopen("/proc/meminfo", "r");
  if (file == nullptr) return 0;
  char line[128];
  unsigned long long kilobytes = 0;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    if (std::sscanf(line, "MemAvailable: %llu kB", &kilobytes) == 1) break;
  }
  std::fclose(file);
  return static_cast<size_t>(kilobytes) * 1024;
}

ActivationTimes times_of(const TrainingState& state, const ActivationBytes& bytes) {
  const ModelConfig& config = state.config();
  const TrainSpec& spec = state.spec();
  const auto n = static_cast<double>(spec.tokens_per_micro_batch);
  const auto length =
      static_cast<double>(std::min(spec.longest_document, spec.tokens_per_micro_batch));
  const auto hidden = static_cast<double>(config.hidden_size);
  const auto query = static_cast<double>(config.query_width());
  const auto kv = static_cast<double>(config.kv_width());
  const auto inner = static_cast<double>(config.intermediate_size);
  const auto element = static_cast<double>(state.device().element_bytes());
  const double slowdown = element > 2 ? kFloatSlowdown : 1;
  const auto product = [&](double in, double out) {
    return 2 * n * in * out / kProductRate * slowdown;
  };
  ActivationTimes times;
  times.attention_half = product(hidden, query + 2 * kv) + product(query, hidden) +
                         2 * n * length * query / kAttentionRate * slowdown;
  times.gate_up = product(hidden, 2 * inner);
  times.norms = n * (4 * hidden + inner) * element / kCopyRate;
  times.move = static_cast<double>(bytes.kept()) / kLinkRate;
  times.forward = static_cast<double>(config.num_layers) *
                  (times.attention_half + times.gate_up + product(inner, hidden));
  return times;
}

MemoryChoice best_choice(const TrainingState& state, const MemoryRoom& room);

}  // namespace

MemoryChoice choose_memory(TrainingState& state, const MemoryRoom& room) {
  const MemoryChoice choice = best_choice(state, room);
  if (choice.is_fit || !state.has_device_sums() || state.spec().device_sums == Use::kAlways) {
    return choice;
  }
  state.keep_sums_on_host();
  return best_choice(state, room);
}

MemoryRoom memory_room(const Device& device, const TrainSpec& spec, size_t held_bytes,
                       bool is_now) {
  MemoryRoom room;
  room.host_bytes = available_host_bytes() / 2;
  if (spec.device_memory_bytes != 0) {
    room.device_bytes = room.generous_bytes = spec.device_memory_bytes;
    return room;
  }
  if (device.is_host() || device.ops().free_bytes == nullptr) {
    room.device_bytes = SIZE_MAX;
    return room;
  }
  const TmBackend& ops = device.ops();
  size_t late = 0;
  const size_t overhead =
      ops.overhead_bytes == nullptr ? 0 : ops.overhead_bytes(device.context(), &late);
  room.device_bytes = less(ops.memory_bytes(device.context()), overhead + kReserveBytes);
  if (is_now) {
    // The rest of the overhead is no longer free.
    const size_t left = held_bytes + ops.free_bytes(device.context());
    room.device_bytes = std::min(room.device_bytes, less(left, late + kReserveBytes));
  }
  room.generous_bytes = room.device_bytes / 4 * 3;
  return room;
}

bool can_embed_from_host(const Device& device, const ModelConfig& config, const TrainSpec& spec) {
  return !spec.is_full && !config.tie_word_embeddings && !device.is_host() &&
         device.ops().packs_row_major(device.context());
}

ActivationBytes activation_bytes(const TrainingState& state, size_t base_bytes) {
  const size_t layers = state.config().num_layers;
  const auto counted = [&](Keep keep) {
    ActivationPlan plan(layers, {Keep::kInput});
    plan.back().keep = keep;
    return state.plan(plan).total_bytes;
  };
  ActivationBytes bytes;
  bytes.num_layers = layers;
  const size_t least = counted(Keep::kInput);
  bytes.rest = least + base_bytes;
  if (layers == 1) return bytes;  // nothing to choose: its values stay where they are
  bytes.attention_half = counted(Keep::kAttentionHalf) - least;
  bytes.gate_up = counted(Keep::kProducts) - least - bytes.attention_half;
  bytes.inputs = counted(Keep::kEverything) - least - bytes.kept();
  return bytes;
}

namespace {

MemoryChoice best_choice(const TrainingState& state, const MemoryRoom& room) {
  const Device& device = state.device();
  const TrainSpec& spec = state.spec();
  const bool may_move = can_embed_from_host(device, state.config(), spec);
  MemoryChoice best;
  bool is_found = false;
  double best_seconds = 0;
  for (const bool on_host : {false, true}) {
    if (on_host ? !may_move || spec.host_embedding == Use::kNever
                : may_move && spec.host_embedding == Use::kAlways) {
      continue;
    }
    size_t base_bytes = 0;
    if (!spec.is_full) {
      base_bytes =
          BaseWeights::planned(device, state.config(), {state.groups(), on_host}).device_bytes;
    }
    const ActivationBytes bytes = activation_bytes(state, base_bytes);
    const ActivationTimes times = times_of(state, bytes);
    ActivationCounts counts = counts_of(spec.layers);
    if (spec.layers.empty()) {
      counts = choose_activations(bytes, times,
                                  {room.device_bytes, room.host_bytes, room.generous_bytes,
                                   spec.gradient_checkpointing, spec.activation_offloading});
    }
    const size_t embedded = spec.tokens_per_micro_batch * state.config().hidden_size;
    const double seconds =
        times.seconds(counts) +
        (on_host ? static_cast<double>(embedded * device.element_bytes()) / kLinkRate : 0);
    const bool is_fit = bytes.device_bytes(counts) <= room.device_bytes;
    // Without room either way, the second takes less.
    if (is_found && (is_fit ? seconds >= best_seconds : false)) continue;
    best = {spec.layers.empty() ? plan_of(counts) : spec.layers, on_host, is_fit};
    best_seconds = is_fit ? seconds : 1e300;
    is_found = true;
  }
  return best;
}

}  // namespace
}  // namespace tunemesh
