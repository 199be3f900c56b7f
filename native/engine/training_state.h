// Everything a training job holds: a sealed arena on the device, and one of frames that JavaScript
// sees.
#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/activation_plan.h"
#include "engine/arena.h"
#include "engine/canonical_layout.h"
#include "engine/exchange_buffers.h"
#include "engine/trained_vector.h"
#include "engine/workspace.h"

namespace tunemesh {

// Same fields as TrainSpec in worker/engine.ts.
struct TrainSpec {
  bool is_full = false;
  LoraSpec lora;  // where not full
  uint64_t seed = 0;
  size_t tokens_per_micro_batch = 0;
  size_t longest_document = 0;
  // Rows of logits at a time; 0: 128 on the CPU, on a GPU as many as 2^28 logits, from 128 to 4096
  // by powers of two. A part of the job's arithmetic where products depend on their height.
  size_t loss_chunk_rows = 0;
  int significant_bits = 24;  // codec q24, q12, q8
  double beta1 = 0, beta2 = 0;
  float epsilon = 0, weight_decay = 0;
  // Full only: bfloat16 weights and moments under stochastic rounding, without float32 masters.
  bool has_half_states = false;
  // `local` mode: one worker, nothing is exchanged; the fields below are then not read. Reached by
  // the engine's local_* calls only.
  bool is_local = false;
  int num_contribution_slots = 0;
  size_t slice_blocks = 0, chunk_blocks = 0;
  // Memory against time; the bits are the same. On the CPU kAuto recomputes and moves nothing.
  Use gradient_checkpointing = Use::kAuto, activation_offloading = Use::kAuto;
  Use host_embedding = Use::kAuto;  // of a frozen embedding that is not also the head
  size_t device_memory_bytes = 0;   // what the job may take; 0: what is free but a reserve
  ActivationPlan layers;            // empty: chosen by the three above
};

// Groups of blocks whose squares are summed apart.
constexpr size_t norm_groups(size_t num_blocks) {
  return (num_blocks + TM_NORM_GROUP_BLOCKS - 1) / TM_NORM_GROUP_BLOCKS;
}

struct MemoryPlan {
  size_t total_bytes = 0;  // the device's
  size_t host_bytes = 0;   // beside it, where the device has memory of its own
  ActivationCounts activations;
  bool embedding_on_host = false;
  std::vector<MemoryUse> uses;
  size_t num_trained_parameters = 0;
  size_t num_blocks = 0;
  size_t mapped_bytes = 0;  // the model's packed file, shared by the workers of a machine
};

class TrainingState {
 public:
  // Throws JOB_INVALID, DATA_INVALID or PLAN_MISMATCH for a spec that the model can't train with.
  TrainingState(std::shared_ptr<const Device> device, const ModelConfig& config, TrainSpec spec);

  // Counts; takes no memory. May be called from any thread. The first with the spec's layers.
  MemoryPlan plan() const { return plan(spec_.layers); }
  MemoryPlan plan(const ActivationPlan& layers) const;
  // Before reserve().
  void choose_layers(ActivationPlan layers) { spec_.layers = std::move(layers); }
  // Takes exactly what plan() says and seals it. Everything is zero afterwards but the rotary
  // table.
  void reserve();
  // Gives the memory back, but for the frames: JavaScript may still see those.
  ~TrainingState();
  MemoryPlan reserved() const;

  const Device& device() const { return *device_; }
  const ModelConfig& config() const { return config_; }
  const TrainSpec& spec() const { return spec_; }
  const CanonicalLayout& layout() const { return layout_; }
  const std::vector<std::vector<BlockRange>>& parts() const { return parts_; }  // gradient_parts
  const GroupPlan& groups() const { return groups_; }
  const TrainedVector& trained() const { return trained_; }
  TrainedVector& trained() { return trained_; }
  const Workspace& work() const { return work_; }
  // Host memory for a part of the gradient on its way to the exchange; empty on the CPU.
  std::span<float> staging() const { return staging_; }
  ExchangeBuffers& exchange() { return *shared_exchange(); }
  std::shared_ptr<ExchangeBuffers> shared_exchange() const;  // not in local mode
  // Local mode: where the device leaves the sums of squares of the gradient's groups.
  std::span<double> norm_sums() const { return norm_sums_; }

 private:
  struct Buffers {
    TrainedVector trained;
    Workspace work;
    ExchangeMemory exchange;
    std::span<float> staging;
    std::span<double> norm_sums;
  };
  // `host` and `frames` are host memory: what the exchange adds and packs.
  struct Arenas {
    Arena device, host;
    std::shared_ptr<Arena> frames;
    explicit Arenas(const Device& device);
  };
  Buffers take_all(Arenas& arenas, const ActivationPlan& layers) const;
  void take_exchange(Arenas& arenas, Buffers& buffers) const;
  ExchangeOptions exchange_options() const;
  MemoryPlan memory_of(const Arenas& arenas, const ActivationPlan& layers) const;

  std::shared_ptr<const Device> device_;
  const ModelConfig& config_;
  TrainSpec spec_;
  CanonicalLayout layout_;
  std::vector<std::vector<BlockRange>> parts_;
  GroupPlan groups_;
  std::unique_ptr<Arenas> arenas_;
  TrainedVector trained_;
  Workspace work_;
  std::span<float> staging_;
  std::span<double> norm_sums_;
  std::shared_ptr<ExchangeBuffers> exchange_;
};

}  // namespace tunemesh
