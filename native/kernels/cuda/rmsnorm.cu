#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/rmsnorm.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kBlock = 256;
constexpr size_t kWidestWarpRow = 1024;

// kThreads threads have one row: a warp or the whole block.
template <int kThreads>
struct Row {
  size_t index;
  int lane;
  __device__ Row()
      : index(size_t{blockIdx.x} * (kBlock / kThreads) + threadIdx.x / kThreads),
        lane(static_cast<int>(threadIdx.x % kThreads)) {}
  __device__ float sum(float value) const {
    if constexpr (kThreads == kWarpSize) return warp_reduce<kWarpSize>(value, Sum());
    return block_reduce<kBlock>(value, Sum());
  }
};

template <int kThreads>
__global__ void forward_kernel(TmRmsNorm a) {
  const Row<kThreads> row;
  if (row.index >= a.n) return;  // whole warps, or no thread where the block has one row
  const float* x = a.x + row.index * a.x_stride;
  float* y = a.y + row.index * a.y_stride;
  float squares = 0;
  for (size_t j = row.lane; j < a.c; j += kThreads) squares = fmaf(x[j], x[j], squares);
  const double mean = static_cast<double>(row.sum(squares)) / static_cast<double>(a.c);
  const float rstd = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(a.epsilon)));
  if (a.rstd != nullptr && row.lane == 0) a.rstd[row.index] = rstd;
  for (size_t j = row.lane; j < a.c; j += kThreads) y[j] = x[j] * rstd * a.gain[j];
}

template <int kThreads>
__global__ void backward_kernel(TmRmsNormBackward a) {
  const Row<kThreads> row;
  if (row.index >= a.n) return;
  const float* x = a.x + row.index * a.x_stride;
  const float* dy = a.dy + row.index * a.dy_stride;
  float* dx = a.dx + row.index * a.dx_stride;
  float dot = 0;
  for (size_t j = row.lane; j < a.c; j += kThreads) dot = fmaf(dy[j] * a.gain[j], x[j], dot);
  const float rstd = a.rstd[row.index];
  const double wide = static_cast<double>(rstd);
  const double mean = static_cast<double>(row.sum(dot)) / static_cast<double>(a.c);
  const float k = static_cast<float>(wide * wide * mean);
  for (size_t j = row.lane; j < a.c; j += kThreads) {
    const float inner = fmaf(-x[j], k, dy[j] * a.gain[j]);
    dx[j] = a.dx_add ? fmaf(inner, rstd, dx[j]) : inner * rstd;
  }
}

__global__ void gain_grad_kernel(TmRmsNormBackward a) {
  const auto term = [&](size_t row, size_t column, float sum) {
    const float normed = a.x[row * a.x_stride + column] * a.rstd[row];
    return fmaf(a.dy[row * a.dy_stride + column], normed, sum);
  };
  add_column_sums(a.n, a.c, term, a.dgain);
}

// Rows of `threads` threads each in blocks of kBlock.
unsigned grid_of(size_t n, int threads) {
  const size_t rows = static_cast<size_t>(kBlock / threads);
  return static_cast<unsigned>((n + rows - 1) / rows);
}

}  // namespace

void rms_norm_forward(const TmRmsNorm& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (args.c <= kWidestWarpRow) {
    forward_kernel<kWarpSize><<<grid_of(args.n, kWarpSize), kBlock, 0, stream>>>(args);
  } else {
    forward_kernel<kBlock><<<grid_of(args.n, kBlock), kBlock, 0, stream>>>(args);
  }
  CUDA_CHECK_LAUNCH("rms_norm_forward", stream);
}

void rms_norm_backward(const TmRmsNormBackward& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (args.dgain != nullptr) {
    gain_grad_kernel<<<column_sum_grid(args.c), column_sum_block(), 0, stream>>>(args);
    CUDA_CHECK_LAUNCH("rms_norm_gain_grad", stream);
  }
  if (args.c <= kWidestWarpRow) {
    backward_kernel<kWarpSize><<<grid_of(args.n, kWarpSize), kBlock, 0, stream>>>(args);
  } else {
    backward_kernel<kBlock><<<grid_of(args.n, kBlock), kBlock, 0, stream>>>(args);
  }
  CUDA_CHECK_LAUNCH("rms_norm_backward", stream);
}

}  // namespace tunemesh::cuda
