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
  bool has_byte_moments = false;  // of half states: those moments in 8 bits
  // `local` mode: one worker, nothing is exchanged; the fields below are then not read. Reached by
  // the engine's local_* calls only.
  bool is_local = false;
  // Of a local step, at most. Where more than one, their gradients are added in float32, in order.
  size_t local_micro_batches = 1;
  int num_contribution_slots = 0;
  size_t slice_blocks = 0, chunk_blocks = 0;
  // Memory against time; the bits are the same. On the CPU kAuto recomputes and moves nothing.
  Use gradient_checkpointing = Use::kAuto, activation_offloading = Use::kAuto;
  Use host_embedding = Use::kAuto;  // of a frozen embedding that is not also the head
  // May a device that can round, add and pack its gradients there? kAuto: where the sums fit.
  Use device_sums = Use::kAuto;
  size_t device_memory_bytes = 0;  // what the job may take; 0: what is free but a reserve
  ActivationPlan layers;           // empty: chosen by the three above
};

// Where a device rounds and packs: the sums of one lease, and places for slices on their way to the
// host.
struct DeviceSums {
  static constexpr size_t kPlaces = TM_COPY_LANES - TM_GRADIENT_LANE;
  int64_t* values = nullptr;  // [num_blocks * 256]
  uint64_t* outcome = nullptr;
  uint64_t* block_digests = nullptr;  // of a slice
  uint8_t* places = nullptr;          // PackedSlice each
  size_t place_bytes = 0;
  int slot = -1;                // whose sums stand here; -1: nobody's
  bool is_packed = false;       // they are packed, and lie in the slot too
  std::vector<bool> is_parked;  // by slot: its sums lie in its own memory meanwhile
};

// Slices of a published sum that stand in the device's gradient already, which is free between
// micro-batches.
struct FetchedSum {
  size_t step = 0;
  std::vector<bool> slices;  // empty: none
  bool has(size_t of_step, size_t slice) const {
    return step == of_step && slice < slices.size() && slices[slice];
  }
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
  void keep_sums_on_host() { has_device_sums_ = false; }
  // Does the device round and pack, so that contributions reach the host as frames carry them?
  bool has_device_sums() const { return has_device_sums_; }
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
  // Host memory for a part of the gradient on its way to the exchange; empty on the CPU, and where
  // the device rounds.
  std::span<float> staging() const { return staging_; }
  DeviceSums& device_sums() { return sums_; }
  FetchedSum& fetched() { return fetched_; }
  ExchangeBuffers& exchange() { return *shared_exchange(); }
  std::shared_ptr<ExchangeBuffers> shared_exchange() const;  // not in local mode
  // Local mode: where the device leaves the sums of squares of the gradient's groups.
  std::span<double> norm_sums() const { return norm_sums_; }
  // Micro-batches that the gradient has the sum of.
  size_t& num_summed() { return num_summed_; }

 private:
  struct Buffers {
    TrainedVector trained;
    Workspace work;
    ExchangeMemory exchange;
    std::span<float> staging;
    DeviceSums sums;
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
  void take_sums(Arena& arena, DeviceSums& sums) const;
  ExchangeOptions exchange_options() const;
  MemoryPlan memory_of(const Arenas& arenas, const ActivationPlan& layers) const;

  std::shared_ptr<const Device> device_;
  const ModelConfig& config_;
  TrainSpec spec_;
  CanonicalLayout layout_;
  std::vector<std::vector<BlockRange>> parts_;
  GroupPlan groups_;
  bool has_device_sums_;
  std::unique_ptr<Arenas> arenas_;
  TrainedVector trained_;
  Workspace work_;
  std::span<float> staging_;
  DeviceSums sums_;
  FetchedSum fetched_;
  std::span<double> norm_sums_;
  size_t num_summed_ = 0;
  std::shared_ptr<ExchangeBuffers> exchange_;
};

}  // namespace tunemesh
