// The exchange's side of the gradient memory: contributions, the owner's sum, published sums, frame
// slabs.
//
// Memory comes from the engine's arena, once, as planned; nothing here allocates tensors. Methods
// without "thread" in their comment run on the exchange thread only (post()), so that packing and
// adding do not wait for compute. The engine's thread writes contribution(slot) until it
// tells a slice (or the whole) to the worker's step loop, and reads published(step) after the
// commit; the worker's step loop orders the two threads, no lock is needed on elements.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/codec.h"
#include "engine/error.h"
#include "engine/frame.h"
#include "engine/packed_slots.h"

namespace tunemesh {

inline constexpr int kDefaultFrames = 16;

struct ExchangeOptions {
  size_t num_blocks = 0;    // of the trained vector
  size_t slice_blocks = 0;  // the last slice may be shorter
  size_t chunk_blocks = 0;  // <= kMaxChunkBlocks: a frame stays within 1 MiB whatever the values
  int num_contribution_slots = 0;
  int significant_bits = 24;  // of the published sums
  int num_frames = kDefaultFrames;
  // A device packs contributions (packed_contribution.h): their slots hold what frames carry, not
  // integers.
  bool is_packed = false;
};

// Bytes by purpose, each a multiple of 64.
struct ExchangePlan {
  size_t contribution_bytes = 0;  // all slots: int64, or packed
  size_t sum_bytes = 0;           // int64
  size_t published_bytes = 0;     // float32, two steps
  size_t frame_bytes = 0;         // num_frames * 1 MiB
  size_t scratch_bytes = 0;       // one tile of int64
  size_t total() const {
    return contribution_bytes + sum_bytes + published_bytes + frame_bytes + scratch_bytes;
  }
};

// One pointer for each number of the plan; 64-byte aligned; outlives the buffers.
struct ExchangeMemory {
  void* contributions = nullptr;
  void* sum = nullptr;
  void* published = nullptr;
  void* frames = nullptr;
  void* scratch = nullptr;
};

struct SliceMeasure {
  uint64_t digest;
  size_t packed_bytes;
};
using FinishedSlice = FinishedRange;

class ExchangeBuffers {
 public:
  static ExchangePlan plan(
      const ExchangeOptions& options);  // throws PLAN_MISMATCH for impossible sizes

  ExchangeBuffers(const ExchangeOptions& options, const ExchangeMemory& memory);
  ~ExchangeBuffers();
  ExchangeBuffers(const ExchangeBuffers&) = delete;
  ExchangeBuffers& operator=(const ExchangeBuffers&) = delete;

  // ---- any thread ----
  const ExchangeOptions& options() const { return options_; }
  FrameLimits limits() const {
    return {options_.num_blocks, options_.slice_blocks, options_.chunk_blocks};
  }
  size_t num_slices() const;
  size_t slice_first_block(size_t slice) const { return slice * options_.slice_blocks; }
  size_t slice_num_blocks(size_t slice) const;
  size_t num_chunks(size_t slice) const;
  // num_blocks * 256, for adding to; zeros are written first where the slot was cleared and not
  // used since. What was noted of the slot's slices is forgotten.
  int64_t* contribution(int slot);
  // True once after a clear: the caller overwrites the whole slot (round_to) instead of adding.
  bool take_cleared(int slot) { return cleared_.at(slot).exchange(false); }
  bool is_cleared(int slot) const { return cleared_.at(slot).load(); }
  // Packed contributions instead: what take_cleared() says; nothing noted of the slot stands.
  bool begin_packed(int slot);
  // Where a slice's bytes belong; it stands once its measure is noted.
  PackedSlice packed_slice(int slot, size_t slice) const { return packed_->slice(slot, slice); }
  // A slot's whole memory, for its integers while it is not packed yet.
  uint8_t* packed_memory(int slot) const { return packed_->slot(slot); }
  // What rounding measured of a slice that stands: nothing will be added to it until the slot is
  // cleared. The passes that would measure it again are then saved.
  void note_measure(int slot, size_t slice, const SliceMeasure& measure);
  // Slot step % 2; for reading: digests of what was finished and stored there are remembered.
  float* published(size_t step);
  std::span<uint8_t> frames() { return {frames_, options_.num_frames * kMaxFrameBytes}; }
  // A slot whose gradient failed: packing and adding it are refused until it is cleared.
  void poison(int slot) { poisoned_.at(slot).store(true); }
  bool is_poisoned(int slot) const { return poisoned_.at(slot).load(); }
  // Queues a command; throws where kMaxQueued are waiting, or once stop() was called.
  void post(std::function<void()> command);
  // Ends the thread, commands still queued run first. From then on only frames() and limits() may
  // be asked, and all memory but the frames may be taken away. Not from the exchange thread.
  void stop();

  // ---- exchange thread ----
  void clear_slot(int slot);
  // As noted, else by a pass over the slice.
  SliceMeasure measure_contribution(int slot, size_t slice);
  // Writes the chunk's frame into frame slot `frame` and returns its bytes. Fields of `header` that
  // describe the payload (chunk range, bytes, digest, crc) are filled in here.
  size_t pack_contribution(int slot, FrameHeader header, int frame);
  // Adds a complete slice of one contribution, every chunk once; checks all frames before it
  // touches the sum. Returns the sum of the frames' digests. FRAME_INVALID names the chunk; the sum
  // is then unchanged.
  uint64_t add_contribution_frames(std::span<const std::span<const uint8_t>> frames);
  // Answers the slice's digest. The first contribution of a cleared sum is not copied: its slot
  // must keep it until the slice is finished or the slot cleared.
  uint64_t add_own_contribution(int slot, size_t slice);
  void clear_sum(size_t slice);
  FinishedSlice finish_slice(size_t step, size_t slice);
  size_t pack_published(FrameHeader header, int frame);
  void store_published_frame(std::span<const uint8_t> frame);
  // Digest of the integers that were finished or stored there; computed from the floats where these
  // were not all float32.
  uint64_t published_digest(size_t step, size_t slice);

 private:
  static constexpr size_t kMaxQueued = 4096;
  static constexpr size_t kTileBlocks = 16;  // 32 KiB of int64: several passes from the caches
  size_t checked_slice(size_t slice) const;
  int checked_slot(int slot) const;
  int64_t* slot_values(int slot);
  const int64_t* readable(int slot, size_t block);
  void check_whole(int slot) const;  // throws for a poisoned slot
  std::optional<SliceMeasure> noted(int slot, size_t slice);
  SliceMeasure standing(int slot, size_t slice);  // of a packed slice
  void forget_measures(int slot);
  FrameHeader parse(std::span<const uint8_t> frame, FrameKind kind) const;
  static bool same_contribution(const FrameHeader& a, const FrameHeader& b);
  [[noreturn]] static void throw_overflow(size_t slice);
  const int64_t* sum_values(size_t slice) const;
  const int64_t* added_to(size_t slice);
  void keep_sum(size_t slice);  // into sum_, wherever it stands
  struct Finishing {
    size_t step;
    FinishedSlice* totals;
  };
  void finish_blocks(const Finishing& to, const NumberedBlocks& blocks, const int64_t* sums);
  void finish_packed(const Finishing& to, const NumberedBlocks& blocks, PackedSource from);
  NumberedBlocks chunk_blocks(size_t slice, size_t chunk) const;
  void place_chunk(FrameHeader& header, int frame) const;
  std::span<uint8_t> frame_at(int frame) {
    return frames().subspan(frame * kMaxFrameBytes, kMaxFrameBytes);
  }
  PackedPlace packed_place(const FrameHeader& header, int frame);
  size_t close_frame(FrameHeader header, int frame, size_t word_bytes);
  struct ChunkDigest;
  ChunkDigest& chunk_digest(size_t step, size_t slice, size_t chunk);
  uint64_t published_chunk_digest(size_t step, size_t slice, size_t chunk);
  [[noreturn]] static void throw_not_published(size_t step, const NumberedBlocks& blocks);
  void run();

  ExchangeOptions options_;
  int64_t* contributions_;
  int64_t* sum_;
  float* published_;
  uint8_t* frames_;
  int64_t* scratch_;
  std::optional<PackedSlots> packed_;
  std::vector<std::atomic<bool>> poisoned_;
  // Clearing is put off to the first use, which then overwrites instead of reading and adding.
  std::vector<std::atomic<bool>> cleared_;
  // Where a slice's sum so far stands: in sum_, nowhere (cleared), or in the slot of the one
  // contribution that was added. Exchange thread.
  static constexpr int kInSum = -1, kCleared = -2;
  std::vector<int> sum_source_;
  // Of the chunks in the published slots, by step % 2, slice and chunk. Exchange thread.
  struct ChunkDigest {
    std::optional<size_t> step;
    uint64_t digest = 0;
  };
  std::vector<ChunkDigest> chunk_digests_;
  std::mutex measures_mutex_;
  std::vector<std::optional<SliceMeasure>> measures_;  // by slot and slice

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  std::once_flag joined_;
  std::thread thread_;
};

}  // namespace tunemesh
