// The two element types of activations and working weights, float and bfloat16, and reading and
// writing them 16 bytes at a time. All arithmetic is float; bfloat16 is storage alone, rounded to
// nearest even once an operation.
#pragma once
#include <cuda_bf16.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

using Bfloat16 = __nv_bfloat16;

template <typename Element>
__host__ __device__ inline const Element* elements(const TmElement* data) {
  return reinterpret_cast<const Element*>(data);
}
template <typename Element>
__host__ __device__ inline Element* elements(TmElement* data) {
  return reinterpret_cast<Element*>(data);
}

#ifdef __CUDACC__

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bfloat16 value) { return __bfloat162float(value); }
template <typename Element>
__device__ inline Element from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline Bfloat16 from_float<Bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ inline bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// exp and 1 / (1 + exp(-x)): of float's own accuracy, and for bfloat16 the processor's, whose error
// (some 1e-6) is far below bfloat16's 2e-3.
template <typename Element>
__device__ inline float exp_of(float x) {
  return sizeof(Element) == 2 ? __expf(x) : expf(x);
}
template <typename Element>
__device__ inline float sigmoid_of(float x) {
  return sizeof(Element) == 2 ? __fdividef(1.0f, 1.0f + __expf(-x)) : 1.0f / (1.0f + expf(-x));
}

// 16 bytes of neighbouring elements in registers. Where the address is aligned and all are there,
// one access; else element by element, so that any stride and any width work.
template <typename Element>
struct alignas(16) Chunk {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(Element));
  Element at[kWidth];

  // `left` elements are there; what is beyond them reads as `beyond`.
  __device__ static Chunk load(const Element* from, size_t left, float beyond = 0) {
    Chunk chunk;
    if (left >= size_t{kWidth} && is_aligned(from)) {
      *reinterpret_cast<uint4*>(&chunk) = *reinterpret_cast<const uint4*>(from);
      return chunk;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      chunk.at[i] = static_cast<size_t>(i) < left ? from[i] : from_float<Element>(beyond);
    }
    return chunk;
  }
  __device__ static Chunk rounded(const float (&values)[kWidth]) {
    Chunk chunk;
    if constexpr (sizeof(Element) == 2) {
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
        chunk.at[i] = pair.x;
        chunk.at[i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) chunk.at[i] = values[i];
    }
    return chunk;
  }
  __device__ void store(Element* to, size_t left) const {
    if (left >= size_t{kWidth} && is_aligned(to)) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(this);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (static_cast<size_t>(i) < left) to[i] = at[i];
    }
  }
  __device__ float operator[](int i) const { return to_float(at[i]); }
};

// `kCount` floats beside a chunk: a gain, a bias, angles.
template <int kCount>
struct FloatsBeside {
  float at[kCount];
  __device__ FloatsBeside(const float* from, size_t left) {
    if (left >= size_t{kCount} && is_aligned(from)) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        at[i] = four.x;
        at[i + 1] = four.y;
        at[i + 2] = four.z;
        at[i + 3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) at[i] = static_cast<size_t>(i) < left ? from[i] : 0.0f;
  }
  __device__ float operator[](int i) const { return at[i]; }
};

#endif

}  // namespace tunemesh::cuda
