// Philox4x32-10: counter-based random numbers, so that a value depends on its
// key and index only. Compiled for the host and, by nvcc, for the device.
// source  Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define TM_HOST_DEVICE __host__ __device__
#else
#define TM_HOST_DEVICE
#endif

namespace tunemesh {

struct PhiloxBlock {
  uint32_t at[4];
};

TM_HOST_DEVICE inline PhiloxBlock philox4x32(PhiloxBlock counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter.at[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter.at[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.at[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.at[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Purposes keep the streams of one seed apart.
enum class PhiloxStream : uint32_t {
  kAdapterInit = 1,
  kSampling = 2,
  kTest = 3,
  kRounding = 7,  // 4, 5, 6 were of weights and moments apart
};

// Block `block` of a stream; `step` keeps the steps of a job apart and is 0 where there is none.
TM_HOST_DEVICE inline PhiloxBlock philox_block(uint64_t seed, PhiloxStream stream, uint64_t block,
                                               uint32_t step) {
  return philox4x32({{static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                      static_cast<uint32_t>(stream), step}},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The 32 bits numbered `index` of a stream.
inline uint32_t philox_bits(uint64_t seed, PhiloxStream stream, uint64_t index) {
  return philox_block(seed, stream, index / 4, 0).at[index % 4];
}

// Uniform in [0, 1) with 24 bits, exact in float.
inline float philox_uniform(uint64_t seed, PhiloxStream stream, uint64_t index) {
  return static_cast<float>(philox_bits(seed, stream, index) >> 8) * 0x1p-24f;
}

}  // namespace tunemesh
