// For kernels that quantise what they have just computed: a row's scale from its largest magnitude,
// and a chunk of its numbers to e4m3. The rule is TmQuantiseRows' (kernels/backend.h).
#pragma once
#include <cuda_fp8.h>

#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

#ifdef __CUDACC__

struct RowScale {
  float scale, inverse;
  __device__ explicit RowScale(float largest) {
    const float held = fmaxf(largest, 0x1p-100f);
    scale = held / 448.0f;
    inverse = 448.0f / held;
  }
};

// The largest magnitude of a chunk and what came before; a NaN does not count.
template <typename Element>
__device__ inline float largest_of(const Chunk<Element>& chunk, float before) {
#pragma unroll
  for (int i = 0; i < Chunk<Element>::kWidth; ++i) before = fmaxf(before, fabsf(chunk[i]));
  return before;
}

// Two numbers, the first in the low byte; a NaN becomes 0x7f.
__device__ inline uint32_t e4m3_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// A chunk's numbers to neighbouring bytes, of which `left` are there.
template <typename Element>
__device__ inline void store_e4m3(const Chunk<Element>& chunk, float inverse, uint8_t* to,
                                  size_t left) {
  constexpr int kWidth = Chunk<Element>::kWidth;
  uint32_t words[kWidth / 4];
#pragma unroll
  for (int i = 0; i < kWidth; i += 4) {
    words[i / 4] = e4m3_pair(chunk[i] * inverse, chunk[i + 1] * inverse) |
                   e4m3_pair(chunk[i + 2] * inverse, chunk[i + 3] * inverse) << 16;
  }
  if (left >= size_t{kWidth} && reinterpret_cast<uintptr_t>(to) % kWidth == 0) {
    if constexpr (kWidth == 8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    if (static_cast<size_t>(i) < left) to[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  }
}

#endif

}  // namespace tunemesh::cuda
