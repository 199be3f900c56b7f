#include "kernels/cuda/bias.cuh"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/grid.cuh"

namespace tunemesh::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) bias_add_kernel(Bias a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.c) return;
  const size_t left = a.c - column;
  Element* y = elements<Element>(a.y) + place.row * a.stride + column;
  const C old = C::load(y, left);
  const FloatsBeside<C::kWidth> bias(a.bias + column, left);
  float sum[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) sum[i] = old[i] + bias[i];
  C::rounded(sum).store(y, left);
}

template <typename Element>
__global__ void __launch_bounds__(32 * kColumnSumWarps)
    bias_grad_kernel(Bias a, size_t rows, float* partials) {
  using C = Chunk<Element>;
  const Element* dy = elements<Element>(a.dy);
  const auto add = [&](size_t row, size_t column, size_t left, float(&sums)[C::kWidth]) {
    const C chunk = C::load(dy + row * a.stride + column, left);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) sums[i] += chunk[i];
  };
  sum_part<Element>(a.n, a.c, rows, add, partials);
}

// The vector is one row; its chunks lie on grid.x.
template <typename Element>
__global__ void __launch_bounds__(kElementThreads) add_kernel(AddElements a) {
  using C = Chunk<Element>;
  const size_t at = (size_t{blockIdx.x} * kElementThreads + threadIdx.x) * C::kWidth;
  if (at >= a.n) return;
  const C x = C::load(elements<Element>(a.x) + at, a.n - at);
  const C y = C::load(elements<Element>(a.y) + at, a.n - at);
  float sum[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) sum[i] = y[i] + x[i];
  C::rounded(sum).store(elements<Element>(a.y) + at, a.n - at);
}

}  // namespace

template <typename Element>
void bias_add(const Bias& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.c));
  bias_add_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("bias_add", stream);
}

template <typename Element>
void bias_grad_add(const Bias& args, const Scratch& scratch, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  const ColumnParts parts = column_parts(args.n, args.c, scratch);
  bias_grad_kernel<Element>
      <<<partial_sums_grid<Element>(args.c, parts), partial_sums_block(), 0, stream>>>(
          args, parts.rows, scratch.data);
  CUDA_CHECK_LAUNCH("bias_grad_add", stream);
  add_partial_sums({scratch.data, parts.parts, args.c, args.dbias}, stream);
}

template <typename Element>
void add(const AddElements& args, cudaStream_t stream) {
  if (args.n == 0) return;
  const size_t chunks = chunks_of<Element>(args.n);
  const unsigned grid = static_cast<unsigned>((chunks + kElementThreads - 1) / kElementThreads);
  add_kernel<Element><<<grid, kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("add", stream);
}

template void bias_add<float>(const Bias&, cudaStream_t);
template void bias_add<Bfloat16>(const Bias&, cudaStream_t);
template void bias_grad_add<float>(const Bias&, const Scratch&, cudaStream_t);
template void bias_grad_add<Bfloat16>(const Bias&, const Scratch&, cudaStream_t);
template void add<float>(const AddElements&, cudaStream_t);
template void add<Bfloat16>(const AddElements&, cudaStream_t);

}  // namespace tunemesh::cuda
