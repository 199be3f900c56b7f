// The 8-bit floating-point numbers e4m3 (OCP 8-bit Floating Point Specification 1.0, "E4M3"): one
// sign bit, four of the exponent with bias 7, three of the mantissa; subnormal below 2^-6 in steps
// of 2^-9; largest 448; 0x7f and 0xff are NaN, there is no infinity. On the host; cards have
// instructions that round the same.
#pragma once
#include <stdint.h>

#include <bit>
#include <cmath>

namespace tunemesh {

constexpr float kLargestE4m3 = 448.0f;

// What a row with this largest magnitude is divided by (kernels/backend.h, TmQuantiseRows).
struct RowScale {
  float scale, inverse;
};
inline RowScale row_scale(float largest) {
  const float held = std::fmax(largest, 0x1p-100f);
  return {held / kLargestE4m3, kLargestE4m3 / held};
}

// To nearest, ties to even; beyond 448 it is 448.
inline uint8_t e4m3_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7f;
  if (magnitude >= kLargestE4m3) return sign | 0x7e;
  if (magnitude < 0x1p-6f) {
    // Adding 1.5 * 2^23 steps of 2^-9 leaves whole steps in the low bits, rounded to nearest even.
    const float shifted = magnitude + 0x1.8p14f;
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(shifted) & 0x7f);
  }
  // Twenty mantissa bits go; what carries out of the mantissa raises the exponent.
  const uint32_t kept = (bits & 0x7fffffff) + 0x7ffff + (bits >> 20 & 1);
  return sign | static_cast<uint8_t>((kept >> 20) - (120 << 3));
}

inline float e4m3_to_float(uint8_t value) {
  const int exponent = value >> 3 & 15, mantissa = value & 7;
  if (exponent == 15 && mantissa == 7) return std::bit_cast<float>(0x7fc00000u);
  const float magnitude = exponent == 0
                              ? static_cast<float>(mantissa) * 0x1p-9f
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (value & 0x80) != 0 ? -magnitude : magnitude;
}

}  // namespace tunemesh
