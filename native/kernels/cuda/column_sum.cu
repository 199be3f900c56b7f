#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

__global__ void __launch_bounds__(32 * kColumnSumWarps) whole_kernel(PartialSums a) {
  __shared__ float eighths[kColumnSumWarps][32];
  const size_t column = size_t{blockIdx.x} * 32 + threadIdx.x;
  const size_t each = (a.parts + kColumnSumWarps - 1) / kColumnSumWarps;
  const size_t begin = threadIdx.y * each, end = min(begin + each, a.parts);
  float sum = 0;
  if (column < a.c) {
#pragma unroll 8
    for (size_t part = begin; part < end; ++part) sum += a.partials[part * a.c + column];
  }
  eighths[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= a.c) return;
  float total = a.sums[column];
#pragma unroll
  for (int warp = 0; warp < kColumnSumWarps; ++warp) total += eighths[warp][threadIdx.x];
  a.sums[column] = total;
}

}  // namespace

void add_partial_sums(const PartialSums& args, cudaStream_t stream) {
  const unsigned grid = static_cast<unsigned>((args.c + 31) / 32);
  whole_kernel<<<grid, dim3(32, kColumnSumWarps), 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("add_partial_sums", stream);
}

}  // namespace tunemesh::cuda
