// exp and log of our own: libm differs between machines and has no form of 16 lanes. For *_isa.cc
// only.
#pragma once
#include <stdint.h>
#include <string.h>

#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {

// exp(x) for x <= 0, within 1.01 units of the last place (every float in [-87, 0] compared: 1.010);
// exactly 1 at 0; exactly 0 below -87, where exp(x) < 1.7e-38; NaN stays NaN. Every result is a
// normal number or 0, so that nothing runs at the speed of subnormal arithmetic.
//
// x = n ln2 + r with |r| <= ln2 / 2 and ln2 in two parts; exp(r) by the polynomial of Cephes' expf,
// in fma steps.
inline Vec16 exp_nonpositive(Vec16 x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec16 magic = set1(12582912.0f);
  const Vec16 rounded = fma(x, set1(1.44269504088896341f), magic);
  const Vec16 n = rounded - magic;
  Vec16 r = fnma(n, set1(0.693359375f), x);
  r = fnma(n, set1(-2.12194440e-4f), r);
  Vec16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  const Vec16 y = fma(p, r * r, r) + set1(1.0f);
  return select(less(x, set1(-87.0f)), zero(), y * pow2(to_bits(rounded)));
}

// Natural logarithm of a positive normal double, within 1 unit of the last place (worst of 600,000
// seeded ones: 0.70); infinity stays, anything else gives NaN.
//
// x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its power
// series.
inline double log_positive(double x) {
  if (!(x > 0.0)) return __builtin_nan("");
  if (x > 1.7976931348623157e308) return x;
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  const int64_t n = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  bits -= static_cast<uint64_t>(n) << 52;
  double m;
  memcpy(&m, &bits, sizeof m);
  const double f = m - 1.0;
  const double s = f / (m + 1.0);
  const double z = s * s;
  double series = 1.0 / 23;
  for (int k = 21; k >= 3; k -= 2) series = series * z + 1.0 / k;
  // 2 s = f - s f exactly in real numbers: the small correction keeps log near 1 accurate.
  const double correction = s * (2.0 * z * series - f);
  return n * 0.693147180369123816490 + (f + (correction + n * 1.90821492927058770002e-10));
}

// Sum of a[i] * b[i], fma: 4 accumulators of 16 lanes, vector k on accumulator k mod 4 (the last
// n mod 64 elements on the first), added as (0 + 1) + (2 + 3), then the tree.
inline float dot(const float* a, const float* b, size_t n) {
  Vec16 s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + 16), load(b + i + 16), s1);
    s2 = fma(load(a + i + 32), load(b + i + 32), s2);
    s3 = fma(load(a + i + 48), load(b + i + 48), s3);
  }
  for (; i < n; i += 16) s0 = fma(load_up_to(a + i, n - i), load_up_to(b + i, n - i), s0);
  return sum((s0 + s1) + (s2 + s3));
}

}  // namespace TM_ISA
}  // namespace tunemesh
