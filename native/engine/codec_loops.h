// The codec's loops, written once on eight lanes and compiled once for each instruction path
// (codec_generic.cc, codec_avx2.cc, codec_avx512.cc), inside the including file's namespace.
//
// Integer results are exact; float64 operations are either exact (noted) or one fixed chain for
// each lane, so every path gives the same bits.
#ifndef TM_CODEC_NAMESPACE
#error "include this from one of codec_{generic,avx2,avx512}.cc"
#endif

#include "engine/codec_table.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace tunemesh {
namespace TM_CODEC_NAMESPACE {

typedef int64_t Int64x8 __attribute__((vector_size(64)));
typedef uint64_t Uint64x8 __attribute__((vector_size(64)));
typedef int32_t Int32x8 __attribute__((vector_size(32)));
typedef uint32_t Uint32x8 __attribute__((vector_size(32)));
typedef float Float32x8 __attribute__((vector_size(32)));
typedef double Float64x8 __attribute__((vector_size(64)));

#define TM_INLINE static inline __attribute__((always_inline))

template <typename V>
TM_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}
template <typename V>
TM_INLINE void store(void* to, const V& value) {
  __builtin_memcpy(to, &value, sizeof(V));
}

TM_INLINE uint64_t or_lanes(const Uint64x8& v) {
  return v[0] | v[1] | v[2] | v[3] | v[4] | v[5] | v[6] | v[7];
}
TM_INLINE int bit_length(uint64_t v) { return v == 0 ? 0 : 64 - __builtin_clzll(v); }

TM_INLINE uint32_t max_magnitude_bits(const float* x) {
  Int32x8 top = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Int32x8 bits = load<Int32x8>(x + j) & 0x7fffffff;
    top = bits > top ? bits : top;
  }
  int32_t most = 0;
  for (int lane = 0; lane < 8; ++lane) most = top[lane] > most ? top[lane] : most;
  return static_cast<uint32_t>(most);
}

// 2^exponent, -126..127 and -1022..1023.
TM_INLINE float power_of_two_f32(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
TM_INLINE double power_of_two_f64(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Adding 1.5 * 2^52 leaves |v| <= 2^51 rounded to the nearest integer (ties to even) in the low
// bits.
constexpr double kRoundingMagic = 6755399441055744.0;
constexpr int64_t kRoundingMagicBits = 0x4338000000000000;

TM_INLINE Int64x8 round_scaled(const Float32x8& x, double scale) {
  // The product is exact: a power of two, far from the ends of float64.
  const Float64x8 shifted = __builtin_convertvector(x, Float64x8) * scale + kRoundingMagic;
  return (Int64x8)shifted - kRoundingMagicBits;
}

constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr uint32_t kRangeBits = 0x47000000;  // 32768.0f

// The block's unit is 2^(shift - 48).
struct BlockScale {
  TmStatus status;
  bool zero;
  int shift;
};
TM_INLINE BlockScale scale_of(const float* x, int significant_bits) {
  const uint32_t top = max_magnitude_bits(x);
  if (top >= kInfinityBits) return {TM_NON_FINITE, false, 0};
  if (top >= kRangeBits) return {TM_OUT_OF_RANGE, false, 0};
  const int exponent = static_cast<int>(top >> 23) - 127;
  const int shift = exponent + 1 - significant_bits + kFractionBits;
  return {TM_OK, top == 0, shift > 0 ? shift : 0};
}

// |k| from which k * 2^shift leaves int64; with no shift nothing that was rounded gets there.
TM_INLINE int64_t range_limit(int shift) { return int64_t{1} << (shift == 0 ? 62 : 63 - shift); }

// kOverwrite: the accumulator's content is taken for zero, whatever it is.
template <bool kOverwrite>
static TmStatus round_blocks(const TmRoundAndAdd& a) {
  for (size_t b = 0; b < a.num_blocks; ++b) {
    const float* x = a.gradient + b * kBlockElements;
    int64_t* sum = a.accumulator + b * kBlockElements;
    const BlockScale block = scale_of(x, a.significant_bits);
    if (block.zero) {
      if (kOverwrite) __builtin_memset(sum, 0, kBlockElements * sizeof(int64_t));
      continue;
    }
    Uint64x8 overflow = {};
    if (block.status == TM_OK) {
      const double scale = power_of_two_f64(kFractionBits - block.shift);
      const int64_t limit = range_limit(block.shift);
      for (size_t j = 0; j < kBlockElements; j += 8) {
        const Int64x8 rounded = round_scaled(load<Float32x8>(x + j), scale);
        const Int64x8 beyond = (rounded >= limit) | (rounded <= -limit);
        const Uint64x8 value = (Uint64x8)rounded << block.shift;
        const Uint64x8 before = kOverwrite ? Uint64x8{} : load<Uint64x8>(sum + j);
        const Uint64x8 after = before + value;
        overflow |= ((before ^ after) & (value ^ after)) | (Uint64x8)beyond;
        store(sum + j, after);
      }
    }
    const bool fits = (or_lanes(overflow) >> 63) == 0;
    if (block.status == TM_OK && fits) continue;
    if (a.bad_block != nullptr) *a.bad_block = b;
    return block.status == TM_OK ? TM_OUT_OF_RANGE : block.status;
  }
  return TM_OK;
}

static bool add_blocks(const int64_t* values, size_t num_blocks, int64_t* sum) {
  Uint64x8 overflow = {};
  for (size_t j = 0; j < num_blocks * kBlockElements; j += 8) {
    const Uint64x8 value = load<Uint64x8>(values + j);
    const Uint64x8 before = load<Uint64x8>(sum + j);
    const Uint64x8 after = before + value;
    overflow |= (before ^ after) & (value ^ after);
    store(sum + j, after);
  }
  return (or_lanes(overflow) >> 63) == 0;
}

// Rounds one block; false where it leaves the range.
TM_INLINE bool round_block(const int64_t* sums, int significant_bits, float* published) {
  Uint64x8 magnitude = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Int64x8 q = load<Int64x8>(sums + j);
    const Uint64x8 sign = (Uint64x8)(q < 0);
    magnitude |= ((Uint64x8)q ^ sign) - sign;
  }
  const int length = bit_length(or_lanes(magnitude));
  if (length > 63) return false;
  const int shift = length > significant_bits ? length - significant_bits : 0;
  const float unit = power_of_two_f32(shift - kFractionBits);
  const uint64_t mask = (uint64_t{1} << shift) - 1;
  const uint64_t half_less = shift > 0 ? (uint64_t{1} << (shift - 1)) - 1 : 0;
  const int64_t limit = range_limit(shift);
  Int64x8 beyond = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Int64x8 q = load<Int64x8>(sums + j);
    Int64x8 k = q >> shift;
    if (shift > 0) {
      const Uint64x8 rest = (Uint64x8)q & mask;
      k += (Int64x8)((rest + half_less + ((Uint64x8)k & 1)) >> shift);
    }
    beyond |= (k >= limit) | (k <= -limit);
    // |k| <= 2^24: exact in int32 and in float32.
    const Float32x8 value = __builtin_convertvector(__builtin_convertvector(k, Int32x8), Float32x8);
    store(published + j, value * unit);
  }
  return or_lanes((Uint64x8)beyond) == 0;
}

static TmStatus round_sum(const RoundSum& a) {
  for (size_t b = 0; b < a.num_blocks; ++b) {
    const size_t at = b * kBlockElements;
    if (round_block(a.sums + at, a.significant_bits, a.published + at)) continue;
    if (a.bad_block != nullptr) *a.bad_block = b;
    return TM_OUT_OF_RANGE;
  }
  return TM_OK;
}

static TmStatus floats_to_fixed(const float* published, size_t num_blocks, int64_t* out) {
  for (size_t at = 0; at < num_blocks * kBlockElements; at += kBlockElements) {
    // 25 bits: the largest may have been rounded up to the next power of two.
    const BlockScale block = scale_of(published + at, 25);
    if (block.status != TM_OK) return block.status;
    const double scale = power_of_two_f64(kFractionBits - block.shift);
    const double unit = power_of_two_f64(block.shift - kFractionBits);
    Int64x8 inexact = {};
    for (size_t j = at; j < at + kBlockElements; j += 8) {
      const Float32x8 x = load<Float32x8>(published + j);
      const Int64x8 k = round_scaled(x, scale);
      // Back through the magic number: exact, and free of a conversion that AVX2 lacks.
      const Float64x8 back = ((Float64x8)(k + kRoundingMagicBits) - kRoundingMagic) * unit;
      inexact |= back != __builtin_convertvector(x, Float64x8);
      store(out + j, (Uint64x8)k << block.shift);
    }
    if (or_lanes((Uint64x8)inexact) != 0) return TM_BAD_ARGUMENT;
  }
  return TM_OK;
}

static void fixed_to_floats(const int64_t* values, size_t num_blocks, float* out) {
  const float unit = power_of_two_f32(-kFractionBits);
  for (size_t j = 0; j < num_blocks * kBlockElements; j += 8) {
    store(out + j, __builtin_convertvector(load<Int64x8>(values + j), Float32x8) * unit);
  }
}

TM_INLINE PackedBlock shape_of(const int64_t* values) {
  Uint64x8 any = {}, magnitude = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Int64x8 v = load<Int64x8>(values + j);
    any |= (Uint64x8)v;
    magnitude |= (Uint64x8)(v ^ (v < 0));
  }
  const uint64_t bits = or_lanes(any);
  if (bits == 0) return {0, 0};
  const int shift = __builtin_ctzll(bits);
  const int width = bit_length(or_lanes(magnitude) >> shift) + 1;
  return {static_cast<uint8_t>(shift), static_cast<uint8_t>(width)};
}

// Low `width` (<= 32) bits of value >> shift, in 32-bit words of eight lanes.
TM_INLINE void pack_words(const int64_t* values, int shift, int width, uint8_t* out) {
  const uint32_t mask = width == 32 ? ~uint32_t{0} : (uint32_t{1} << width) - 1;
  Uint32x8 word = {};
  int filled = 0;
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint64x8 wide = load<Uint64x8>(values + j) >> shift;
    const Uint32x8 v = __builtin_convertvector(wide, Uint32x8) & mask;
    word |= v << filled;
    filled += width;
    if (filled < 32) continue;
    store(out, word);
    out += sizeof word;
    filled -= 32;
    word = filled == 0 ? Uint32x8{} : v >> (width - filled);
  }
}

static size_t packed_bytes(const int64_t* values, size_t num_blocks) {
  size_t bytes = 2 * num_blocks;
  for (size_t b = 0; b < num_blocks; ++b) bytes += 32 * shape_of(values + b * kBlockElements).width;
  return bytes;
}

static size_t pack_blocks(const int64_t* values, size_t num_blocks, const PackedPlace& to) {
  uint8_t* words = to.words;
  for (size_t b = 0; b < num_blocks; ++b) {
    const int64_t* block = values + b * kBlockElements;
    const PackedBlock shape = shape_of(block);
    to.shapes[2 * b] = shape.shift;
    to.shapes[2 * b + 1] = shape.width;
    if (shape.width == 0) continue;
    const int low = shape.width > 32 ? 32 : shape.width;
    pack_words(block, shape.shift, low, words);
    if (shape.width > 32) pack_words(block, shape.shift + 32, shape.width - 32, words + 1024);
    words += 32 * shape.width;
  }
  return static_cast<size_t>(words - to.words);
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

TM_INLINE uint32_t low_mask(int width) {
  return width == 32 ? ~uint32_t{0} : (uint32_t{1} << width) - 1;
}
TM_INLINE Int64x8 extend_sign(const Uint32x8& v, int width) {
  const int spare = 32 - width;
  return __builtin_convertvector((Int32x8)(v << spare) >> spare, Int64x8);
}

// Calls use(element, value) for each row of eight values.
template <typename Use>
TM_INLINE void unpack_block(PackedBlock shape, const uint8_t* words, Use use) {
  const int shift = shape.shift, width = shape.width;
  if (width <= 32) {
    const uint32_t mask = low_mask(width);
    WordReader low{words};
    for (size_t j = 0; j < kBlockElements; j += 8) {
      use(j, (Uint64x8)extend_sign(low.next(width, mask), width) << shift);
    }
    return;
  }
  const uint32_t mask = low_mask(width - 32);
  WordReader high{words + 1024};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint64x8 low = __builtin_convertvector(load<Uint32x8>(words + 4 * j), Uint64x8);
    const Uint64x8 top = (Uint64x8)extend_sign(high.next(width - 32, mask), width - 32) << 32;
    use(j, (top | low) << shift);
  }
}

static bool unpack_add(const PackedSource& from, size_t num_blocks, int64_t* sum) {
  const uint8_t* words = from.words;
  Uint64x8 overflow = {};
  for (size_t b = 0; b < num_blocks; ++b) {
    const PackedBlock shape{from.shapes[2 * b], from.shapes[2 * b + 1]};
    if (shape.width == 0) continue;
    int64_t* to = sum + b * kBlockElements;
    unpack_block(
        shape, words, [&](size_t j, const Uint64x8& value) __attribute__((always_inline)) {
          const Uint64x8 before = load<Uint64x8>(to + j);
          const Uint64x8 after = before + value;
          overflow |= (before ^ after) & (value ^ after);
          store(to + j, after);
        });
    words += 32 * shape.width;
  }
  return (or_lanes(overflow) >> 63) == 0;
}

static size_t unpack(const PackedSource& from, size_t num_blocks, int64_t* out) {
  const uint8_t* words = from.words;
  for (size_t b = 0; b < num_blocks; ++b) {
    const PackedBlock shape{from.shapes[2 * b], from.shapes[2 * b + 1]};
    int64_t* to = out + b * kBlockElements;
    if (shape.width == 0) {
      for (size_t j = 0; j < kBlockElements; j += 8) store(to + j, Int64x8{});
      continue;
    }
    unpack_block(
        shape, words, [&](size_t j, const Uint64x8& value) __attribute__((always_inline)) {
          store(to + j, value);
        });
    words += 32 * shape.width;
  }
  return static_cast<size_t>(words - from.words);
}

static uint64_t linear_digest(const int64_t* values, const DigestRange& range) {
  uint64_t digest = 0;
  for (size_t b = 0; b < range.num_blocks; ++b) {
    const int64_t* block = values + b * kBlockElements;
    Uint64x8 sum = {};
    for (size_t j = 0; j < kBlockElements; j += 8) {
      sum += load<Uint64x8>(block + j) * load<Uint64x8>(range.lane_factors + j);
    }
    const uint64_t total =
        ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    digest += total * digest_block_factor(range.first_block + b);
  }
  return digest;
}

static double add_squares(double total, const float* values, size_t num_blocks) {
  for (size_t b = 0; b < num_blocks; ++b) {
    const float* block = values + b * kBlockElements;
    Float64x8 sum = {};
    for (size_t j = 0; j < kBlockElements; j += 8) {
      const Float64x8 x = __builtin_convertvector(load<Float32x8>(block + j), Float64x8);
      sum += x * x;  // the product of two float32 is exact in float64
    }
    total += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
  }
  return total;
}

extern const CodecTable kTable = {
    round_blocks<false>, round_blocks<true>, add_blocks,  round_sum,  floats_to_fixed,
    fixed_to_floats,     packed_bytes,       pack_blocks, unpack_add, unpack,
    linear_digest,       add_squares};

}  // namespace TM_CODEC_NAMESPACE
}  // namespace tunemesh
