#include <math_constants.h>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cross_entropy.cuh"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kSpan = 32;  // terms of a thread that are added in float

__device__ float row_max(const float* x, size_t v) {
  float largest = -CUDART_INF_F;
  for (size_t j = threadIdx.x; j < v; j += kThreads) largest = fmaxf(largest, x[j]);
  return block_reduce<kThreads>(largest, Max());
}

// Sum of exp(x - max); where `keep`, the terms replace x.
__device__ double sum_exp(float* x, size_t v, float largest, bool keep) {
  double total = 0;
  for (size_t base = threadIdx.x; base < v; base += size_t{kThreads} * kSpan) {
    float sum = 0;
    for (int k = 0; k < kSpan; ++k) {
      const size_t j = base + size_t(k) * kThreads;
      if (j >= v) break;
      const float term = expf(x[j] - largest);
      if (keep) x[j] = term;
      sum += term;
    }
    total += static_cast<double>(sum);
  }
  return block_reduce<kThreads>(total, Sum());
}

__global__ void cross_entropy_kernel(TmCrossEntropy a, DeviceFault* fault) {
  const size_t row = blockIdx.x;
  float* x = a.logits + row * a.stride;
  const int32_t target = a.targets[row];
  if (target < 0 || static_cast<size_t>(target) >= a.v) {
    if (threadIdx.x != 0) return;
    a.row_losses[row] = CUDART_NAN;
    raise_fault(fault, {FaultKind::kIndex, FaultOperation::kCrossEntropy,
                        static_cast<long long>(row), target, static_cast<long long>(a.v)});
    return;
  }
  const double at_target = static_cast<double>(x[target]);
  const float largest = row_max(x, a.v);  // its barriers stand between this read and the writes
  const double sum = sum_exp(x, a.v, largest, a.dlogits != 0);
  if (threadIdx.x == 0) {
    a.row_losses[row] = log(sum) + (static_cast<double>(largest) - at_target);
  }
  if (!a.dlogits) return;
  const double scale = static_cast<double>(a.grad_scale);
  const float factor = static_cast<float>(scale / sum);
  for (size_t j = threadIdx.x; j < a.v; j += kThreads) {
    const float term = x[j];
    x[j] = j == static_cast<size_t>(target)
               ? static_cast<float>((static_cast<double>(term) / sum - 1.0) * scale)
               : term * factor;
  }
}

}  // namespace

void cross_entropy(const TmCrossEntropy& args, DeviceFault* fault, cudaStream_t stream) {
  if (args.rows == 0 || args.v == 0) return;
  const unsigned grid = static_cast<unsigned>(args.rows);
  cross_entropy_kernel<<<grid, kThreads, 0, stream>>>(args, fault);
  CUDA_CHECK_LAUNCH("cross_entropy", stream);
}

}  // namespace tunemesh::cuda
