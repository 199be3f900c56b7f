// Rounding, adding and finishing: the codec's passes over integers. Part of codec_loops.h.
#ifndef TM_CODEC_NAMESPACE
#error "include engine/codec_loops.h"
#endif

namespace tunemesh {
namespace TM_CODEC_NAMESPACE {

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

// Measures a block as it stands.
struct MeasuredBlock {
  PackedBlock shape;
  uint64_t digest;  // without the block's factor
};
TM_INLINE MeasuredBlock measure_block(const int64_t* values, const uint64_t* lane_factors) {
  ShapeBits shape;
  DigestLanes digest{lane_factors};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint64x8 v = load<Uint64x8>(values + j);
    shape.add(v);
    digest.add(j, v);
  }
  return {shape.shape(), add_lanes(digest.sum)};
}

struct RoundedBlock {
  bool fits;
  MeasuredBlock measured;
};
// Where a block's floats come from and what they are added to.
struct RoundedPlace {
  const float* x;
  int64_t* sum;
};
// kOverwrite: the accumulator's content is taken for zero, whatever it is.
template <bool kOverwrite, bool kMeasure>
TM_INLINE RoundedBlock round_block(const RoundedPlace& at, int shift,
                                   const uint64_t* lane_factors) {
  const double scale = power_of_two_f64(kFractionBits - shift);
  const int64_t limit = range_limit(shift);
  Uint64x8 overflow = {};
  ShapeBits shape;
  DigestLanes digest{lane_factors};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    prefetch_next(at.x + j);
    prefetch_next_for_write(at.sum + j);
    const Int64x8 rounded = round_scaled(load<Float32x8>(at.x + j), scale);
    const Int64x8 beyond = (rounded >= limit) | (rounded <= -limit);
    const Uint64x8 value = (Uint64x8)rounded << shift;
    const Uint64x8 before = kOverwrite ? Uint64x8{} : load<Uint64x8>(at.sum + j);
    const Uint64x8 after = before + value;
    overflow |= ((before ^ after) & (value ^ after)) | (Uint64x8)beyond;
    store(at.sum + j, after);
    if (!kMeasure) continue;
    shape.add(after);
    digest.add(j, after);
  }
  const bool fits = (or_lanes(overflow) >> 63) == 0;
  if (!kMeasure) return {fits, {}};
  return {fits, {shape.shape(), add_lanes(digest.sum)}};
}

template <bool kOverwrite, bool kMeasure>
static TmStatus round_blocks(const TmRoundAndAdd& a, const MeasuredRange& range) {
  for (size_t b = 0; b < a.num_blocks; ++b) {
    const float* x = a.gradient + b * kBlockElements;
    int64_t* sum = a.accumulator + b * kBlockElements;
    const BlockScale block = scale_of(x, a.significant_bits);
    RoundedBlock rounded{true, {}};
    if (block.status != TM_OK) {
      rounded.fits = false;
    } else if (!block.zero) {
      rounded = round_block<kOverwrite, kMeasure>({x, sum}, block.shift, range.lane_factors);
    } else if (kOverwrite) {
      __builtin_memset(sum, 0, kBlockElements * sizeof(int64_t));
    } else if (kMeasure) {
      rounded.measured = measure_block(sum, range.lane_factors);
    }
    if (!rounded.fits) {
      if (a.bad_block != nullptr) *a.bad_block = b;
      return block.status == TM_OK ? TM_OUT_OF_RANGE : block.status;
    }
    if (!kMeasure) continue;
    range.measure->digest += rounded.measured.digest * digest_block_factor(range.first_block + b);
    range.measure->packed_bytes += 2 + 32 * rounded.measured.shape.width;
  }
  return TM_OK;
}

static bool add_blocks(const int64_t* values, size_t num_blocks, const SumPlace& sum) {
  Uint64x8 overflow = {};
  for (size_t j = 0; j < num_blocks * kBlockElements; j += 8) {
    const Uint64x8 value = load<Uint64x8>(values + j);
    const Uint64x8 before = load<Uint64x8>(sum.before + j);
    const Uint64x8 after = before + value;
    overflow |= (before ^ after) & (value ^ after);
    store(sum.after + j, after);
  }
  return (or_lanes(overflow) >> 63) == 0;
}

struct FinishedBlock {
  bool fits;
  uint64_t sum_digest, published_digest;  // without the block's factor
  double squares;
};
TM_INLINE FinishedBlock finish_block(const FinishSum& a, size_t block,
                                     const uint64_t* lane_factors) {
  const int64_t* sums = a.sums + block * kBlockElements;
  float* published = a.published + block * kBlockElements;
  Uint64x8 magnitude = {};
  DigestLanes sum_digest{lane_factors}, published_digest{lane_factors};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    const Uint64x8 q = load<Uint64x8>(sums + j);
    const Uint64x8 sign = (Uint64x8)((Int64x8)q < 0);
    magnitude |= (q ^ sign) - sign;
    sum_digest.add(j, q);
  }
  const int length = bit_length(or_lanes(magnitude));
  if (length > 63) return {false, 0, 0, 0};
  const int shift = length > a.significant_bits ? length - a.significant_bits : 0;
  const float unit = power_of_two_f32(shift - kFractionBits);
  const uint64_t mask = (uint64_t{1} << shift) - 1;
  const uint64_t half_less = shift > 0 ? (uint64_t{1} << (shift - 1)) - 1 : 0;
  const int64_t limit = range_limit(shift);
  Int64x8 beyond = {};
  Float64x8 squares = {};
  for (size_t j = 0; j < kBlockElements; j += 8) {
    prefetch_next(sums + j);
    prefetch_next_for_write(published + j);
    const Int64x8 q = load<Int64x8>(sums + j);
    Int64x8 k = q >> shift;
    if (shift > 0) {
      const Uint64x8 rest = (Uint64x8)q & mask;
      k += (Int64x8)((rest + half_less + ((Uint64x8)k & 1)) >> shift);
    }
    beyond |= (k >= limit) | (k <= -limit);
    published_digest.add(j, (Uint64x8)k);
    // |k| <= 2^24: exact in int32 and in float32.
    const Float32x8 value =
        __builtin_convertvector(__builtin_convertvector(k, Int32x8), Float32x8) * unit;
    store(published + j, value);
    const Float64x8 wide = __builtin_convertvector(value, Float64x8);
    squares += wide * wide;  // the product of two float32 is exact in float64
  }
  return {or_lanes((Uint64x8)beyond) == 0, add_lanes(sum_digest.sum),
          add_lanes(published_digest.sum) << shift, add_lanes(squares)};
}

static TmStatus finish_sum(const FinishSum& a, const uint64_t* lane_factors,
                           FinishedRange* totals) {
  for (size_t b = 0; b < a.blocks.num_blocks; ++b) {
    const FinishedBlock block = finish_block(a, b, lane_factors);
    if (!block.fits) {
      if (a.bad_block != nullptr) *a.bad_block = b;
      return TM_OUT_OF_RANGE;
    }
    const uint64_t factor = digest_block_factor(a.blocks.first_block + b);
    totals->sum_digest += block.sum_digest * factor;
    totals->published_digest += block.published_digest * factor;
    totals->sum_squares += block.squares;
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

static uint64_t linear_digest(const int64_t* values, const DigestRange& range) {
  uint64_t digest = 0;
  for (size_t b = 0; b < range.num_blocks; ++b) {
    DigestLanes lanes{range.lane_factors};
    const int64_t* block = values + b * kBlockElements;
    for (size_t j = 0; j < kBlockElements; j += 8) lanes.add(j, load<Uint64x8>(block + j));
    digest += add_lanes(lanes.sum) * digest_block_factor(range.first_block + b);
  }
  return digest;
}

}  // namespace TM_CODEC_NAMESPACE
}  // namespace tunemesh
