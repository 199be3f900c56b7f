// Stochastic rounding of float32 to bfloat16, to the bit the same on every backend
// (docs/decisions, "Stochastic rounding").
//
//   noise   eight neighbouring elements, numbered 8 g .. 8 g + 7 of the canonical vector, share
//           block g of a Philox stream (philox.h): key the job's seed, counter (g, stream, step).
//           Of its eight half words (the low one of word 0, the high one of word 0, ..) the weight
//           of element 8 g + k takes number k, its first moment k + 2, its second k + 4, modulo 8:
//           one element's three are independent, and each is uniform
//   rounds  the float's bits plus the noise, of which the upper 16 stay: up in magnitude with the
//           likelihood of the part that is cut off, so right in the mean; what bfloat16 holds stays
//           as it is. Subnormal numbers are kept. Above the largest finite number: infinity.
//           Infinity stays, NaN becomes a quiet NaN of its sign
#pragma once
#include <stdint.h>

#include "kernels/philox.h"

namespace tunemesh {

constexpr uint64_t kRoundingGroup = 8;  // elements of one Philox block

// What is rounded of an element: how many words further on its noise lies.
enum class Rounded : uint32_t { kWeight = 0, kFirstMoment = 1, kSecondMoment = 2 };

TM_HOST_DEVICE inline PhiloxBlock rounding_block(uint64_t seed, uint64_t group, uint32_t step) {
  return philox_block(seed, PhiloxStream::kRounding, group, step);
}

TM_HOST_DEVICE inline uint32_t rounding_noise(const PhiloxBlock& block, Rounded what,
                                              unsigned element) {
  const uint32_t word = block.at[(element / 2 + static_cast<unsigned>(what)) % 4];
  return word >> (element % 2 * 16) & 0xffffu;
}

// `bits` of a float32, `noise` of 16 bits.
TM_HOST_DEVICE inline uint16_t stochastic_bfloat16(uint32_t bits, uint32_t noise) {
  if ((bits & 0x7f800000u) != 0x7f800000u) return static_cast<uint16_t>((bits + noise) >> 16);
  const bool is_nan = (bits & 0x007fffffu) != 0;
  return static_cast<uint16_t>(bits >> 16 | (is_nan ? 0x40u : 0u));
}

}  // namespace tunemesh
