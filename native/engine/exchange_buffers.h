// The exchange's side of the gradient memory: contributions, the owner's sum, published sums, frame
// slabs.
//
// Memory comes from the engine's arena, once, as planned; nothing here allocates tensors. Methods
// without "thread" in their comment run on the exchange thread only (post()), so that packing and
// adding do not wait for compute. The engine's thread writes contribution(slot) until the worker
// says the lease is done and reads published(step) after the commit; the worker's step loop orders
// the two threads, no lock is needed on elements.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "engine/codec.h"
#include "engine/error.h"
#include "engine/frame.h"

namespace tunemesh {

inline constexpr int kDefaultFrames = 16;

struct ExchangeOptions {
  size_t num_blocks = 0;    // of the trained vector
  size_t slice_blocks = 0;  // the last slice may be shorter
  size_t chunk_blocks = 0;  // <= kMaxChunkBlocks: a frame stays within 1 MiB whatever the values
  int num_contribution_slots = 0;
  int significant_bits = 24;  // of the published sums
  int num_frames = kDefaultFrames;
};

// Bytes by purpose, each a multiple of 64.
struct ExchangePlan {
  size_t contribution_bytes = 0;  // int64, all slots
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
struct FinishedSlice {
  uint64_t sum_digest, published_digest;
  double sum_squares;
};

class ExchangeBuffers {
 public:
  static ExchangePlan plan(
      const ExchangeOptions& options);  // throws PLAN_MISMATCH for impossible sizes

  ExchangeBuffers(const ExchangeOptions& options, const ExchangeMemory& memory);
  ~ExchangeBuffers();  // ends the thread; commands still queued run first
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
  // num_blocks * 256; zeros are written first where the slot was cleared and not used since.
  int64_t* contribution(int slot);
  // True once after a clear: the caller overwrites the whole slot (round_to) instead of adding.
  bool take_cleared(int slot) { return cleared_.at(slot).exchange(false); }
  float* published(size_t step);  // slot step % 2
  std::span<uint8_t> frames() { return {frames_, options_.num_frames * kMaxFrameBytes}; }
  // A slot whose gradient failed: packing and adding it are refused until it is cleared.
  void poison(int slot) { poisoned_.at(slot).store(true); }
  bool is_poisoned(int slot) const { return poisoned_.at(slot).load(); }
  // Queues a command; throws where kMaxQueued are waiting.
  void post(std::function<void()> command);

  // ---- exchange thread ----
  void clear_slot(int slot);
  SliceMeasure measure_contribution(int slot, size_t slice);
  // Writes the chunk's frame into frame slot `frame` and returns its bytes. Fields of `header` that
  // describe the payload (chunk range, bytes, digest, crc) are filled in here.
  size_t pack_contribution(int slot, FrameHeader header, int frame);
  // Adds a complete slice of one contribution, every chunk once; checks all frames before it
  // touches the sum. Returns the sum of the frames' digests. FRAME_INVALID names the chunk; the sum
  // is then unchanged.
  uint64_t add_contribution_frames(std::span<const std::span<const uint8_t>> frames);
  uint64_t add_own_contribution(int slot, size_t slice);
  void clear_sum(size_t slice);
  FinishedSlice finish_slice(size_t step, size_t slice);
  size_t pack_published(FrameHeader header, int frame);
  void store_published_frame(std::span<const uint8_t> frame);
  uint64_t published_digest(size_t step, size_t slice);

 private:
  static constexpr size_t kMaxQueued = 4096;
  static constexpr size_t kTileBlocks = 16;  // 32 KiB of int64: several passes from the caches
  size_t checked_slice(size_t slice) const;
  int checked_slot(int slot) const;
  FrameHeader parse(std::span<const uint8_t> frame, FrameKind kind) const;
  static bool same_contribution(const FrameHeader& a, const FrameHeader& b);
  [[noreturn]] static void throw_overflow(size_t slice);
  const int64_t* readable(int slot, size_t block);
  const int64_t* published_tile(size_t step, size_t first_block, size_t num_blocks);
  bool take_cleared_sum(size_t slice);
  void place_chunk(FrameHeader& header, int frame) const;
  // Packs a chunk tile by tile; tile(block, num_blocks) gives the values of each.
  template <typename Tile>
  size_t write_frame(FrameHeader header, int frame, Tile tile);
  void run();

  ExchangeOptions options_;
  int64_t* contributions_;
  int64_t* sum_;
  float* published_;
  uint8_t* frames_;
  int64_t* scratch_;
  std::vector<std::atomic<bool>> poisoned_;
  // Clearing is put off to the first use, which then overwrites instead of reading and adding.
  std::vector<std::atomic<bool>> cleared_;
  std::vector<bool> sum_is_cleared_;  // by slice; exchange thread

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace tunemesh
