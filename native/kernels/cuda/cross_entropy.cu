#include <math_constants.h>

#include <algorithm>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cross_entropy.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kFewThreads = 256, kManyThreads = 1024;
constexpr size_t kFewChunks = 1024;  // rows up to here take few threads
constexpr int kBatch = 4;            // chunks of a thread that are under way at once
constexpr int kReserved = 2048;      // bytes of shared memory that the block's sums take, at most

// Sum of exp(x - largest) over what a thread has seen.
struct RunningSum {
  float largest;
  double total;

  __device__ RunningSum() {
    largest = -CUDART_INF_F;
    total = 0;
  }
  __device__ void raise(float top) {
    if (!(top > largest)) return;
    total *= exp(static_cast<double>(largest) - static_cast<double>(top));
    largest = top;
  }
  // -infinity until a greater logit is seen: exp(-infinity - 0) is 0.
  __device__ float base() const { return largest == -CUDART_INF_F ? 0.0f : largest; }
};

template <typename Element, int kThreads>
struct LogitRow {
  using C = Chunk<Element>;
  Element* x;
  size_t v;
  uint4* kept;  // shared memory: the row's first chunks
  size_t num_kept;

  __device__ size_t num_chunks() const { return (v + C::kWidth - 1) / C::kWidth; }
  __device__ C load(size_t chunk) const {
    const size_t column = chunk * C::kWidth;
    const size_t left = column < v ? v - column : 0;
    return C::load(x + (left > 0 ? column : 0), left, -CUDART_INF_F);
  }

  __device__ RunningSum sum() const {
    RunningSum running;
    for (size_t first = threadIdx.x; first < num_chunks(); first += size_t{kThreads} * kBatch) {
      C batch[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) batch[k] = load(first + size_t(k) * kThreads);
      float top = -CUDART_INF_F;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const size_t chunk = first + size_t(k) * kThreads;
        if (chunk < num_kept) kept[chunk] = *reinterpret_cast<const uint4*>(&batch[k]);
#pragma unroll
        for (int i = 0; i < C::kWidth; ++i) top = fmaxf(top, batch[k][i]);
      }
      running.raise(top);
      const float base = running.base();
      float part = 0;
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int i = 0; i < C::kWidth; ++i) part += exp_of<Element>(batch[k][i] - base);
      }
      running.total += static_cast<double>(part);
    }
    return running;
  }

  // x = exp(x - largest) factor; the target's element becomes at_target.
  __device__ void write_gradient(float largest, float factor, size_t target, float at_target) {
    for (size_t first = threadIdx.x; first < num_chunks(); first += size_t{kThreads} * kBatch) {
      C batch[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const size_t chunk = first + size_t(k) * kThreads;
        if (chunk < num_kept) {
          *reinterpret_cast<uint4*>(&batch[k]) = kept[chunk];
        } else {
          batch[k] = load(chunk);
        }
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const size_t chunk = first + size_t(k) * kThreads, column = chunk * C::kWidth;
        if (column >= v) break;
        float gradient[C::kWidth];
#pragma unroll
        for (int i = 0; i < C::kWidth; ++i) {
          gradient[i] = exp_of<Element>(batch[k][i] - largest) * factor;
        }
        C::rounded(gradient).store(x + column, v - column);
        if (chunk == target / C::kWidth) x[target] = from_float<Element>(at_target);
      }
    }
  }
};

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads)
    cross_entropy_kernel(TmCrossEntropy a, size_t num_kept, DeviceFault* fault) {
  extern __shared__ uint4 kept[];
  const size_t index = blockIdx.x;
  const int32_t target = a.targets[index];
  if (target < 0 || static_cast<size_t>(target) >= a.v) {
    if (threadIdx.x != 0) return;
    a.row_losses[index] = CUDART_NAN;
    raise_fault(fault, {FaultKind::kIndex, FaultOperation::kCrossEntropy,
                        static_cast<long long>(index), target, static_cast<long long>(a.v)});
    return;
  }
  LogitRow<Element, kThreads> row = {elements<Element>(a.logits) + index * a.stride, a.v, kept,
                                     num_kept};
  const double x_target = static_cast<double>(to_float(row.x[target]));
  RunningSum sum = row.sum();
  // Its barriers stand between the reads above and the writes below.
  const float largest = block_reduce<kThreads>(sum.largest, Max());
  sum.raise(largest);
  const double total = block_reduce<kThreads>(sum.total, Sum());
  const double below = x_target - static_cast<double>(largest);
  if (threadIdx.x == 0) a.row_losses[index] = log(total) - below;
  if (!a.dlogits) return;
  const double scale = static_cast<double>(a.grad_scale);
  const float at_target = static_cast<float>((exp(below) / total - 1.0) * scale);
  row.write_gradient(largest, static_cast<float>(scale / total), static_cast<size_t>(target),
                     at_target);
}

// Bytes of shared memory that a block may have for a row.
size_t largest_kept() {
  int device = 0, bytes = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes - kReserved);
}

template <typename Element, int kThreads>
void launch(const TmCrossEntropy& args, DeviceFault* fault, cudaStream_t stream) {
  constexpr size_t kChunkBytes = 16;
  const size_t chunks = (args.v * sizeof(Element) + kChunkBytes - 1) / kChunkBytes;
  const size_t num_kept = args.dlogits ? std::min(chunks, largest_kept() / kChunkBytes) : 0;
  const int bytes = static_cast<int>(num_kept * kChunkBytes);
  const auto kernel = cross_entropy_kernel<Element, kThreads>;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(args.rows), kThreads, bytes, stream>>>(args, num_kept, fault);
  CUDA_CHECK_LAUNCH("cross_entropy", stream);
}

}  // namespace

template <typename Element>
void cross_entropy(const TmCrossEntropy& args, DeviceFault* fault, cudaStream_t stream) {
  if (args.rows == 0 || args.v == 0) return;
  if (args.v <= kFewChunks * Chunk<Element>::kWidth) {
    launch<Element, kFewThreads>(args, fault, stream);
  } else {
    launch<Element, kManyThreads>(args, fault, stream);
  }
}

template void cross_entropy<float>(const TmCrossEntropy&, DeviceFault*, cudaStream_t);
template void cross_entropy<Bfloat16>(const TmCrossEntropy&, DeviceFault*, cudaStream_t);

}  // namespace tunemesh::cuda
