#include "engine/exchange_buffers.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace tunemesh {
namespace {

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }
size_t round_up_64(size_t bytes) { return divide_up(bytes, 64) * 64; }

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
          .scratch_bytes = round_up_64(o.chunk_blocks * kBlockElements * sizeof(int64_t))};
}

ExchangeBuffers::ExchangeBuffers(const ExchangeOptions& options, const ExchangeMemory& memory)
    : options_(options),
      contributions_(static_cast<int64_t*>(memory.contributions)),
      sum_(static_cast<int64_t*>(memory.sum)),
      published_(static_cast<float*>(memory.published)),
      frames_(static_cast<uint8_t*>(memory.frames)),
      scratch_(static_cast<int64_t*>(memory.scratch)),
      poisoned_(options.num_contribution_slots) {
  check_options(options);
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
  return contributions_ + checked_slot(slot) * options_.num_blocks * kBlockElements;
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
  std::memset(contribution(slot), 0, options_.num_blocks * kBlockElements * sizeof(int64_t));
  poisoned_[slot].store(false);
}

SliceMeasure ExchangeBuffers::measure_contribution(int slot, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice));
  const int64_t* values = readable(slot, first);
  SliceMeasure measure{0, 0};
  // Chunk by chunk, so that the second reader finds it in the cache.
  for (size_t at = 0, blocks = slice_num_blocks(slice); at < blocks; at += kMeasureBlocks) {
    const size_t count = std::min(kMeasureBlocks, blocks - at);
    measure.digest += linear_digest(values + at * kBlockElements, first + at, count);
    measure.packed_bytes += packed_bytes(values + at * kBlockElements, count);
  }
  measure.packed_bytes += num_chunks(slice) * kFrameHeaderBytes;
  return measure;
}

size_t ExchangeBuffers::write_frame(FrameHeader h, const int64_t* values, int frame) {
  const auto whole = frames().subspan(frame * kMaxFrameBytes, kMaxFrameBytes);
  h.codec = frame_codec(options_.significant_bits);
  h.digest = linear_digest(values, h.first_block, h.num_blocks);
  h.payload_bytes =
      static_cast<uint32_t>(pack_blocks(values, h.num_blocks, whole.data() + kFrameHeaderBytes));
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
  return write_frame(header, readable(slot, header.first_block), frame);
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
  for (size_t i = 0; i < frames.size(); ++i) {
    const FrameHeader& h = headers[i];
    fits &= unpack_add(frames[i].subspan(kFrameHeaderBytes), h.num_blocks,
                       sum_ + h.first_block * kBlockElements);
  }
  if (!fits) throw_overflow(headers.front().slice);
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
  uint64_t digest = 0;
  bool fits = true;
  for (size_t at = 0, blocks = slice_num_blocks(slice); at < blocks; at += kMeasureBlocks) {
    const size_t count = std::min(kMeasureBlocks, blocks - at);
    digest += linear_digest(values + at * kBlockElements, first + at, count);
    fits &= add_blocks(values + at * kBlockElements, count, sum_ + (first + at) * kBlockElements);
  }
  if (!fits) throw_overflow(slice);
  return digest;
}

void ExchangeBuffers::clear_sum(size_t slice) {
  std::memset(sum_ + slice_first_block(checked_slice(slice)) * kBlockElements, 0,
              slice_num_blocks(slice) * kBlockElements * sizeof(int64_t));
}

FinishedSlice ExchangeBuffers::finish_slice(size_t step, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice)), blocks = slice_num_blocks(slice);
  const int64_t* sums = sum_ + first * kBlockElements;
  float* out = published(step) + first * kBlockElements;
  size_t bad_block = 0;
  const TmStatus status = round_sum({.sums = sums,
                                     .published = out,
                                     .num_blocks = blocks,
                                     .significant_bits = options_.significant_bits,
                                     .bad_block = &bad_block});
  if (status != TM_OK) throw_overflow(slice);
  return {.sum_digest = linear_digest(sums, first, blocks),
          .published_digest = published_digest(step, slice),
          .sum_squares = sum_squares(out, blocks)};
}

const int64_t* ExchangeBuffers::published_chunk(size_t step, size_t first_block,
                                                size_t num_blocks) {
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
  return write_frame(header, published_chunk(header.step, header.first_block, header.num_blocks),
                     frame);
}

void ExchangeBuffers::store_published_frame(std::span<const uint8_t> frame) {
  const FrameHeader h = parse(frame, FrameKind::kSum);
  unpack(frame.subspan(kFrameHeaderBytes), h.num_blocks, scratch_);
  fixed_to_floats(scratch_, h.num_blocks, published(h.step) + h.first_block * kBlockElements);
}

uint64_t ExchangeBuffers::published_digest(size_t step, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice)), blocks = slice_num_blocks(slice);
  uint64_t digest = 0;
  const size_t stride = std::min(kMeasureBlocks, options_.chunk_blocks);
  for (size_t at = 0; at < blocks; at += stride) {
    const size_t count = std::min(stride, blocks - at);
    digest += linear_digest(published_chunk(step, first + at, count), first + at, count);
  }
  return digest;
}

}  // namespace tunemesh
