// Philox4x32-10: counter-based random numbers, so that a value depends on its
// key and index only. source  Salmon et al. 2011, "Parallel random numbers: as
// easy as 1, 2, 3"
#pragma once
#include <array>
#include <cstdint>

namespace tunemesh {

using PhiloxBlock = std::array<uint32_t, 4>;

inline PhiloxBlock philox4x32(PhiloxBlock counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key[0],
               static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key[1],
               static_cast<uint32_t>(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

// Purposes keep the streams of one seed apart.
enum class PhiloxStream : uint32_t { kAdapterInit = 1, kSampling = 2, kTest = 3 };

// The 32 bits numbered `index` of a stream.
inline uint32_t philox_bits(uint64_t seed, PhiloxStream stream, uint64_t index) {
  const uint64_t block = index / 4;
  const PhiloxBlock bits =
      philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                  static_cast<uint32_t>(stream), 0},
                 {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return bits[index % 4];
}

// Uniform in [0, 1) with 24 bits, exact in float.
inline float philox_uniform(uint64_t seed, PhiloxStream stream, uint64_t index) {
  return static_cast<float>(philox_bits(seed, stream, index) >> 8) * 0x1p-24f;
}

}  // namespace tunemesh
