// Packing and unpacking of blocks. Part of codec_loops.h.
#ifndef TM_CODEC_NAMESPACE
#error "include engine/codec_loops.h"
#endif

namespace tunemesh {
namespace TM_CODEC_NAMESPACE {

TM_INLINE PackedBlock shape_of(const int64_t* values) {
  ShapeBits bits;
  for (size_t j = 0; j < kBlockElements; j += 8) bits.add(load<Uint64x8>(values + j));
  return bits.shape();
}

TM_INLINE uint32_t low_mask(int width) {
  return width == 32 ? ~uint32_t{0} : (uint32_t{1} << width) - 1;
}
// Packs the low `width` (1..32) bits of row(j) into 32-bit words of eight lanes.
template <typename Row>
TM_INLINE void pack_words(int width, uint8_t* out, Row row) {
  const uint32_t mask = low_mask(width);
  Uint32x8 word = {};
  int filled = 0;
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint32x8 v = row(j) & mask;
    word |= v << filled;
    filled += width;
    if (filled < 32) continue;
    store(out, word);
    out += sizeof word;
    filled -= 32;
    word = filled == 0 ? Uint32x8{} : v >> (width - filled);
  }
}

TM_INLINE void pack_fixed(const int64_t* values, PackedBlock shape, uint8_t* out) {
  pack_words(
      shape.width, out, [&](size_t j) __attribute__((always_inline)) {
        prefetch_next(values + j);
        return __builtin_convertvector(load<Uint64x8>(values + j) >> shape.shift, Uint32x8);
      });
}

static size_t packed_bytes(const int64_t* values, size_t num_blocks) {
  size_t bytes = 2 * num_blocks;
  for (size_t b = 0; b < num_blocks; ++b) bytes += 32 * shape_of(values + b * kBlockElements).width;
  return bytes;
}

static PackedWords pack_blocks(const int64_t* values, const DigestRange& range,
                               const PackedPlace& to) {
  uint8_t* words = to.words;
  uint64_t digest = 0;
  for (size_t b = 0; b < range.num_blocks; ++b) {
    const int64_t* block = values + b * kBlockElements;
    const MeasuredBlock measured = measure_block(block, range.lane_factors);
    const PackedBlock shape = measured.shape;
    digest += measured.digest * digest_block_factor(range.first_block + b);
    to.shapes[2 * b] = shape.shift;
    to.shapes[2 * b + 1] = shape.width;
    if (shape.width == 0) continue;
    if (shape.width <= 32) {
      pack_fixed(block, shape, words);
    } else {
      const auto high_shift = static_cast<uint8_t>(shape.shift + 32);
      pack_fixed(block, {shape.shift, 32}, words);
      pack_fixed(block, {high_shift, static_cast<uint8_t>(shape.width - 32)}, words + 1024);
    }
    words += 32 * shape.width;
  }
  return {static_cast<size_t>(words - to.words), digest};
}

// Published floats of a block as integers of 25 bits and their scale; false where they are none.
struct NarrowBlock {
  TmStatus status;
  PackedBlock shape;  // of the block in units of 2^-48
  int unit_shift;     // integer << unit_shift is the value
};
TM_INLINE NarrowBlock narrow_block(const float* published, int32_t* narrow) {
  // 25 bits: the largest may have been rounded up to the next power of two.
  const BlockScale block = scale_of(published, 25);
  if (block.status != TM_OK || block.zero) return {block.status, {0, 0}, 0};
  const float scale = power_of_two_f32(kFractionBits - block.shift);
  Uint32x8 any = {}, magnitude = {};
  Int32x8 inexact = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    prefetch_next(published + j);
    const Float32x8 scaled = load<Float32x8>(published + j) * scale;
    const Int32x8 k = __builtin_convertvector(scaled, Int32x8);
    inexact |= __builtin_convertvector(k, Float32x8) != scaled;
    any |= (Uint32x8)k;
    magnitude |= (Uint32x8)(k ^ (k < 0));
    store(narrow + j, k);
  }
  if (or_lanes(__builtin_convertvector((Uint32x8)inexact, Uint64x8)) != 0) {
    return {TM_BAD_ARGUMENT, {0, 0}, 0};
  }
  const uint64_t bits = or_lanes(__builtin_convertvector(any, Uint64x8));
  const uint64_t largest = or_lanes(__builtin_convertvector(magnitude, Uint64x8));
  const int zeros = __builtin_ctzll(bits);
  return {TM_OK,
          {static_cast<uint8_t>(block.shift + zeros),
           static_cast<uint8_t>(bit_length(largest >> zeros) + 1)},
          block.shift};
}

static PackedFloats pack_floats(const float* published, size_t num_blocks, const PackedPlace& to) {
  uint8_t* words = to.words;
  int32_t narrow[kBlockElements];
  for (size_t b = 0; b < num_blocks; ++b) {
    const NarrowBlock block = narrow_block(published + b * kBlockElements, narrow);
    if (block.status != TM_OK) return {block.status, 0};
    to.shapes[2 * b] = block.shape.shift;
    to.shapes[2 * b + 1] = block.shape.width;
    if (block.shape.width == 0) continue;
    const int zeros = block.shape.shift - block.unit_shift;
    pack_words(
        block.shape.width, words, [&](size_t j) __attribute__((always_inline)) {
          return (Uint32x8)(load<Int32x8>(narrow + j) >> zeros);
        });
    words += 32 * block.shape.width;
  }
  return {TM_OK, static_cast<size_t>(words - to.words)};
}

// Reads rows of eight values of `width` (1..32) bits, sign not extended.
struct WordReader {
  const uint8_t* at;
  Uint32x8 word = {};
  int left = 0;  // bits of `word` not yet read

  __attribute__((always_inline)) Uint32x8 next(int width, uint32_t mask) {
    if (left == 0) {
      take();
    }
    Uint32x8 v = word >> (32 - left);
    if (left < width) {
      const int have = left;
      take();
      v |= word << have;
      left = 32 - (width - have);
    } else {
      left -= width;
    }
    return v & mask;
  }
  __attribute__((always_inline)) void take() {
    word = load<Uint32x8>(at);
    at += sizeof word;
    left = 32;
  }
};

TM_INLINE Int32x8 extend_sign(const Uint32x8& v, int width) {
  const int spare = 32 - width;
  return (Int32x8)(v << spare) >> spare;
}

// Calls use(element, value >> shift) for each row of eight values; width 1..32.
template <typename Use>
TM_INLINE void unpack_narrow(int width, const uint8_t* words, Use use) {
  const uint32_t mask = low_mask(width);
  WordReader low{words};
  for (size_t j = 0; j < kBlockElements; j += 8) use(j, extend_sign(low.next(width, mask), width));
}

// Calls use(element, value) for each row of eight values.
template <typename Use>
TM_INLINE void unpack_block(PackedBlock shape, const uint8_t* words, Use use) {
  const int shift = shape.shift, width = shape.width;
  if (width <= 32) {
    unpack_narrow(
        width, words, [&](size_t j, const Int32x8& k) __attribute__((always_inline)) {
          use(j, (Uint64x8) __builtin_convertvector(k, Int64x8) << shift);
        });
    return;
  }
  const uint32_t mask = low_mask(width - 32);
  WordReader high{words + 1024};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint64x8 low = __builtin_convertvector(load<Uint32x8>(words + 4 * j), Uint64x8);
    const Int32x8 rest = extend_sign(high.next(width - 32, mask), width - 32);
    use(j, ((Uint64x8) __builtin_convertvector(rest, Int64x8) << 32 | low) << shift);
  }
}

TM_INLINE PackedBlock shape_at(const PackedSource& from, size_t block) {
  return {from.shapes[2 * block], from.shapes[2 * block + 1]};
}

static bool unpack_add(const PackedSource& from, size_t num_blocks, const SumPlace& sum) {
  const uint8_t* words = from.words;
  Uint64x8 overflow = {};
  for (size_t b = 0; b < num_blocks; ++b) {
    const PackedBlock shape = shape_at(from, b);
    const int64_t* base = sum.before + b * kBlockElements;
    int64_t* to = sum.after + b * kBlockElements;
    if (shape.width == 0) {
      if (base != to) __builtin_memcpy(to, base, kBlockElements * sizeof(int64_t));
      continue;
    }
    unpack_block(
        shape, words, [&](size_t j, const Uint64x8& value) __attribute__((always_inline)) {
          prefetch_next(base + j);
          prefetch_next_for_write(to + j);
          const Uint64x8 before = load<Uint64x8>(base + j);
          const Uint64x8 after = before + value;
          overflow |= (before ^ after) & (value ^ after);
          store(to + j, after);
        });
    words += 32 * shape.width;
  }
  return (or_lanes(overflow) >> 63) == 0;
}

static void unpack(const PackedSource& from, size_t num_blocks, int64_t* out) {
  const uint8_t* words = from.words;
  for (size_t b = 0; b < num_blocks; ++b) {
    const PackedBlock shape = shape_at(from, b);
    int64_t* to = out + b * kBlockElements;
    if (shape.width == 0) {
      __builtin_memset(to, 0, kBlockElements * sizeof(int64_t));
      continue;
    }
    unpack_block(
        shape, words, [&](size_t j, const Uint64x8& value) __attribute__((always_inline)) {
          store(to + j, value);
        });
    words += 32 * shape.width;
  }
}

// Are the block's values float32, each exactly and within the range that floats_to_fixed takes?
TM_INLINE bool is_float_exact(PackedBlock shape) {
  return shape.width <= 25 && shape.shift + shape.width < kMaxWidth;
}

struct BlockWords {
  PackedBlock shape;
  const uint8_t* words;
};
// Answers the block's digest without its factor.
TM_INLINE uint64_t unpack_block_floats(const BlockWords& from, const uint64_t* lane_factors,
                                       float* out) {
  const auto [shape, words] = from;
  DigestLanes digest{lane_factors};
  if (is_float_exact(shape)) {
    const float unit = power_of_two_f32(shape.shift - kFractionBits);
    unpack_narrow(
        shape.width, words, [&](size_t j, const Int32x8& k) __attribute__((always_inline)) {
          prefetch_next_for_write(out + j);
          digest.add(j, (Uint64x8) __builtin_convertvector(k, Int64x8));
          store(out + j, __builtin_convertvector(k, Float32x8) * unit);
        });
    return add_lanes(digest.sum) << shape.shift;
  }
  const float unit = power_of_two_f32(-kFractionBits);
  unpack_block(
      shape, words, [&](size_t j, const Uint64x8& value) __attribute__((always_inline)) {
        digest.add(j, value);
        store(out + j, __builtin_convertvector((Int64x8)value, Float32x8) * unit);
      });
  return add_lanes(digest.sum);
}

static UnpackedFloats unpack_floats(const PackedSource& from, const DigestRange& range,
                                    float* published) {
  const uint8_t* words = from.words;
  UnpackedFloats unpacked{0, true};
  for (size_t b = 0; b < range.num_blocks; ++b) {
    const PackedBlock shape = shape_at(from, b);
    float* out = published + b * kBlockElements;
    if (shape.width == 0) {
      __builtin_memset(out, 0, kBlockElements * sizeof(float));
      continue;
    }
    unpacked.digest += unpack_block_floats({shape, words}, range.lane_factors, out) *
                       digest_block_factor(range.first_block + b);
    unpacked.is_exact &= is_float_exact(shape);
    words += 32 * shape.width;
  }
  return unpacked;
}

}  // namespace TM_CODEC_NAMESPACE
}  // namespace tunemesh
