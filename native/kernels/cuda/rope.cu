#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/rope.cuh"

namespace tunemesh::cuda {
namespace {

__global__ void rope_kernel(TmRope a) {
  const size_t half = a.head_size / 2;
  float* row = a.x + size_t{blockIdx.x} * a.x_stride;
  const size_t angles = static_cast<size_t>(a.positions[blockIdx.x]) * half;
  for_each_column(a.heads * half, [&](size_t pair) {
    const size_t head = pair / half, j = pair - head * half;
    float* x = row + head * a.head_size + j;
    const float cosine = a.cos[angles + j];
    const float sine = a.inverse ? -a.sin[angles + j] : a.sin[angles + j];
    const float low = x[0], high = x[half];
    x[0] = low * cosine - high * sine;
    x[half] = high * cosine + low * sine;
  });
}

}  // namespace

void rope(const TmRope& args, cudaStream_t stream) {
  if (args.n == 0 || args.heads == 0 || args.head_size == 0) return;
  const dim3 grid = element_grid(args.n, args.heads * args.head_size / 2);
  rope_kernel<<<grid, kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("rope", stream);
}

}  // namespace tunemesh::cuda
