// One model on one device: what the bindings call. Every method but plan() and the plain getters
// belongs to the engine's thread.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/base_weights.h"
#include "engine/contribution_writer.h"
#include "engine/generate.h"
#include "engine/packed_cache.h"
#include "engine/product_rate.h"
#include "engine/train_step.h"
#include "engine/training_state.h"
#include "engine/weight_change.h"
#include "engine/weight_source.h"

namespace tunemesh {

struct EngineOptions {
  std::string model_path;
  ModelConfig config;
  DeviceOptions device;
  std::string packed_cache_dir;  // empty: private
  PackedCacheLimits packed_cache_limits;
};

struct MicroBatchResult {
  double loss_sum = 0;
  size_t num_target_tokens = 0;
  double compute_ms = 0;
  std::vector<std::string> notes;  // the device's, for a log
};

struct TensorValues {
  std::string name;
  std::vector<float> values;
};

class Engine {
 public:
  Engine(const TmBackend* backend, EngineOptions options);
  // For tests: weights from memory.
  Engine(const TmBackend* backend, EngineOptions options, std::unique_ptr<WeightSource> source);

  const Device& device() const { return *device_; }
  const ModelConfig& config() const { return options_.config; }
  MemoryPlan plan(const TrainSpec& spec) const;

  // Needs no load().
  ProductRate product_rate(size_t num_tokens) const {
    return measure_products(*device_, options_.config, num_tokens);
  }

  void load();
  MemoryPlan prepare(const TrainSpec& spec);
  const CanonicalLayout& layout() const { return training("layout").layout(); }
  std::shared_ptr<ExchangeBuffers> exchange() const {
    return training("exchange").shared_exchange();
  }
  void load_adapter(const std::string& folder);

  // Rounds and adds into the target's slot while backward goes on. On any failure the slot is
  // poisoned.
  MicroBatchResult micro_batch(const TokenBatch& batch, double loss_divisor,
                               const ContributionTarget& target);
  MicroBatchResult evaluate(const TokenBatch& batch);
  // A slice of the step's published sum stands: on a device with memory of its own it travels there
  // meanwhile. Called again for a slice that was written again; changes no bit.
  void fetch_sum(size_t step, size_t slice);
  void apply_update(size_t step, AdamWNumbers numbers);  // the rest is the spec's
  // Local mode (TrainSpec::is_local): a step is up to local_micro_batches micro-batches, whose
  // summed gradient never leaves the device. In this order; all divide by the step's divisor. The
  // sum of squares is fp64 in fixed order, and NON_FINITE_GRADIENT where it is not finite. A
  // micro-batch that fails ends the step: the next one begins it anew.
  MicroBatchResult local_micro_batch(const TokenBatch& batch, double loss_divisor);
  double local_sum_squares() const;
  void apply_local_update(size_t step, const AdamWNumbers& numbers);
  std::string weights_digest() const;
  void write_state(const std::string& path, size_t step) const;
  size_t read_state(const std::string& path);
  void write_adapter(const std::string& folder, const std::string& base_model_name) const;
  std::vector<WeightChange> weight_change() const;
  std::vector<float> logits(const TokenBatch& batch);
  std::vector<TensorValues> gradients(const TokenBatch& batch, double loss_divisor);
  std::vector<TensorValues> weights() const;
  GenerateResult generate(const GenerateOptions& options, const GenerateHooks& hooks);

 private:
  TrainingState& training(const char* what) const;
  TrainingState& local_training(const char* what) const;
  struct Update {
    size_t step;
    const float* gradient;  // the device reads it
  };
  void update_from(const Update& update, AdamWNumbers numbers);
  void take_sum(TrainingState& state, size_t step);
  struct BaseChoice {
    const LoraSpec* lora = nullptr;  // null: without adapter
    bool embedding_on_host = false;
  };
  void ensure_base(const BaseChoice& choice);
  void refresh(const TrainedVector& trained) const;  // packed copies of the job's weights
  const DecoderWeights& current_weights();
  // Runs the step on the job's workspace where the batch fits it, else on one of its own.
  template <class Step>
  auto with_workspace(const TokenBatch& batch, Step step);

  EngineOptions options_;
  std::shared_ptr<Device> device_;
  std::unique_ptr<WeightSource> source_;
  bool is_loaded_ = false;
  std::atomic<size_t> base_bytes_ = 0;  // of base_, on the device
  std::unique_ptr<BaseWeights> base_;
  std::unique_ptr<TrainingState> training_;
  DecoderWeights weights_;  // of the job, or of the base with an adapter for inference
  bool has_weights_ = false;
  std::string start_adapter_;
  // An adapter loaded without a job, for generation.
  struct InferenceAdapter {
    LoraSpec lora;
    CanonicalLayout layout;
    std::unique_ptr<Arena> arena;
  };
  std::unique_ptr<InferenceAdapter> inference_adapter_;
};

// Hash of engine build, instruction path and numeric plan: workers of one class give the same bits.
std::string device_class(const Device& device);

}  // namespace tunemesh
