// Stochastic rounding of float32 to bfloat16, to the bit the same on every backend
// (docs/decisions, "Stochastic rounding").
//
//   noise   eight neighbouring elements, numbered 8 g .. 8 g + 7 of the canonical vector, share
//           block g of a Philox stream (philox.h): key the job's seed, counter (g, stream, step).
//           Element 8 g + k takes the low (k even) or high (k odd) 16 bits of word k / 2
//   rounds  the float's bits plus the noise, of which the upper 16 stay: up in magnitude with the
//           likelihood of the part that is cut off, so right in the mean; what bfloat16 holds stays
//           as it is. Subnormal numbers are kept. Above the largest finite number: infinity.
//           Infinity stays, NaN becomes a quiet NaN of its sign
#pragma once
#include <stdint.h>

#include "kernels/philox.h"

namespace tunemesh {

constexpr uint64_t kRoundingGroup = 8;  // elements of one Philox block

TM_HOST_DEVICE inline uint32_t rounding_noise(const PhiloxBlock& block, unsigned element) {
  return block.at[element / 2] >> (element % 2 * 16) & 0xffffu;
}

// `bits` of a float32, `noise` of 16 bits.
TM_HOST_DEVICE inline uint16_t stochastic_bfloat16(uint32_t bits, uint32_t noise) {
  if ((bits & 0x7f800000u) != 0x7f800000u) return static_cast<uint16_t>((bits + noise) >> 16);
  const bool is_nan = (bits & 0x007fffffu) != 0;
  return static_cast<uint16_t>(bits >> 16 | (is_nan ? 0x40u : 0u));
}

}  // namespace tunemesh
