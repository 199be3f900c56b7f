// What a job keeps where, so that it fits its device: each layer's activations, and the frozen
// embedding. A choice of speed only: all of them give the same bits.
#pragma once
#include <memory>

#include "engine/activation_plan.h"
#include "engine/model_config.h"
#include "engine/training_state.h"

namespace tunemesh {

// What a job may take, the frozen model included.
struct MemoryRoom {
  size_t device_bytes = 0;
  // Up to here also for what saves little time: others may want to share the card.
  size_t generous_bytes = 0;
  size_t host_bytes = 0;  // page-locked, for offloaded activations
};
// What is free, less the process's overhead as the device tells it, less a reserve of 256 MiB.
// `held_bytes`: what this engine has taken of the device already. The plan of a job to come reckons
// with an empty device (`is_now` false).
MemoryRoom memory_room(const Device& device, const TrainSpec& spec, size_t held_bytes, bool is_now);

struct MemoryChoice {
  ActivationPlan layers;
  bool embedding_on_host = false;
  bool is_fit = false;
};
// The sums of a device that rounds are the host's from then on (keep_sums_on_host) where they would
// not fit the device whatever else is chosen: to compute a layer again costs less than to round its
// gradient on the host.
MemoryChoice choose_memory(TrainingState& state, const MemoryRoom& room);

// Exact: by counting, as the plan itself does. `base_bytes` are added to what every choice takes.
ActivationBytes activation_bytes(const TrainingState& state, size_t base_bytes);

// May the frozen embedding be read from host memory, a few rows a step, and would that save any?
bool can_embed_from_host(const Device& device, const ModelConfig& config, const TrainSpec& spec);

}  // namespace tunemesh
