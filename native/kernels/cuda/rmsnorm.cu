#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/rmsnorm.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kBlocksOfCard =
    4;                    // at least so many on a multiprocessor, or too few loads are under way
constexpr int kKept = 2;  // chunks of a thread that stay in registers between the two passes
constexpr size_t kWidestWarpRow = 512;

// kThreads threads have one row: a warp or the whole block.
template <typename Element, int kThreads>
struct Row {
  using C = Chunk<Element>;
  size_t index;
  int lane;
  __device__ Row()
      : index(size_t{blockIdx.x} * (kBlock / kThreads) + threadIdx.x / kThreads),
        lane(static_cast<int>(threadIdx.x % kThreads)) {}
  __device__ float sum(float value) const {
    if constexpr (kThreads == kWarpSize) return warp_reduce<kWarpSize>(value, Sum());
    return block_reduce<kBlock>(value, Sum());
  }
  // First column of the thread's chunk k.
  __device__ size_t column(size_t k) const { return (k * kThreads + lane) * C::kWidth; }
};

// Where row `index` starts: rows may be heads inside wider rows.
template <typename Args>
__device__ inline size_t start_of(const Args& a, size_t index, size_t stride) {
  if (a.heads == 0) return index * stride;
  return index / a.heads * stride + index % a.heads * a.c;
}

// A row that is read once: its first chunks are kept, the others read again by the second pass.
template <typename Element, int kThreads>
struct KeptRow {
  using C = Chunk<Element>;
  const Element* data;
  size_t c;
  C kept[kKept];

  __device__ KeptRow(const Element* row_data, size_t width, const Row<Element, kThreads>& row)
      : data(row_data), c(width) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if (row.column(k) < c) kept[k] = C::load(data + row.column(k), c - row.column(k));
    }
  }
  __device__ C again(size_t column) const { return C::load(data + column, c - column); }
};

// visit(k, column) for the thread's chunks: k below kKept, or kKept for those not kept.
template <typename Element, int kThreads, typename Visit>
__device__ inline void for_each_chunk(const Row<Element, kThreads>& row, size_t c, Visit visit) {
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (row.column(k) < c) visit(k, row.column(k));
  }
#pragma unroll 1
  for (size_t k = kKept; row.column(k) < c; ++k) visit(kKept, row.column(k));
}

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksOfCard) forward_kernel(TmRmsNorm a) {
  using C = Chunk<Element>;
  const Row<Element, kThreads> row;
  if (row.index >= a.n) return;  // whole warps, or no thread where the block has one row
  const KeptRow<Element, kThreads> x(elements<Element>(a.x) + start_of(a, row.index, a.x_stride),
                                     a.c, row);
  float squares = 0;
  for_each_chunk(row, a.c, [&](int k, size_t column) {
    const C chunk = k < kKept ? x.kept[k] : x.again(column);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) squares = fmaf(chunk[i], chunk[i], squares);
  });
  const double mean = static_cast<double>(row.sum(squares)) / static_cast<double>(a.c);
  const float rstd = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(a.epsilon)));
  if (a.rstd != nullptr && row.lane == 0) a.rstd[row.index] = rstd;
  Element* y = elements<Element>(a.y) + start_of(a, row.index, a.y_stride);
  for_each_chunk(row, a.c, [&](int k, size_t column) {
    const C chunk = k < kKept ? x.kept[k] : x.again(column);
    const FloatsBeside<C::kWidth> gain(a.gain + column, a.c - column);
    float out[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) out[i] = chunk[i] * rstd * gain[i];
    C::rounded(out).store(y + column, a.c - column);
  });
}

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kBlock, kBlocksOfCard) backward_kernel(TmRmsNormBackward a) {
  using C = Chunk<Element>;
  const Row<Element, kThreads> row;
  if (row.index >= a.n) return;
  const KeptRow<Element, kThreads> x(elements<Element>(a.x) + start_of(a, row.index, a.x_stride),
                                     a.c, row);
  const KeptRow<Element, kThreads> dy(elements<Element>(a.dy) + start_of(a, row.index, a.dy_stride),
                                      a.c, row);
  const float rstd = a.rstd[row.index];
  float dot = 0;
  for_each_chunk(row, a.c, [&](int k, size_t column) {
    const C xs = k < kKept ? x.kept[k] : x.again(column);
    const C dys = k < kKept ? dy.kept[k] : dy.again(column);
    const FloatsBeside<C::kWidth> gain(a.gain + column, a.c - column);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) dot = fmaf(dys[i] * gain[i], xs[i], dot);
  });
  const double wide = static_cast<double>(rstd);
  const double mean = static_cast<double>(row.sum(dot)) / static_cast<double>(a.c);
  const float factor = static_cast<float>(wide * wide * mean);
  Element* dx = elements<Element>(a.dx) + start_of(a, row.index, a.dx_stride);
  for_each_chunk(row, a.c, [&](int k, size_t column) {
    const C xs = k < kKept ? x.kept[k] : x.again(column);
    const C dys = k < kKept ? dy.kept[k] : dy.again(column);
    const FloatsBeside<C::kWidth> gain(a.gain + column, a.c - column);
    C old{};
    if (a.dx_add) old = C::load(dx + column, a.c - column);
    float out[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) {
      const float inner = fmaf(-xs[i], factor, dys[i] * gain[i]);
      out[i] = a.dx_add ? fmaf(inner, rstd, old[i]) : inner * rstd;
    }
    C::rounded(out).store(dx + column, a.c - column);
  });
}

template <typename Element>
__global__ void gain_grad_kernel(TmRmsNormBackward a) {
  const Element* x = elements<Element>(a.x);
  const Element* dy = elements<Element>(a.dy);
  const auto term = [&](size_t row, size_t column, float sum) {
    const float normed = to_float(x[start_of(a, row, a.x_stride) + column]) * a.rstd[row];
    return fmaf(to_float(dy[start_of(a, row, a.dy_stride) + column]), normed, sum);
  };
  add_column_sums(a.n, a.c, term, a.dgain);
}

// Rows of `threads` threads each in blocks of kBlock.
unsigned grid_of(size_t n, int threads) {
  const size_t rows = static_cast<size_t>(kBlock / threads);
  return static_cast<unsigned>((n + rows - 1) / rows);
}

}  // namespace

template <typename Element>
void rms_norm_forward(const TmRmsNorm& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (args.c <= kWidestWarpRow) {
    forward_kernel<Element, kWarpSize><<<grid_of(args.n, kWarpSize), kBlock, 0, stream>>>(args);
  } else {
    forward_kernel<Element, kBlock><<<grid_of(args.n, kBlock), kBlock, 0, stream>>>(args);
  }
  CUDA_CHECK_LAUNCH("rms_norm_forward", stream);
}

template <typename Element>
void rms_norm_backward(const TmRmsNormBackward& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (args.dgain != nullptr) {
    gain_grad_kernel<Element><<<column_sum_grid(args.c), column_sum_block(), 0, stream>>>(args);
    CUDA_CHECK_LAUNCH("rms_norm_gain_grad", stream);
  }
  if (args.c <= kWidestWarpRow) {
    backward_kernel<Element, kWarpSize><<<grid_of(args.n, kWarpSize), kBlock, 0, stream>>>(args);
  } else {
    backward_kernel<Element, kBlock><<<grid_of(args.n, kBlock), kBlock, 0, stream>>>(args);
  }
  CUDA_CHECK_LAUNCH("rms_norm_backward", stream);
}

template void rms_norm_forward<float>(const TmRmsNorm&, cudaStream_t);
template void rms_norm_forward<Bfloat16>(const TmRmsNorm&, cudaStream_t);
template void rms_norm_backward<float>(const TmRmsNormBackward&, cudaStream_t);
template void rms_norm_backward<Bfloat16>(const TmRmsNormBackward&, cudaStream_t);

}  // namespace tunemesh::cuda
