#include "engine/engine.h"

#include <algorithm>
#include <chrono>

#include "engine/adapter_folder.h"
#include "engine/memory_choice.h"
#include "engine/sha256.h"
#include "engine/tensor_files.h"
#include "engine/trained_states.h"

#ifndef TUNEMESH_SOURCE_DIGEST
#define TUNEMESH_SOURCE_DIGEST "unknown"
#endif

namespace tunemesh {
namespace {

constexpr size_t kInferenceLossRows = 64;

void add_base(const BaseWeights::Bytes& base, MemoryPlan& plan) {
  plan.uses.push_back({"base weights", base.device_bytes});
  plan.total_bytes += base.device_bytes;
  plan.host_bytes += base.host_bytes;
  plan.embedding_on_host = base.host_bytes > 0;
  if (base.host_bytes > 0) plan.uses.push_back({"embedding on the host", base.host_bytes});
}

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - start;
  return elapsed.count();
}

}  // namespace

Engine::Engine(const TmBackend* backend, EngineOptions options)
    : Engine(backend, std::move(options), nullptr) {}

Engine::Engine(const TmBackend* backend, EngineOptions options,
               std::unique_ptr<WeightSource> source)
    : options_(std::move(options)),
      device_(std::make_shared<Device>(backend, options_.device)),
      source_(std::move(source)) {
  check_model_config(options_.config);
}

MemoryPlan Engine::plan(const TrainSpec& spec) const {
  TrainingState counted(device_, options_.config, spec);
  const MemoryChoice choice =
      choose_memory(counted, memory_room(*device_, spec, base_bytes_, false));
  MemoryPlan plan = counted.plan(choice.layers);
  if (spec.is_full) return plan;
  const BaseWeights::Bytes base =
      BaseWeights::planned(*device_, options_.config, {counted.groups(), choice.embedding_on_host});
  if (!options_.packed_cache_dir.empty() && device_->is_host()) {
    plan.mapped_bytes = base.device_bytes;
    return plan;
  }
  add_base(base, plan);
  return plan;
}

void Engine::load() {
  if (!source_) source_ = open_weights(options_.model_path);
  check_weights(options_.config, *source_);
  is_loaded_ = true;
}

// The frozen model is packed or mapped when it is first needed: full fine-tuning never does.
// One that was laid out for other adapters is packed anew.
void Engine::ensure_base(const BaseChoice& choice) {
  if (!is_loaded_) throw EngineError("STATE_CONFLICT", "the engine's model is not loaded yet.");
  const GroupPlan groups = plan_frozen_groups(*device_, options_.config, choice.lora);
  if (base_ && base_->groups() == groups &&
      base_->embedding_on_host() == choice.embedding_on_host) {
    return;
  }
  base_.reset();
  base_bytes_ = 0;
  has_weights_ = false;
  base_ = std::make_unique<BaseWeights>(
      *device_, BaseWeights::Options{options_.config, *source_, options_.packed_cache_dir, groups,
                                     choice.embedding_on_host, options_.packed_cache_limits});
  base_bytes_ = base_->is_mapped() ? 0 : base_->num_bytes();
}

void Engine::refresh(const TrainedVector& trained) const {
  refresh_packed(*device_, trained, Copies::kAll);
  refresh_groups(*device_, weights_);
}

MemoryPlan Engine::prepare(const TrainSpec& spec) {
  if (!is_loaded_) throw EngineError("STATE_CONFLICT", "prepare: the model is not loaded yet.");
  if (training_) throw EngineError("STATE_CONFLICT", "prepare: the engine has a job already.");
  inference_adapter_.reset();
  start_adapter_.clear();
  auto training = std::make_unique<TrainingState>(device_, options_.config, spec);
  const MemoryChoice choice =
      choose_memory(*training, memory_room(*device_, spec, base_bytes_, true));
  training->choose_layers(choice.layers);
  if (spec.is_full) {
    base_.reset();
    base_bytes_ = 0;
  } else {
    ensure_base({&training->spec().lora, choice.embedding_on_host});
  }
  has_weights_ = false;
  training->reserve();
  MemoryPlan memory = training->reserved();
  TrainedVector& trained = training->trained();
  if (spec.is_full) {
    weights_ = full_view(options_.config, trained);
  } else {
    weights_ = base_->view();
    attach_adapter({options_.config, training->spec().lora, trained}, weights_);
    if (base_->is_mapped()) {
      memory.mapped_bytes = base_->num_bytes();
    } else {
      add_base({base_->num_bytes(), base_->host_bytes()}, memory);
    }
  }
  place_weights(*device_, {options_.config, weights_}, trained);
  if (spec.is_full) {
    read_full_weights(*device_, *source_, trained);
  } else {
    initialise_adapter(*device_, trained, spec.seed);
  }
  refresh(trained);
  has_weights_ = true;
  training_ = std::move(training);
  return memory;
}

TrainingState& Engine::training(const char* what) const {
  if (!training_) {
    throw EngineError("STATE_CONFLICT",
                      std::string(what) + ": the engine has no job; prepare one.");
  }
  return *training_;
}

void Engine::load_adapter(const std::string& folder) {
  const LoraSpec found = read_adapter_spec(folder);
  if (training_) {
    const LoraSpec& wanted = training_->spec().lora;
    if (training_->spec().is_full || found.rank != wanted.rank || found.scale() != wanted.scale()) {
      throw EngineError("ADAPTER_INVALID",
                        folder + ": r " + std::to_string(found.rank) + " with scale " +
                            std::to_string(found.scale()) + " does not fit the job's r " +
                            std::to_string(wanted.rank) + " with scale " +
                            std::to_string(training_->spec().is_full ? 0 : wanted.scale()) + ".");
    }
    read_adapter_weights(*device_, folder, training_->trained());
    refresh(training_->trained());
    start_adapter_ = folder;
    return;
  }
  ensure_base({&found});
  auto adapter = std::make_unique<InferenceAdapter>();
  adapter->lora = found;
  adapter->layout = lora_layout(options_.config, found);
  adapter->arena = std::make_unique<Arena>(*device_);
  TrainedVector values;
  values.layout = &adapter->layout;
  values.groups = base_->groups();
  values.reserve_weights(*device_, *adapter->arena);
  adapter->arena->allocate();
  values.reserve_weights(*device_, *adapter->arena);
  adapter->arena->seal();
  read_adapter_weights(*device_, folder, values);
  weights_ = base_->view();
  attach_adapter({options_.config, found, values}, weights_);
  refresh(values);
  has_weights_ = true;
  inference_adapter_ = std::move(adapter);
}

const DecoderWeights& Engine::current_weights() {
  if (!has_weights_) {
    ensure_base({});
    weights_ = base_->view();
    has_weights_ = true;
  }
  return weights_;
}

MicroBatchResult Engine::micro_batch(const TokenBatch& batch, double loss_divisor,
                                     const ContributionTarget& target) {
  TrainingState& state = training("microBatch");
  if (!(loss_divisor > 0)) {
    throw EngineError("DATA_INVALID",
                      "lossDivisor is " + std::to_string(loss_divisor) + "; it must be above 0.");
  }
  if (batch.num_tokens == 0) {  // only empty packs: adds nothing
    tell_standing_slices(*device_, state, target);
    return {};
  }
  check_batch(batch, {options_.config, state.work().spec});
  state.fetched().slices.clear();
  const auto start = std::chrono::steady_clock::now();
  const CheckedOperations checked(*device_, target.is_checked);
  const auto writer = contribution_writer(*device_, state, target);
  const GradientVector gradient = {state.trained().added_ranges(),
                                   state.trained().gradient_ranges(),
                                   [&writer](size_t part) { writer->write(part); }};
  try {
    const LossResult loss = train_step({*device_, options_.config, weights_, state.work()}, batch,
                                       {gradient, loss_divisor});
    writer->finish();
    return {loss.loss_sum, loss.num_target_tokens, milliseconds_since(start),
            device_->take_notes()};
  } catch (...) {
    state.exchange().poison(target.slot);  // some parts stand, others do not
    throw;
  }
}

template <class Step>
auto Engine::with_workspace(const TokenBatch& batch, Step step) {
  const DecoderWeights& weights = current_weights();
  if (training_) {
    const WorkspaceSpec& spec = training_->work().spec;
    if (batch.num_tokens <= spec.tokens && batch.num_tokens <= spec.longest_document) {
      check_batch(batch, {options_.config, spec});
      return step(StepModel{*device_, options_.config, weights, training_->work()});
    }
  }
  Workspace work;
  work.spec.tokens = batch.num_tokens;
  work.spec.longest_document = batch.num_tokens;
  work.spec.loss_rows = std::min(batch.num_tokens, kInferenceLossRows);
  work.spec.lora_rank = weights.lora_rank;
  work.spec.groups = weights.groups;
  check_batch(batch, {options_.config, work.spec});
  Arena arena(*device_);
  work.reserve(options_.config, *device_, arena);
  arena.allocate();
  work.reserve(options_.config, *device_, arena);
  arena.seal();
  work.fill_rotary(options_.config, *device_);
  return step(StepModel{*device_, options_.config, weights, work});
}

MicroBatchResult Engine::evaluate(const TokenBatch& batch) {
  if (batch.num_tokens == 0) return {};
  const auto start = std::chrono::steady_clock::now();
  const LossResult loss =
      with_workspace(batch, [&](const StepModel& model) { return evaluate_step(model, batch); });
  return {loss.loss_sum, loss.num_target_tokens, milliseconds_since(start), device_->take_notes()};
}

std::vector<float> Engine::logits(const TokenBatch& batch) {
  return with_workspace(batch, [&](const StepModel& model) { return logits_step(model, batch); });
}

void Engine::apply_update(size_t step, AdamWNumbers numbers) {
  TrainingState& state = training("applyUpdate");
  const float* gradient = state.exchange().published(step);
  if (!device_->is_host()) {
    take_sum(state, step);
    gradient = state.trained().gradient;
  }
  update_from({step, gradient}, numbers);
}

void Engine::fetch_sum(size_t step, size_t slice) {
  if (device_->is_host()) return;
  TrainingState& state = training("fetchSum");
  ExchangeBuffers& exchange = state.exchange();
  if (slice >= exchange.num_slices()) {
    throw EngineError("ENGINE_FAILED", "slice " + std::to_string(slice) +
                                           " does not exist; there are " +
                                           std::to_string(exchange.num_slices()) + ".");
  }
  const size_t offset = exchange.slice_first_block(slice) * kBlockElements;
  TmSideCopy copy = {};
  copy.to = state.trained().gradient + offset;
  copy.from = exchange.published(step) + offset;
  copy.num_bytes = exchange.slice_num_blocks(slice) * kBlockElements * sizeof(float);
  copy.lane = TM_GRADIENT_LANE;  // nobody's between micro-batches
  TM_RUN(*device_, start_copy, &copy);
  TM_RUN(*device_, await_copy, copy.lane);
  FetchedSum& fetched = state.fetched();
  if (fetched.step != step) fetched.slices.clear();
  fetched.step = step;
  fetched.slices.resize(exchange.num_slices(), false);
  fetched.slices[slice] = true;
}

// The slices that are not there yet. The device's gradient is not needed between micro-batches.
void Engine::take_sum(TrainingState& state, size_t step) {
  ExchangeBuffers& exchange = state.exchange();
  const size_t num_slices = exchange.num_slices();
  for (size_t slice = 0; slice < num_slices;) {
    const size_t first = slice;
    while (slice < num_slices && !state.fetched().has(step, slice)) ++slice;
    if (slice > first) {
      const size_t offset = exchange.slice_first_block(first) * kBlockElements;
      const size_t last = slice - 1;
      const size_t end =
          (exchange.slice_first_block(last) + exchange.slice_num_blocks(last)) * kBlockElements;
      TM_RUN(*device_, copy_in, state.trained().gradient + offset,
             exchange.published(step) + offset, (end - offset) * sizeof(float));
    }
    if (slice < num_slices) ++slice;
  }
  state.fetched().slices.clear();
}

void Engine::update_from(const Update& update, AdamWNumbers numbers) {
  const TrainingState& state = training("applyUpdate");
  numbers.beta1 = state.spec().beta1;
  numbers.beta2 = state.spec().beta2;
  numbers.epsilon = state.spec().epsilon;
  numbers.weight_decay = state.spec().weight_decay;
  numbers.seed = state.spec().seed;
  numbers.step = static_cast<uint32_t>(update.step);
  const TrainedVector& trained = state.trained();
  apply_adamw(*device_, {trained, update.gradient, numbers});
  if (trained.is_half && !reads_half_weights(*device_)) {
    refresh(trained);
  } else {
    refresh_packed(*device_, trained, Copies::kNotPlaced);
  }
}

std::string Engine::weights_digest() const {
  return tunemesh::weights_digest(*device_, training("weightsDigest").trained());
}

void Engine::write_state(const std::string& path, size_t step) const {
  write_state_file(*device_, training("writeState").trained(), {path, step});
}

size_t Engine::read_state(const std::string& path) {
  const TrainedVector& trained = training("readState").trained();
  const size_t step = read_state_file(*device_, trained, path);
  refresh(trained);
  return step;
}

void Engine::write_adapter(const std::string& folder, const std::string& base_model_name) const {
  const TrainingState& state = training("writeAdapter");
  if (!state.spec().is_full) {
    write_adapter_folder(*device_, {folder, base_model_name, state.spec().lora, state.trained()});
    return;
  }
  SafetensorsContent content;
  content.metadata = {{"format", "pt"}};
  add_entries(*device_, {state.trained(), StateKind::kWeight, ""}, content);
  write_safetensors(folder + "/model.safetensors", content);
}

std::vector<WeightChange> Engine::weight_change() const {
  const TrainingState& state = training("weightChange");
  if (state.spec().is_full) return full_weight_change(*device_, *source_, state.trained());
  return adapter_weight_change(
      *device_, {options_.config, state.spec().lora, state.trained(), start_adapter_});
}

std::vector<TensorValues> Engine::gradients(const TokenBatch& batch, double loss_divisor) {
  TrainingState& state = training("gradients");
  check_batch(batch, {options_.config, state.work().spec});
  state.fetched().slices.clear();
  const TrainedVector& trained = state.trained();
  const GradientVector gradient = {trained.added_ranges(), trained.gradient_ranges()};
  state.num_summed() = 0;  // of a local step under way
  train_step({*device_, options_.config, weights_, state.work()}, batch, {gradient, loss_divisor});
  std::vector<TensorValues> result;
  for (size_t i = 0; i < trained.tensors.size(); ++i) {
    result.push_back({state.layout().tensors[i].name,
                      state_values(*device_, {trained, i, StateKind::kGradient})});
  }
  return result;
}

std::vector<TensorValues> Engine::weights() const {
  const TrainingState& state = training("weights");
  std::vector<TensorValues> result;
  for (size_t i = 0; i < state.trained().tensors.size(); ++i) {
    result.push_back({state.layout().tensors[i].name,
                      state_values(*device_, {state.trained(), i, StateKind::kWeight})});
  }
  return result;
}

GenerateResult Engine::generate(const GenerateOptions& options, const GenerateHooks& hooks) {
  return tunemesh::generate({*device_, options_.config, current_weights()}, options, hooks);
}

std::string device_class(const Device& device) {
  const std::string identity = std::string(TUNEMESH_SOURCE_DIGEST) + "\n" + __VERSION__ + "\n" +
                               device.ops().name + "\n" +
                               device.ops().instruction_path(device.context());
  return sha256_hex(identity).substr(0, 16);
}

}  // namespace tunemesh
