// What the codec's tests feed it, and the contract's rounding as a plain oracle.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/codec.h"
#include "engine/exchange_buffers.h"
#include "engine/frame.h"

namespace tunemesh {

using Fixed = std::vector<int64_t>;
using Floats = std::vector<float>;

// Gradients like the golden runs': each block of its own scale, heavy tails, some zeros and zero
// blocks.
inline Floats gradient_like(size_t num_blocks, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Floats values(num_blocks * kBlockElements);
  for (size_t b = 0; b < num_blocks; ++b) {
    const double scale = random() % 17 == 0 ? 0 : std::exp2(-6 - double(random() % 20));
    for (size_t j = 0; j < kBlockElements; ++j) {
      const double tail = std::exp(0.7 * normal(random));
      const bool zero = random() % 50 == 0;
      values[b * kBlockElements + j] = zero ? 0.0f : float(scale * tail * normal(random));
    }
  }
  return values;
}

// Any 64-bit pattern that a sum may have: width and shift differ by block.
inline Fixed random_fixed(size_t num_blocks, uint64_t seed) {
  std::mt19937_64 random(seed);
  Fixed values(num_blocks * kBlockElements);
  for (size_t b = 0; b < num_blocks; ++b) {
    const int width = int(random() % 65),
              shift = width == 64 ? 0 : int(random() % (64 - width + 1));
    for (size_t j = 0; j < kBlockElements; ++j) {
      const int64_t v = width == 0 ? 0 : int64_t(random()) >> (64 - width);
      values[b * kBlockElements + j] = int64_t(uint64_t(v) << shift);
    }
  }
  return values;
}

// The contract's words, one element at a time.
inline int64_t round_reference(float x, float largest, int bits) {
  const int exponent = std::ilogb(largest);
  const int unit = std::max(exponent + 1 - bits, -kFractionBits);
  return int64_t(std::nearbyint(std::ldexp(double(x), -unit))) << (unit + kFractionBits);
}

// Buffers on ordinary memory, as the engine's arena would give it.
struct Memory {
  explicit Memory(const ExchangePlan& plan)
      : contributions(plan.contribution_bytes),
        sum(plan.sum_bytes),
        published(plan.published_bytes),
        frames(plan.frame_bytes),
        scratch(plan.scratch_bytes) {}
  ExchangeMemory pointers() {
    return {contributions.data(), sum.data(), published.data(), frames.data(), scratch.data()};
  }
  std::vector<uint8_t> contributions, sum, published, frames, scratch;
};

inline constexpr ExchangeOptions kOptions{.num_blocks = 29,
                                          .slice_blocks = 10,
                                          .chunk_blocks = 4,
                                          .num_contribution_slots = 7,
                                          .significant_bits = 24,
                                          .num_frames = 3};

inline std::vector<uint8_t> frame_of(ExchangeBuffers& buffers, int slot, FrameHeader header) {
  const size_t bytes = buffers.pack_contribution(slot, header, 1);
  const auto at = buffers.frames().subspan(kMaxFrameBytes, bytes);
  return {at.begin(), at.end()};
}

}  // namespace tunemesh
