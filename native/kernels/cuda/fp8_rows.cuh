// For kernels that quantise what they have just computed: a row's scale from its largest magnitude,
// a chunk of its numbers to e4m3, and a row that waits for its scale. The rule is TmQuantiseRows'
// (kernels/elements.h).
#pragma once
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

// Threads of a block that makes a row and quantises it; of a row above 1,024 chunks
// kWideRowThreads.
constexpr int kNarrowRowThreads = 256, kWideRowThreads = 512;
template <int kThreads>
constexpr int kRowBlocks = 1536 / kThreads;  // a multiprocessor has at least
// Of shared memory, in which a row waits: less than any card lets a block have.
constexpr size_t kMostWaitingBytes = size_t{96} << 10;

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

// A row that a block makes, in any order: it waits in shared memory until its largest magnitude is
// known; where it does not fit there, what was written is read again.
template <typename Element, int kThreads>
class MadeRow {
 public:
  using C = Chunk<Element>;
  __device__ MadeRow(Element* row, bool fits) : row_(row), waiting_(row) {
    extern __shared__ uint4 waiting_row[];
    if (fits) waiting_ = reinterpret_cast<Element*>(waiting_row);
  }
  __device__ void write(const C& chunk, size_t column, size_t left) {
    chunk.store(row_ + column, left);
    add(chunk, column, left);
  }
  // What is in the row already.
  __device__ void add(const C& chunk, size_t column, size_t left) {
    if (waiting_ != row_) chunk.store(waiting_ + column, left);
    largest_ = largest_of(chunk, largest_);
  }
  // Once, by all threads: the row's first c numbers.
  __device__ void quantise(const TmQuantised& to, size_t index, size_t c) const {
    const RowScale scale(block_reduce<kThreads>(largest_, Max()));
    if (threadIdx.x == 0) to.scales[index] = scale.scale;
    uint8_t* const q = to.q + index * c;
    for (size_t i = threadIdx.x * C::kWidth; i < c; i += size_t{kThreads} * C::kWidth) {
      store_e4m3(C::load(waiting_ + i, c - i), scale.inverse, q + i, c - i);
    }
  }

 private:
  Element* const row_;
  Element* waiting_;
  float largest_ = 0;
};

// kernel(args, fits, others...) for each of n rows of c numbers, a block each.
template <typename Element, int kThreads, typename Args, typename... Others>
void launch_made_rows(void (*kernel)(Args, bool, Others...), const Args& args, size_t c,
                      cudaStream_t stream, Others... others) {
  const size_t bytes = (c * sizeof(Element) + 15) / 16 * 16;
  const bool fits = bytes <= kMostWaitingBytes;
  if (fits && bytes > (size_t{40} << 10)) {  // more than every kernel may have unasked
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(kMostWaitingBytes)));
  }
  kernel<<<static_cast<unsigned>(args.n), kThreads, fits ? bytes : 0, stream>>>(args, fits,
                                                                                others...);
}

#endif

}  // namespace tunemesh::cuda
