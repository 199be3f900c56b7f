// What the codec's loops share: eight lanes, powers of two, rounding. Part of codec_loops.h.
#ifndef TM_CODEC_NAMESPACE
#error "include engine/codec_loops.h"
#endif

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

// The same row of the next block: passes that read a block twice come to it in bursts, which the
// processor does not foresee. Beyond the end nothing happens.
template <typename T>
TM_INLINE void prefetch_next(const T* row) {
  __builtin_prefetch(row + kBlockElements, 0);
}
template <typename T>
TM_INLINE void prefetch_next_for_write(const T* row) {
  __builtin_prefetch(row + kBlockElements, 1);
}

TM_INLINE uint64_t or_lanes(const Uint64x8& v) {
  return v[0] | v[1] | v[2] | v[3] | v[4] | v[5] | v[6] | v[7];
}
TM_INLINE int bit_length(uint64_t v) { return v == 0 ? 0 : 64 - __builtin_clzll(v); }

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

// |k| from which k * 2^shift leaves int64; with no shift nothing that was rounded gets there.
TM_INLINE int64_t range_limit(int shift) { return int64_t{1} << (shift == 0 ? 62 : 63 - shift); }

// The eight lanes as one number, in the digest's and the squares' order.
template <typename V>
TM_INLINE auto add_lanes(const V& v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Gathers what a block's shape follows from.
struct ShapeBits {
  Uint64x8 any = {}, magnitude = {};

  __attribute__((always_inline)) void add(const Uint64x8& v) {
    any |= v;
    magnitude |= v ^ (Uint64x8)((Int64x8)v < 0);
  }
  __attribute__((always_inline)) PackedBlock shape() const {
    const uint64_t bits = or_lanes(any);
    if (bits == 0) return {0, 0};
    const int shift = __builtin_ctzll(bits);
    const int width = bit_length(or_lanes(magnitude) >> shift) + 1;
    return {static_cast<uint8_t>(shift), static_cast<uint8_t>(width)};
  }
};

// Gathers a block's digest, without the block's own factor.
struct DigestLanes {
  const uint64_t* lane_factors;
  Uint64x8 sum = {};

  __attribute__((always_inline)) void add(size_t element, const Uint64x8& v) {
    sum += v * load<Uint64x8>(lane_factors + element);
  }
};

}  // namespace TM_CODEC_NAMESPACE
}  // namespace tunemesh
