// Contributions that a device has packed: for each slot and slice what frames carry, and each
// chunk's digest, in host memory that the device copies to. The same layout serves a slice's place
// on the device.
//
// A slice: [1 + 2 * chunks] numbers (TmPackBlocks::told), (shift, width) pairs of its blocks,
// words. Each starts at 64 bytes. The room for words is that of 64-bit values: a slot is never
// smaller than its integers.
#pragma once
#include <cstddef>
#include <cstdint>

#include "engine/codec.h"

namespace tunemesh {

struct PackedSlice {
  PackedSlice(void* at, size_t blocks, size_t blocks_of_chunk);

  size_t num_blocks, chunk_blocks, num_chunks;
  uint64_t* told;
  uint8_t* shapes;
  uint8_t* words;
  size_t head_bytes;   // of numbers and shapes, from `told` on
  size_t total_bytes;  // most

  struct Chunk {
    PackedSource at;
    size_t num_blocks, word_bytes;
    uint64_t digest;
  };
  Chunk chunk(size_t index) const;
  // Are the numbers those of the shapes?
  bool is_whole() const;
  size_t word_bytes() const;
  uint64_t digest() const;
  PackedSource all() const { return {shapes, words}; }  // chunks' words follow each other
};

// Bytes of the words of blocks of these shapes.
size_t packed_word_bytes(const uint8_t* shapes, size_t num_blocks);

// How a vector is cut.
struct SliceCut {
  size_t num_blocks, slice_blocks, chunk_blocks;
  size_t slice_size(size_t slice) const;
};

class PackedSlots {
 public:
  static size_t slot_bytes(const SliceCut& cut);

  PackedSlots(const SliceCut& cut, void* memory)
      : cut_(cut), memory_(static_cast<uint8_t*>(memory)) {}
  // All of a slot's memory: at least 8 bytes an element.
  uint8_t* slot(int slot) const { return memory_ + static_cast<size_t>(slot) * slot_bytes(cut_); }
  PackedSlice slice(int slot, size_t slice) const;

 private:
  SliceCut cut_;
  uint8_t* memory_;
};

}  // namespace tunemesh
