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

}  // namespace

ExchangePlan ExchangeBuffers::plan(const ExchangeOptions& o) {
  check_options(o);
  const size_t elements = o.num_blocks * kBlockElements;
  return {.contribution_bytes = o.num_contribution_slots * elements * sizeof(int64_t),
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
  sum_is_cleared_.assign(num_slices(), false);
  thread_ = std::thread([this] { run(); });
}

ExchangeBuffers::~ExchangeBuffers() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
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
  const size_t elements = options_.num_blocks * kBlockElements;
  int64_t* values = contributions_ + checked_slot(slot) * elements;
  if (take_cleared(slot)) std::memset(values, 0, elements * sizeof(int64_t));
  return values;
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
  const int64_t* values = contribution(slot);
  if (is_poisoned(slot)) {
    throw EngineError("NON_FINITE_GRADIENT",
                      "contribution slot " + std::to_string(slot) +
                          " holds a failed gradient; clear it and compute the lease again");
  }
  return values + block * kBlockElements;
}

void ExchangeBuffers::clear_slot(int slot) {
  cleared_[checked_slot(slot)].store(true);
  poisoned_[slot].store(false);
}

SliceMeasure ExchangeBuffers::measure_contribution(int slot, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice));
  const int64_t* values = readable(slot, first);
  SliceMeasure measure{0, 0};
  // Tile by tile, so that the second reader finds it in the cache.
  for (size_t at = 0, blocks = slice_num_blocks(slice); at < blocks; at += kTileBlocks) {
    const size_t count = std::min(kTileBlocks, blocks - at);
    measure.digest += linear_digest(values + at * kBlockElements, first + at, count);
    measure.packed_bytes += packed_bytes(values + at * kBlockElements, count);
  }
  measure.packed_bytes += num_chunks(slice) * kFrameHeaderBytes;
  return measure;
}

template <typename Tile>
size_t ExchangeBuffers::write_frame(FrameHeader h, int frame, Tile tile) {
  const auto whole = frames().subspan(frame * kMaxFrameBytes, kMaxFrameBytes);
  uint8_t* shapes = whole.data() + kFrameHeaderBytes;
  uint8_t* words = shapes + 2 * h.num_blocks;
  h.codec = frame_codec(options_.significant_bits);
  h.digest = 0;
  for (size_t at = 0; at < h.num_blocks; at += kTileBlocks) {
    const size_t count = std::min<size_t>(kTileBlocks, h.num_blocks - at);
    const int64_t* values = tile(h.first_block + at, count);
    h.digest += linear_digest(values, h.first_block + at, count);
    words += pack_blocks(values, count, {shapes + 2 * at, words});
  }
  h.payload_bytes = static_cast<uint32_t>(words - shapes);
  write_frame_header(h, whole);
  return kFrameHeaderBytes + h.payload_bytes;
}

void ExchangeBuffers::place_chunk(FrameHeader& h, int frame) const {
  checked_slice(h.slice);
  if (h.chunk >= num_chunks(h.slice)) {
    throw EngineError("ENGINE_FAILED", "slice " + text(h.slice) + " has no chunk " + text(h.chunk));
  }
  if (frame < 0 || frame >= options_.num_frames) {
    throw EngineError("ENGINE_FAILED", "frame slot " + std::to_string(frame) + " does not exist");
  }
  const size_t within = h.chunk * options_.chunk_blocks;
  h.num_chunks = static_cast<uint16_t>(num_chunks(h.slice));
  h.first_block = static_cast<uint32_t>(slice_first_block(h.slice) + within);
  h.num_blocks =
      static_cast<uint32_t>(std::min(options_.chunk_blocks, slice_num_blocks(h.slice) - within));
}

size_t ExchangeBuffers::pack_contribution(int slot, FrameHeader header, int frame) {
  place_chunk(header, frame);
  header.kind = FrameKind::kContribution;
  const int64_t* values = readable(slot, 0);
  return write_frame(header, frame,
                     [=](size_t block, size_t) { return values + block * kBlockElements; });
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

uint64_t ExchangeBuffers::add_contribution_frames(
    std::span<const std::span<const uint8_t>> frames) {
  if (frames.empty()) throw EngineError("FRAME_INVALID", "a contribution without frames");
  std::vector<FrameHeader> headers;
  std::vector<bool> seen(frames.size(), false);
  uint64_t digest = 0;
  for (const auto frame : frames) {
    const FrameHeader h = parse(frame, FrameKind::kContribution);
    const FrameHeader& first = headers.empty() ? h : headers.front();
    if (h.num_chunks != frames.size() || seen[h.chunk] || !same_contribution(h, first)) {
      throw EngineError("FRAME_INVALID", "slice " + text(h.slice) + " of lease " + text(h.lease) +
                                             " attempt " + text(h.lease_attempt) + ": chunk " +
                                             text(h.chunk) +
                                             " is doubled or belongs to another contribution");
    }
    seen[h.chunk] = true;
    digest += h.digest;
    headers.push_back(h);
  }
  bool fits = true;
  const size_t slice = headers.front().slice;
  const bool is_first = take_cleared_sum(slice);
  for (size_t i = 0; i < frames.size(); ++i) {
    const FrameHeader& h = headers[i];
    const auto source = packed_source(frames[i].subspan(kFrameHeaderBytes), h.num_blocks);
    int64_t* to = sum_ + h.first_block * kBlockElements;
    if (is_first) {
      unpack(source, h.num_blocks, to);
    } else {
      fits &= unpack_add(source, h.num_blocks, to);
    }
  }
  if (!fits) throw_overflow(slice);
  return digest;
}

bool ExchangeBuffers::same_contribution(const FrameHeader& a, const FrameHeader& b) {
  return a.job_hash == b.job_hash && a.fleet_epoch == b.fleet_epoch && a.step == b.step &&
         a.slice == b.slice && a.slice_attempt == b.slice_attempt && a.lease == b.lease &&
         a.lease_attempt == b.lease_attempt;
}

void ExchangeBuffers::throw_overflow(size_t slice) {
  throw EngineError(
      "GRADIENT_OUT_OF_RANGE",
      "the sum of slice " + text(slice) +
          " leaves the exchange's range of +-32768; lower the learning rate or check the data");
}

uint64_t ExchangeBuffers::add_own_contribution(int slot, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice));
  const int64_t* values = readable(slot, first);
  int64_t* sums = sum_ + first * kBlockElements;
  const bool is_first = take_cleared_sum(slice);
  uint64_t digest = 0;
  bool fits = true;
  for (size_t at = 0, blocks = slice_num_blocks(slice); at < blocks; at += kTileBlocks) {
    const size_t count = std::min(kTileBlocks, blocks - at), offset = at * kBlockElements;
    digest += linear_digest(values + offset, first + at, count);
    if (is_first) {
      std::memcpy(sums + offset, values + offset, count * kBlockElements * sizeof(int64_t));
    } else {
      fits &= add_blocks(values + offset, count, sums + offset);
    }
  }
  if (!fits) throw_overflow(slice);
  return digest;
}

void ExchangeBuffers::clear_sum(size_t slice) { sum_is_cleared_[checked_slice(slice)] = true; }

bool ExchangeBuffers::take_cleared_sum(size_t slice) {
  const bool was_cleared = sum_is_cleared_[slice];
  sum_is_cleared_[slice] = false;
  return was_cleared;
}

FinishedSlice ExchangeBuffers::finish_slice(size_t step, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice)), blocks = slice_num_blocks(slice);
  int64_t* sums = sum_ + first * kBlockElements;
  float* out = published(step) + first * kBlockElements;
  if (take_cleared_sum(slice)) std::memset(sums, 0, blocks * kBlockElements * sizeof(int64_t));
  FinishedSlice finished{0, 0, 0};
  for (size_t at = 0; at < blocks; at += kTileBlocks) {
    const size_t count = std::min(kTileBlocks, blocks - at), offset = at * kBlockElements;
    const TmStatus status = round_sum({.sums = sums + offset,
                                       .published = out + offset,
                                       .num_blocks = count,
                                       .significant_bits = options_.significant_bits,
                                       .bad_block = nullptr});
    if (status != TM_OK) throw_overflow(slice);
    finished.sum_digest += linear_digest(sums + offset, first + at, count);
    finished.published_digest +=
        linear_digest(published_tile(step, first + at, count), first + at, count);
    finished.sum_squares = add_squares(finished.sum_squares, out + offset, count);
  }
  return finished;
}

const int64_t* ExchangeBuffers::published_tile(size_t step, size_t first_block, size_t num_blocks) {
  const float* values = published(step) + first_block * kBlockElements;
  if (floats_to_fixed(values, num_blocks, scratch_) == TM_OK) return scratch_;
  throw EngineError("DIGEST_MISMATCH",
                    "the published sum of step " + text(step) +
                        " holds no published value at blocks " + text(first_block) + " to " +
                        text(first_block + num_blocks) + "; ask for the slice again");
}

size_t ExchangeBuffers::pack_published(FrameHeader header, int frame) {
  place_chunk(header, frame);
  header.kind = FrameKind::kSum;
  header.lease = header.lease_attempt = 0;
  return write_frame(header, frame, [&](size_t block, size_t num_blocks) {
    return published_tile(header.step, block, num_blocks);
  });
}

void ExchangeBuffers::store_published_frame(std::span<const uint8_t> frame) {
  const FrameHeader h = parse(frame, FrameKind::kSum);
  PackedSource from = packed_source(frame.subspan(kFrameHeaderBytes), h.num_blocks);
  float* out = published(h.step) + h.first_block * kBlockElements;
  for (size_t at = 0; at < h.num_blocks; at += kTileBlocks) {
    const size_t count = std::min<size_t>(kTileBlocks, h.num_blocks - at);
    from.words += unpack(from, count, scratch_);
    from.shapes += 2 * count;
    fixed_to_floats(scratch_, count, out + at * kBlockElements);
  }
}

uint64_t ExchangeBuffers::published_digest(size_t step, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice)), blocks = slice_num_blocks(slice);
  uint64_t digest = 0;
  for (size_t at = 0; at < blocks; at += kTileBlocks) {
    const size_t count = std::min(kTileBlocks, blocks - at);
    digest += linear_digest(published_tile(step, first + at, count), first + at, count);
  }
  return digest;
}

}  // namespace tunemesh
