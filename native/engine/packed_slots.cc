#include "engine/packed_slots.h"

#include <algorithm>

namespace tunemesh {
namespace {

constexpr size_t kWordBytesOfBit = 32;  // of a block
constexpr size_t kMostWordBytes = kMaxWidth * kWordBytesOfBit;

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

size_t packed_word_bytes(const uint8_t* shapes, size_t num_blocks) {
  size_t bytes = 0;
  for (size_t b = 0; b < num_blocks; ++b) bytes += kWordBytesOfBit * shapes[2 * b + 1];
  return bytes;
}

PackedSlice::PackedSlice(void* at, size_t blocks, size_t blocks_of_chunk)
    : num_blocks(blocks),
      chunk_blocks(blocks_of_chunk),
      num_chunks((blocks + blocks_of_chunk - 1) / blocks_of_chunk),
      told(static_cast<uint64_t*>(at)) {
  const size_t numbers = aligned((1 + 2 * num_chunks) * sizeof(uint64_t));
  head_bytes = numbers + aligned(2 * num_blocks);
  total_bytes = head_bytes + kMostWordBytes * num_blocks;
  if (at == nullptr) {
    shapes = words = nullptr;
    return;
  }
  shapes = static_cast<uint8_t*>(at) + numbers;
  words = static_cast<uint8_t*>(at) + head_bytes;
}

PackedSlice::Chunk PackedSlice::chunk(size_t index) const {
  const size_t first = index * chunk_blocks;
  size_t offset = 0;
  for (size_t i = 0; i < index; ++i) offset += told[2 + 2 * i];
  return {{shapes + 2 * first, words + offset},
          std::min(chunk_blocks, num_blocks - first),
          told[2 + 2 * index],
          told[1 + 2 * index]};
}

bool PackedSlice::is_whole() const {
  for (size_t i = 0; i < num_chunks; ++i) {
    const size_t first = i * chunk_blocks;
    const size_t count = std::min(chunk_blocks, num_blocks - first);
    for (size_t b = first; b < first + count; ++b) {
      if (shapes[2 * b] + shapes[2 * b + 1] > kMaxWidth) return false;
    }
    if (told[2 + 2 * i] != packed_word_bytes(shapes + 2 * first, count)) return false;
  }
  return true;
}

size_t PackedSlice::word_bytes() const {
  size_t bytes = 0;
  for (size_t i = 0; i < num_chunks; ++i) bytes += told[2 + 2 * i];
  return bytes;
}

uint64_t PackedSlice::digest() const {
  uint64_t digest = 0;
  for (size_t i = 0; i < num_chunks; ++i) digest += told[1 + 2 * i];
  return digest;
}

size_t SliceCut::slice_size(size_t slice) const {
  return std::min(slice_blocks, num_blocks - slice * slice_blocks);
}

size_t PackedSlots::slot_bytes(const SliceCut& cut) {
  const size_t last = (cut.num_blocks - 1) / cut.slice_blocks;
  const size_t whole = PackedSlice(nullptr, cut.slice_blocks, cut.chunk_blocks).total_bytes;
  return last * whole + PackedSlice(nullptr, cut.slice_size(last), cut.chunk_blocks).total_bytes;
}

PackedSlice PackedSlots::slice(int slot, size_t slice) const {
  const size_t whole = PackedSlice(nullptr, cut_.slice_blocks, cut_.chunk_blocks).total_bytes;
  return {this->slot(slot) + slice * whole, cut_.slice_size(slice), cut_.chunk_blocks};
}

}  // namespace tunemesh
