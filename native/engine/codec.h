// Fixed-point gradients of the exchange: rounding, exact packing, digests (docs/decisions/0003-*).
//
// A value is an int64 in units of 2^-48. A block is 256 elements, numbered over the whole trained
// vector; tensors start at a block and the tail of their last block is zero. Every function gives
// the same bits on every path.
//
// A packed block is (shift, width) and 32 * width bytes: all 256 values are multiples of 2^shift
// and value >> shift fits width bits in two's complement. A block of zeros is (0, 0) and takes no
// further bytes. Values are laid out in eight lanes (value j in lane j % 8), each lane 32 values,
// least significant bits first, in 32-bit little-endian words; word k of the lanes stands together.
// Widths above 32 are the low 32 bits (width 32) followed by the rest.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/backend.h"

namespace tunemesh {

inline constexpr size_t kBlockElements = 256;
inline constexpr int kFractionBits = 48;
inline constexpr int kMaxWidth = 64;
// (shift, width) of each block, then the words; the worst case of num_blocks blocks.
inline constexpr size_t max_packed_bytes(size_t num_blocks) {
  return num_blocks * (2 + kMaxWidth * kBlockElements / 8);
}

enum class CodecPath { kGeneric, kAvx2, kAvx512 };
// The widest path of this processor, and the one in use (the widest unless set). For tests:
// set_codec_path returns false where the processor lacks it.
CodecPath widest_codec_path();
CodecPath codec_path();
bool set_codec_path(CodecPath path);

// The contract of TmRoundAndAdd: rounds float blocks to `significant_bits` and adds them to int64.
// TM_OUT_OF_RANGE also where the rounded value or the sum leaves int64. On failure the accumulator
// is partly changed: clear it.
TmStatus round_and_add(const TmRoundAndAdd& args);
// The same into a cleared accumulator: what it holds is overwritten.
TmStatus round_to(const TmRoundAndAdd& args);

// Both, and the accumulator's digest and packed bytes after the call are added to `measure`: for a
// contribution's last micro-batch, so that measuring it takes no pass of its own. `first_block` is
// the number of the range's first block in the whole vector; a range may start and end at any
// block. On failure `measure` is as useless as the accumulator.
struct RangeMeasure {
  uint64_t digest;
  size_t packed_bytes;  // (shift, width) pairs and words, without frame headers
};
TmStatus round_and_add_measured(const TmRoundAndAdd& args, size_t first_block,
                                RangeMeasure* measure);
TmStatus round_to_measured(const TmRoundAndAdd& args, size_t first_block, RangeMeasure* measure);

// Blocks and the number of their first one in the whole vector, on which digests depend.
struct NumberedBlocks {
  size_t first_block, num_blocks;
};

// after = before + what is added; `before` may be `after`, else they do not overlap.
struct SumPlace {
  const int64_t* before;
  int64_t* after;
};
// False where a sum leaves int64 (all elements are written, `after` is then useless).
[[nodiscard]] bool add_blocks(const int64_t* values, size_t num_blocks, const SumPlace& sum);

// Rounds sums to `significant_bits` below each block's largest (ties to even) and writes value *
// 2^-48 as float32, which is exact for significant_bits <= 24. `published` may not overlap `sums`.
struct FinishSum {
  const int64_t* sums;
  float* published;
  NumberedBlocks blocks;
  int significant_bits;
  size_t* bad_block;
};
// Of a range's sums and of what was published for them. Sum of squares in float64: within a block
// element j goes to lane j % 8, lanes are added ((0+1)+(2+3))+((4+5)+(6+7)), blocks in order.
struct FinishedRange {
  uint64_t sum_digest, published_digest;
  double sum_squares;
};
// Adds to `totals`, so that a vector may be finished in pieces. TM_OUT_OF_RANGE where rounding
// leaves the int64 range; bad_block is then set.
TmStatus finish_sum(const FinishSum& args, FinishedRange* totals);

// Published floats back to integers: exact for what finish_sum wrote. TM_NON_FINITE,
// TM_OUT_OF_RANGE, TM_BAD_ARGUMENT for others.
TmStatus floats_to_fixed(const float* published, size_t num_blocks, int64_t* out);

// Where the two parts of packed blocks lie: (shift, width) pairs and words. In a payload the words
// follow the pairs; a caller that packs a chunk in pieces advances both.
struct PackedPlace {
  uint8_t* shapes;
  uint8_t* words;
};
struct PackedSource {
  const uint8_t* shapes;
  const uint8_t* words;
};
inline PackedSource packed_source(std::span<const uint8_t> payload, size_t num_blocks) {
  return {payload.data(), payload.data() + 2 * num_blocks};
}

// Bytes of a whole payload.
size_t packed_bytes(const int64_t* values, size_t num_blocks);
struct PackedWords {
  size_t bytes;  // of the words
  uint64_t digest;
};
PackedWords pack_blocks(const int64_t* values, const NumberedBlocks& blocks, const PackedPlace& to);
// Packs published floats as the integers they stand for; fails as floats_to_fixed does.
struct PackedFloats {
  TmStatus status;
  size_t bytes;  // of the words
};
PackedFloats pack_floats(const float* published, size_t num_blocks, const PackedPlace& to);

// Does `payload` hold exactly num_blocks well-formed blocks? Ask before the unpackers below, which
// trust it.
[[nodiscard]] bool packed_is_valid(std::span<const uint8_t> payload, size_t num_blocks);
// False where a sum leaves int64.
[[nodiscard]] bool unpack_add(const PackedSource& from, size_t num_blocks, const SumPlace& sum);
void unpack(const PackedSource& from, size_t num_blocks, int64_t* out);
// Integers to published floats: value * 2^-48, exact for 24 significant bits, else rounded once.
struct UnpackedFloats {
  uint64_t digest;  // of the integers
  bool is_exact;  // floats_to_fixed would give the integers back; false also where only it can say
};
UnpackedFloats unpack_floats(const PackedSource& from, const NumberedBlocks& blocks,
                             float* published);

// Linear digest D(q) = sum of q[b][j] * R(b) * L(j) mod 2^64; R and L odd, from splitmix64.
// first_block is the number of values' first block in the whole vector.
uint64_t linear_digest(const int64_t* values, size_t first_block, size_t num_blocks);
uint64_t digest_block_factor(size_t block);
uint64_t digest_lane_factor(size_t element);

}  // namespace tunemesh
