#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/gradient_norm.cuh"

namespace tunemesh::cuda {
namespace {

constexpr size_t kBlockElements = 256;
constexpr int kThreads = 256;
constexpr int kLanes = 8;
constexpr size_t kGroup = TM_NORM_GROUP_BLOCKS;

// All threads of an octet get the block's sum.
template <typename Value>
__device__ double block_squares(const Value* values, int lane) {
  double sum = 0;
#pragma unroll 16
  for (size_t first = 0; first < kBlockElements; first += kLanes) {
    const double value = static_cast<double>(to_float(values[first + lane]));
    sum = __dadd_rn(sum, __dmul_rn(value, value));
  }
  for (int offset = 1; offset < kLanes; offset *= 2) {  // (0+1), then pairs, then halves
    sum = __dadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, offset, kLanes));
  }
  return sum;
}

__global__ void sum_squares_kernel(TmSumSquares a) {
  __shared__ double squares[kGroup];
  const size_t first = size_t{blockIdx.x} * kGroup;
  const size_t left = a.num_blocks - first;
  const size_t count = left < kGroup ? left : kGroup;
  const int lane = threadIdx.x % kLanes;
  // Octets beyond the group's end read its last block: all lanes of a warp must meet in the sum.
  for (size_t i = threadIdx.x / kLanes; i < kGroup; i += kThreads / kLanes) {
    const size_t block = first + (i < count ? i : count - 1);
    const size_t at = block * kBlockElements;
    const double sum =
        a.half_values == nullptr
            ? block_squares(a.values + at, lane)
            : block_squares(reinterpret_cast<const Bfloat16*>(a.half_values) + at, lane);
    if (lane == 0) squares[i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum = __dadd_rn(sum, squares[i]);
  a.group_sums[blockIdx.x] = sum;
}

}  // namespace

void sum_squares(const TmSumSquares& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return;
  const unsigned grid = static_cast<unsigned>((args.num_blocks + kGroup - 1) / kGroup);
  sum_squares_kernel<<<grid, kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("sum_squares", stream);
}

}  // namespace tunemesh::cuda
