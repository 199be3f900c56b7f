#include "engine/exchange_buffers.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace tunemesh {
namespace {

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

std::string text(size_t value) { return std::to_string(value); }

// Whole plan in numbers that fit the header: 16-bit slices and chunks, 32-bit blocks.
void check_options(const ExchangeOptions& o) {
  const auto refuse = [](const std::string& message) {
    throw EngineError("PLAN_MISMATCH", message);
  };
  if (o.num_blocks == 0 || o.num_blocks > UINT32_MAX) {
    refuse("the exchange cannot hold " + text(o.num_blocks) +
           " blocks of 256 elements; it holds 1 to 2^32 - 1");
  }
  if (o.chunk_blocks == 0 || o.chunk_blocks > kMaxChunkBlocks) {
    refuse("chunkBlocks is " + text(o.chunk_blocks) + "; use 1 to " + text(kMaxChunkBlocks));
  }
  if (o.slice_blocks == 0 || divide_up(o.slice_blocks, o.chunk_blocks) > UINT16_MAX) {
    refuse("sliceBlocks is " + text(o.slice_blocks) + "; use 1 to 65535 chunks of " +
           text(o.chunk_blocks));
  }
  if (divide_up(o.num_blocks, o.slice_blocks) > UINT16_MAX) {
    refuse(text(o.num_blocks) + " blocks in slices of " + text(o.slice_blocks) +
           " make more than 65535 slices");
  }
  if (o.num_contribution_slots < 1 || o.num_frames < 1) {
    refuse("the exchange needs at least one contribution slot and one frame");
  }
}

SliceCut cut_of(const ExchangeOptions& o) { return {o.num_blocks, o.slice_blocks, o.chunk_blocks}; }

}  // namespace

ExchangePlan ExchangeBuffers::plan(const ExchangeOptions& o) {
  check_options(o);
  const size_t elements = o.num_blocks * kBlockElements;
  const size_t slot_bytes =
      o.is_packed ? PackedSlots::slot_bytes(cut_of(o)) : elements * sizeof(int64_t);
  return {.contribution_bytes = o.num_contribution_slots * slot_bytes,
          .sum_bytes = elements * sizeof(int64_t),
          .published_bytes = 2 * elements * sizeof(float),
          .frame_bytes = o.num_frames * kMaxFrameBytes,
          .scratch_bytes = kTileBlocks * kBlockElements * sizeof(int64_t)};
}

ExchangeBuffers::ExchangeBuffers(const ExchangeOptions& options, const ExchangeMemory& memory)
    : options_(options),
      contributions_(static_cast<int64_t*>(memory.contributions)),
      sum_(static_cast<int64_t*>(memory.sum)),
      published_(static_cast<float*>(memory.published)),
      frames_(static_cast<uint8_t*>(memory.frames)),
      scratch_(static_cast<int64_t*>(memory.scratch)),
      poisoned_(options.num_contribution_slots),
      cleared_(options.num_contribution_slots) {
  check_options(options);
  sum_source_.assign(num_slices(), kInSum);
  chunk_digests_.resize(2 * num_slices() * num_chunks(0));
  measures_.resize(options.num_contribution_slots * num_slices());
  if (options.is_packed) {
    packed_.emplace(cut_of(options), memory.contributions);
    for (std::atomic<bool>& cleared : cleared_) cleared.store(true);
  }
  thread_ = std::thread([this] { run(); });
}

ExchangeBuffers::~ExchangeBuffers() { stop(); }

void ExchangeBuffers::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  // An engine that closes and an environment that ends may come at once.
  std::call_once(joined_, [this] { thread_.join(); });
}

void ExchangeBuffers::run() {
  for (;;) {
    std::function<void()> command;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      command = std::move(queue_.front());
      queue_.pop_front();
    }
    command();
  }
}

void ExchangeBuffers::post(std::function<void()> command) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw EngineError("ENGINE_FAILED", "the engine of this exchange is closed.");
    if (queue_.size() >= kMaxQueued) {
      throw EngineError("ENGINE_FAILED", "the exchange has " + text(kMaxQueued) +
                                             " commands waiting; await some before sending more");
    }
    queue_.push_back(std::move(command));
  }
  wake_.notify_one();
}

size_t ExchangeBuffers::num_slices() const {
  return divide_up(options_.num_blocks, options_.slice_blocks);
}
size_t ExchangeBuffers::slice_num_blocks(size_t slice) const {
  return std::min(options_.slice_blocks, options_.num_blocks - slice_first_block(slice));
}
size_t ExchangeBuffers::num_chunks(size_t slice) const {
  return divide_up(slice_num_blocks(slice), options_.chunk_blocks);
}

int64_t* ExchangeBuffers::contribution(int slot) {
  if (packed_) throw EngineError("INTERNAL", "a packed contribution has no integers.");
  forget_measures(checked_slot(slot));
  return slot_values(slot);
}

bool ExchangeBuffers::begin_packed(int slot) {
  forget_measures(checked_slot(slot));
  return take_cleared(slot);
}

int64_t* ExchangeBuffers::slot_values(int slot) {
  const size_t elements = options_.num_blocks * kBlockElements;
  int64_t* values = contributions_ + checked_slot(slot) * elements;
  if (take_cleared(slot)) std::memset(values, 0, elements * sizeof(int64_t));
  return values;
}

void ExchangeBuffers::note_measure(int slot, size_t slice, const SliceMeasure& measure) {
  const std::lock_guard lock(measures_mutex_);
  measures_[checked_slot(slot) * num_slices() + checked_slice(slice)] = measure;
}

void ExchangeBuffers::forget_measures(int slot) {
  const std::lock_guard lock(measures_mutex_);
  std::fill_n(measures_.begin() + ptrdiff_t(slot * num_slices()), num_slices(), std::nullopt);
}

std::optional<SliceMeasure> ExchangeBuffers::noted(int slot, size_t slice) {
  const std::lock_guard lock(measures_mutex_);
  return measures_[slot * num_slices() + slice];
}

float* ExchangeBuffers::published(size_t step) {
  return published_ + (step % 2) * options_.num_blocks * kBlockElements;
}

size_t ExchangeBuffers::checked_slice(size_t slice) const {
  if (slice < num_slices()) return slice;
  throw EngineError("ENGINE_FAILED",
                    "slice " + text(slice) + " does not exist; there are " + text(num_slices()));
}

int ExchangeBuffers::checked_slot(int slot) const {
  if (slot >= 0 && slot < options_.num_contribution_slots) return slot;
  throw EngineError("ENGINE_FAILED", "contribution slot " + std::to_string(slot) +
                                         " does not exist; there are " +
                                         std::to_string(options_.num_contribution_slots));
}

const int64_t* ExchangeBuffers::readable(int slot, size_t block) {
  const int64_t* values = slot_values(slot);
  check_whole(slot);
  return values + block * kBlockElements;
}

void ExchangeBuffers::check_whole(int slot) const {
  if (!is_poisoned(slot)) return;
  throw EngineError("NON_FINITE_GRADIENT",
                    "contribution slot " + std::to_string(slot) +
                        " holds a failed gradient; clear it and compute the lease again");
}

void ExchangeBuffers::clear_slot(int slot) {
  for (size_t slice = 0; slice < num_slices(); ++slice) {
    if (sum_source_[slice] == checked_slot(slot)) keep_sum(slice);
  }
  cleared_[checked_slot(slot)].store(true);
  poisoned_[slot].store(false);
  forget_measures(slot);
}

SliceMeasure ExchangeBuffers::standing(int slot, size_t slice) {
  check_whole(checked_slot(slot));
  if (const auto measured = noted(slot, slice)) return *measured;
  throw EngineError("STATE_CONFLICT", "slice " + text(slice) + " of contribution slot " +
                                          std::to_string(slot) +
                                          " is not packed: the lease's last micro-batch does that");
}

SliceMeasure ExchangeBuffers::measure_contribution(int slot, size_t slice) {
  if (packed_) return standing(slot, checked_slice(slice));
  const size_t first = slice_first_block(checked_slice(slice));
  const int64_t* values = readable(slot, first);
  if (const auto measured = noted(slot, slice)) return *measured;
  SliceMeasure measure{0, num_chunks(slice) * kFrameHeaderBytes};
  // Tile by tile, so that the second reader finds it in the cache.
  for (size_t at = 0, blocks = slice_num_blocks(slice); at < blocks; at += kTileBlocks) {
    const size_t count = std::min(kTileBlocks, blocks - at);
    measure.digest += linear_digest(values + at * kBlockElements, first + at, count);
    measure.packed_bytes += packed_bytes(values + at * kBlockElements, count);
  }
  note_measure(slot, slice, measure);
  return measure;
}

size_t ExchangeBuffers::close_frame(FrameHeader h, int frame, size_t word_bytes) {
  h.codec = frame_codec(options_.significant_bits);
  h.payload_bytes = static_cast<uint32_t>(2 * h.num_blocks + word_bytes);
  write_frame_header(h, frame_at(frame));
  return kFrameHeaderBytes + h.payload_bytes;
}

NumberedBlocks ExchangeBuffers::chunk_blocks(size_t slice, size_t chunk) const {
  const size_t within = chunk * options_.chunk_blocks;
  return {slice_first_block(slice) + within,
          std::min(options_.chunk_blocks, slice_num_blocks(slice) - within)};
}

void ExchangeBuffers::place_chunk(FrameHeader& h, int frame) const {
  checked_slice(h.slice);
  if (h.chunk >= num_chunks(h.slice)) {
    throw EngineError("ENGINE_FAILED", "slice " + text(h.slice) + " has no chunk " + text(h.chunk));
  }
  if (frame < 0 || frame >= options_.num_frames) {
    throw EngineError("ENGINE_FAILED", "frame slot " + std::to_string(frame) + " does not exist");
  }
  const NumberedBlocks blocks = chunk_blocks(h.slice, h.chunk);
  h.num_chunks = static_cast<uint16_t>(num_chunks(h.slice));
  h.first_block = static_cast<uint32_t>(blocks.first_block);
  h.num_blocks = static_cast<uint32_t>(blocks.num_blocks);
}

// The payload of a frame slot: (shift, width) pairs, then words.
PackedPlace ExchangeBuffers::packed_place(const FrameHeader& h, int frame) {
  uint8_t* shapes = frame_at(frame).data() + kFrameHeaderBytes;
  return {shapes, shapes + 2 * h.num_blocks};
}

size_t ExchangeBuffers::pack_contribution(int slot, FrameHeader header, int frame) {
  place_chunk(header, frame);
  header.kind = FrameKind::kContribution;
  if (packed_) {
    standing(slot, header.slice);
    const PackedSlice::Chunk chunk = packed_->slice(slot, header.slice).chunk(header.chunk);
    const PackedPlace to = packed_place(header, frame);
    std::memcpy(to.shapes, chunk.at.shapes, 2 * chunk.num_blocks);
    std::memcpy(to.words, chunk.at.words, chunk.word_bytes);
    header.digest = chunk.digest;
    return close_frame(header, frame, chunk.word_bytes);
  }
  const int64_t* values = readable(slot, header.first_block);
  const PackedWords words =
      pack_blocks(values, {header.first_block, header.num_blocks}, packed_place(header, frame));
  header.digest = words.digest;
  return close_frame(header, frame, words.bytes);
}

FrameHeader ExchangeBuffers::parse(std::span<const uint8_t> frame, FrameKind kind) const {
  FrameHeader header;
  const FrameFault fault = parse_frame(frame, limits(), &header);
  if (fault != FrameFault::kNone) {
    throw EngineError("FRAME_INVALID", std::string("a frame of ") + text(frame.size()) +
                                           " bytes is " + frame_fault_text(fault) +
                                           "; it must be sent again");
  }
  if (header.kind != kind || header.codec != frame_codec(options_.significant_bits)) {
    throw EngineError("FRAME_INVALID", "a frame of slice " + text(header.slice) + " chunk " +
                                           text(header.chunk) +
                                           " is of another kind or codec than this job's");
  }
  return header;
}

}  // namespace tunemesh
