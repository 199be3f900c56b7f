#include "kernels/cuda/bias.cuh"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/grid.cuh"

namespace tunemesh::cuda {
namespace {

__global__ void bias_add_kernel(Bias a) {
  float* y = a.y + size_t{blockIdx.x} * a.stride;
  for_each_column(a.c, [&](size_t j) { y[j] += a.bias[j]; });
}

__global__ void bias_grad_kernel(Bias a) {
  const auto term = [&](size_t row, size_t column, float sum) {
    return sum + a.dy[row * a.stride + column];
  };
  add_column_sums(a.n, a.c, term, a.dbias);
}

__global__ void add_kernel(AddElements a) {
  for_each_element(a.n, [&](size_t i) { a.y[i] += a.x[i]; });
}

}  // namespace

void bias_add(const Bias& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  bias_add_kernel<<<element_grid(args.n, args.c), kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("bias_add", stream);
}

void bias_grad_add(const Bias& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  bias_grad_kernel<<<column_sum_grid(args.c), column_sum_block(), 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("bias_grad_add", stream);
}

void add(const AddElements& args, cudaStream_t stream) {
  if (args.n == 0) return;
  add_kernel<<<vector_grid(args.n), kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("add", stream);
}

}  // namespace tunemesh::cuda
