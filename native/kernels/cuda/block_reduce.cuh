// Sums and maxima over the threads of a warp or a block, in a fixed tree: the same bits in every
// run. Every thread gets the result.
#pragma once

namespace tunemesh::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // a NaN loses, as in fmaxf
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ int operator()(int a, int b) const { return max(a, b); }
};

// Over groups of `width` neighbouring lanes, a power of two.
template <int width, typename T, typename Combine>
__device__ inline T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, offset, width));
  }
  return value;
}

// Over a block of num_threads, a multiple of 32: warps by their tree, then warps ascending. All
// threads must call it; the block may call it again at once.
template <int num_threads, typename T, typename Combine>
__device__ inline T block_reduce(T value, Combine combine) {
  constexpr int kWarps = num_threads / kWarpSize;
  __shared__ T partial[kWarps];
  value = warp_reduce<kWarpSize>(value, combine);
  if constexpr (kWarps == 1) return value;
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T total = partial[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) total = combine(total, partial[warp]);
  return total;
}

}  // namespace tunemesh::cuda
