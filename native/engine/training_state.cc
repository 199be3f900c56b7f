#include "engine/training_state.h"

#include <algorithm>
#include <utility>

#include "engine/recorded_calls.h"

namespace tunemesh {
namespace {

constexpr size_t kStagingFloats = size_t{1} << 22;  // whole blocks; 16 MiB

constexpr size_t kHostLossRows = 128;
constexpr size_t kMostLogits = size_t{1} << 28, kMostLossRows = 4096;

// Of the device's kind and the shape alone: workers of one class must agree.
size_t loss_rows_for(const Device& device, const ModelConfig& config, size_t tokens) {
  size_t rows = kHostLossRows;
  while (!device.is_host() && 2 * rows <= kMostLossRows &&
         2 * rows * config.vocab_size <= kMostLogits) {
    rows *= 2;
  }
  return std::min(rows, tokens);
}

bool may_have_sums(const Device& device, const TrainSpec& spec) {
  return !spec.is_local && !device.is_host() && device.ops().pack_blocks != nullptr &&
         spec.device_sums != Use::kNever;
}

void check_range(const char* field, size_t value, size_t limit) {
  if (value >= 1 && value <= limit) return;
  throw EngineError("JOB_INVALID", std::string(field) + " is " + std::to_string(value) + "; 1 to " +
                                       std::to_string(limit) + " is allowed.");
}

}  // namespace

TrainingState::TrainingState(std::shared_ptr<const Device> device, const ModelConfig& config,
                             TrainSpec spec)
    : device_(std::move(device)),
      config_(config),
      spec_(std::move(spec)),
      layout_(spec_.is_full ? full_layout(config) : lora_layout(config, spec_.lora)),
      parts_(gradient_parts(layout_, config.num_layers)),
      groups_(spec_.is_full ? plan_trained_groups(*device_, config)
                            : plan_frozen_groups(*device_, config, &spec_.lora)),
      has_device_sums_(may_have_sums(*device_, spec_)) {
  check_range("tokensPerMicroBatch", spec_.tokens_per_micro_batch, size_t{1} << 24);
  check_range("longestDocument", spec_.longest_document, config.max_position_embeddings);
  if (spec_.loss_chunk_rows == 0) {
    spec_.loss_chunk_rows = loss_rows_for(*device_, config, spec_.tokens_per_micro_batch);
  }
  check_range("lossChunkRows", spec_.loss_chunk_rows, 1 << 20);
  check_range("localMicroBatches", spec_.local_micro_batches, 1 << 20);
  if (spec_.is_local) return;
  check_range("numContributionSlots", static_cast<size_t>(spec_.num_contribution_slots), 4096);
}

ExchangeOptions TrainingState::exchange_options() const {
  ExchangeOptions options;
  options.num_blocks = layout_.num_blocks;
  options.slice_blocks = spec_.slice_blocks;
  options.chunk_blocks = spec_.chunk_blocks;
  options.num_contribution_slots = spec_.num_contribution_slots;
  options.significant_bits = spec_.significant_bits;
  options.is_packed = has_device_sums_;
  return options;
}

// Reserving order; the same code counts for the plan and takes for the job.
TrainingState::Buffers TrainingState::take_all(Arenas& arenas, const ActivationPlan& layers) const {
  Arena& arena = arenas.device;
  Buffers buffers;
  buffers.trained.layout = &layout_;
  buffers.trained.groups = groups_;
  buffers.trained.num_full_layers = spec_.is_full && groups_.is_used ? config_.num_layers : 0;
  buffers.trained.is_half = spec_.is_full && spec_.has_half_states;
  buffers.trained.has_byte_moments = buffers.trained.is_half && spec_.has_byte_moments;
  buffers.trained.adds_gradient = spec_.is_local && spec_.local_micro_batches > 1;
  buffers.trained.has_half_gradient = buffers.trained.is_half && spec_.is_local &&
                                      !buffers.trained.adds_gradient &&
                                      reads_half_weights(*device_);
  buffers.trained.reserve(*device_, arena);
  buffers.work.spec = {spec_.tokens_per_micro_batch,
                       spec_.longest_document,
                       spec_.loss_chunk_rows,
                       spec_.is_full ? 0 : spec_.lora.rank,
                       true,
                       0,
                       groups_,
                       layers};
  buffers.work.reserve(config_, *device_, {arena, &arenas.host});
  if (spec_.is_local) {
    const size_t num_vector_blocks = buffers.trained.half.num_vector_floats / kBlockElements;
    const size_t count = norm_groups(layout_.num_blocks) + norm_groups(num_vector_blocks);
    buffers.norm_sums = {arena.take<double>("gradient norm", count), count};
  } else {
    take_exchange(arenas, buffers);
  }
  return buffers;
}

void TrainingState::take_exchange(Arenas& arenas, Buffers& buffers) const {
  Arena& host = arenas.host;
  const ExchangePlan plan = ExchangeBuffers::plan(exchange_options());
  buffers.exchange.contributions = host.take_bytes("contributions", plan.contribution_bytes);
  buffers.exchange.sum = host.take_bytes("owned sums", plan.sum_bytes);
  buffers.exchange.published = host.take_bytes("published sums", plan.published_bytes);
  buffers.exchange.frames = arenas.frames->take_bytes("frames", plan.frame_bytes);
  buffers.exchange.scratch = host.take_bytes("exchange scratch", plan.scratch_bytes);
  if (has_device_sums_) {
    take_sums(arenas.device, buffers.sums);
  } else if (!device_->is_host()) {
    const size_t least = 2 * kBlockElements;
    const size_t count = std::clamp(layout_.num_floats(), least, kStagingFloats);
    buffers.staging = {host.take<float>("gradient staging", count), count};
  }
}

void TrainingState::take_sums(Arena& arena, DeviceSums& sums) const {
  const size_t slice_blocks = std::min(spec_.slice_blocks, layout_.num_blocks);
  sums.place_bytes = PackedSlice(nullptr, slice_blocks, spec_.chunk_blocks).total_bytes;
  sums.values = arena.take<int64_t>("fixed-point gradient", layout_.num_floats());
  sums.outcome = arena.take<uint64_t>("packed slices", 1);
  sums.block_digests = arena.take<uint64_t>("packed slices", slice_blocks);
  sums.places = arena.take<uint8_t>("packed slices", DeviceSums::kPlaces * sums.place_bytes);
  sums.is_parked.assign(static_cast<size_t>(spec_.num_contribution_slots), false);
}

MemoryPlan TrainingState::memory_of(const Arenas& arenas, const ActivationPlan& layers) const {
  MemoryPlan plan;
  plan.total_bytes = arenas.device.total_bytes();
  plan.uses = arenas.device.uses();
  for (const Arena* arena : {&arenas.host, static_cast<const Arena*>(arenas.frames.get())}) {
    (device_->is_host() ? plan.total_bytes : plan.host_bytes) += arena->total_bytes();
    plan.uses.insert(plan.uses.end(), arena->uses().begin(), arena->uses().end());
  }
  plan.activations = counts_of(layers.empty() ? ActivationPlan(config_.num_layers) : layers);
  plan.num_trained_parameters = layout_.num_parameters;
  plan.num_blocks = layout_.num_blocks;
  return plan;
}

MemoryPlan TrainingState::plan(const ActivationPlan& layers) const {
  Arenas counting(*device_);
  take_all(counting, layers);
  return memory_of(counting, layers);
}

TrainingState::Arenas::Arenas(const Device& of)
    : device(of),
      host(of, Arena::Place::kHost),
      frames(std::make_shared<Arena>(of, Arena::Place::kHost)) {}

void TrainingState::reserve() {
  arenas_ = std::make_unique<Arenas>(*device_);
  take_all(*arenas_, spec_.layers);
  for (Arena* arena : {&arenas_->device, &arenas_->host, arenas_->frames.get()}) arena->allocate();
  Buffers buffers = take_all(*arenas_, spec_.layers);
  for (Arena* arena : {&arenas_->device, &arenas_->host, arenas_->frames.get()}) arena->seal();
  trained_ = buffers.trained;
  work_ = std::move(buffers.work);
  // Copies beside the operations are not recorded.
  if (work_.transfers.empty()) work_.recording_id = new_recording_id();
  staging_ = buffers.staging;
  sums_ = std::move(buffers.sums);
  norm_sums_ = buffers.norm_sums;
  work_.fill_rotary(config_, *device_);
  if (spec_.is_local) return;
  // The buffers' deleter holds the frames: whoever keeps the exchange keeps them.
  auto keep = std::make_pair(device_, arenas_->frames);  // the frames end first
  exchange_ =
      std::shared_ptr<ExchangeBuffers>(new ExchangeBuffers(exchange_options(), buffers.exchange),
                                       [keep](ExchangeBuffers* buffers) { delete buffers; });
}

std::shared_ptr<ExchangeBuffers> TrainingState::shared_exchange() const {
  if (exchange_) return exchange_;
  throw EngineError("STATE_CONFLICT", "a job in local mode exchanges nothing.");
}

MemoryPlan TrainingState::reserved() const { return memory_of(*arenas_, spec_.layers); }

TrainingState::~TrainingState() {
  if (exchange_) exchange_->stop();
  // A failure is the device's: whoever uses it next is told.
  if (arenas_ && device_->records_calls()) device_->ops().calls_forget(device_->context());
}

}  // namespace tunemesh
