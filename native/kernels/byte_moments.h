// AdamW's moments in 8 bits, to the bit the same on every backend (docs/decisions, "8-bit
// moments"). A canonical block of 256 elements shares one exponent E, that of its largest magnitude
// as a float32 has it (8 bits, a byte of its own); an element is a small float below it:
//
//   first moment    sign, 4 bits of exponent, 3 of mantissa: down to 2^-17 of the largest
//   second moment   5 bits of exponent, 3 of mantissa: down to 2^-33. It never has a sign
//
//   value   code c = 8 e + f, e > 0: (1 + f / 8) 2^(E - 127 + e - top), top being the largest e;
//           e = 0: f / 8 of the least of those. Exact in float32, as the scale is a power of two
//   rounds  stochastically by the same 16 bits as bfloat16 states (stochastic_rounding.h): the
//           float's bits plus the noise, of which sign, exponent and 3 bits stay. Codes of e = 0
//           are rounded so in units of their step. Zero stays zero; a second moment above zero
//           never becomes zero, so that no move is divided by epsilon alone
//   E       of the largest after rounding, at least kLeastExponent
//   sees    infinity and NaN: they stay, with E of 255
#pragma once
#include <stdint.h>
#include <string.h>

#include "kernels/philox.h"

namespace tunemesh {

constexpr uint32_t kLeastExponent = 34;  // below it steps would leave float32's normal range
constexpr uint32_t kFirstMomentTop = 15, kSecondMomentTop = 31;

TM_HOST_DEVICE inline float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}
TM_HOST_DEVICE inline uint32_t bits_of_float(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// `magnitude`: bits of a float32 without its sign. What is rounded is cut to 12 bits.
TM_HOST_DEVICE inline uint32_t noisy_magnitude(uint32_t magnitude, uint32_t noise) {
  if (magnitude < 0x7f800000u) return magnitude + (noise << 4);
  return magnitude == 0x7f800000u ? magnitude : 0x7fc00000u;
}
// Of a block: of the largest of its noisy magnitudes.
TM_HOST_DEVICE inline uint32_t block_exponent(uint32_t largest) {
  const uint32_t exponent = largest >> 23;
  return exponent < kLeastExponent ? kLeastExponent : exponent;
}

TM_HOST_DEVICE inline uint32_t moment_code(uint32_t magnitude, uint32_t noise, uint32_t exponent,
                                           uint32_t top) {
  const uint32_t least = exponent - top + 1;  // of the codes with e = 1
  if (magnitude >> 23 >= least) {
    return (noisy_magnitude(magnitude, noise) >> 20) - (exponent - top) * 8;
  }
  // In [8, 16] now, where 8 steps of the code are 8 steps of the float's first 3 bits.
  const float step = float_of_bits((257 - least) << 23);
  const float shifted = float_of_bits(magnitude) * step + 8.0f;
  return ((bits_of_float(shifted) + (noise << 4)) >> 20) - (0x41000000u >> 20);
}
TM_HOST_DEVICE inline float moment_value(uint32_t code, uint32_t exponent, uint32_t top) {
  const uint32_t base = (exponent - top) << 23;
  if (code >= 8) return float_of_bits((code << 20) + base);
  return float_of_bits(((code + 8) << 20) + base) - float_of_bits((8u << 20) + base);
}

TM_HOST_DEVICE inline uint8_t first_moment_code(float value, uint32_t noise, uint32_t exponent) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t code = moment_code(bits & 0x7fffffffu, noise, exponent, kFirstMomentTop);
  return static_cast<uint8_t>(code | bits >> 31 << 7);
}
TM_HOST_DEVICE inline float first_moment_value(uint8_t code, uint32_t exponent) {
  const float magnitude = moment_value(code & 0x7fu, exponent, kFirstMomentTop);
  return float_of_bits(bits_of_float(magnitude) | uint32_t{code} >> 7 << 31);
}
TM_HOST_DEVICE inline uint8_t second_moment_code(float value, uint32_t noise, uint32_t exponent) {
  const uint32_t bits = bits_of_float(value) & 0x7fffffffu;
  const uint32_t code = moment_code(bits, noise, exponent, kSecondMomentTop);
  return static_cast<uint8_t>(code == 0 && bits != 0 ? 1 : code);
}
TM_HOST_DEVICE inline float second_moment_value(uint8_t code, uint32_t exponent) {
  return moment_value(code, exponent, kSecondMomentTop);
}

}  // namespace tunemesh
