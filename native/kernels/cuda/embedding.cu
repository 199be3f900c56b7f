#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/embedding.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumnsOfThread = 4;
constexpr int kColumnsOfBlock = kThreads * kColumnsOfThread;

__device__ bool is_valid(const RowIndices& indices, size_t position) {
  const int32_t row = indices.rows[position];
  if (row >= 0 && static_cast<size_t>(row) < indices.height) return true;
  if (threadIdx.x == 0 && blockIdx.y == 0) {
    raise_fault(indices.fault,
                {FaultKind::kIndex, indices.operation, static_cast<long long>(position), row,
                 static_cast<long long>(indices.height)});
  }
  return false;
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherRows<From, To> a) {
  if (!is_valid(a.indices, blockIdx.x)) return;
  using C = Chunk<To>;
  const From* from = a.table + static_cast<size_t>(a.indices.rows[blockIdx.x]) * a.c;
  To* to = a.out + size_t{blockIdx.x} * a.c;
  for (size_t j = threadIdx.x * C::kWidth; j < a.c; j += size_t{kThreads} * C::kWidth) {
    if constexpr (sizeof(From) == sizeof(To)) {
      C::load(from + j, a.c - j).store(to + j, a.c - j);
    } else {
      const FloatsBeside<C::kWidth> values(from + j, a.c - j);
      C::rounded(values.at).store(to + j, a.c - j);
    }
  }
}

// The positions within [base, base + kThreads) that hold `row`, ascending; answers how many.
__device__ int matches_of_chunk(const RowIndices& a, int32_t row, size_t base, int* offsets) {
  __shared__ int counts[kThreads / 32];
  const size_t position = base + threadIdx.x;
  const bool is_match = position < a.n && a.rows[position] == row;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the last chunk's readers are done
  const unsigned ballot = __ballot_sync(0xffffffffu, is_match);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int before = 0, total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? counts[w] : 0;
    total += counts[w];
  }
  if (is_match) offsets[before + __popc(ballot & ((1u << lane) - 1))] = threadIdx.x;
  __syncthreads();
  return total;
}

template <typename From, typename To>
__global__ void scatter_kernel(ScatterRows<From, To> a) {
  __shared__ int offsets[kThreads];
  const size_t position = blockIdx.x;
  if (!is_valid(a.indices, position)) return;
  const int32_t row = a.indices.rows[position];
  for (size_t base = 0; base < position; base += kThreads) {
    const size_t j = base + threadIdx.x;
    if (__syncthreads_or(j < position && a.indices.rows[j] == row)) return;
  }
  float sums[kColumnsOfThread];
  const size_t first = size_t{blockIdx.y} * kColumnsOfBlock + threadIdx.x;
  To* out = a.out + static_cast<size_t>(row) * a.c;
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    const size_t column = first + size_t(k) * kThreads;
    sums[k] = column < a.c ? to_float(out[column]) : 0.0f;
  }
  for (size_t base = position; base < a.indices.n; base += kThreads) {
    const int total = matches_of_chunk(a.indices, row, base, offsets);
    for (int m = 0; m < total; ++m) {
      const From* x = a.x + (base + static_cast<size_t>(offsets[m])) * a.c;
#pragma unroll
      for (int k = 0; k < kColumnsOfThread; ++k) {
        const size_t column = first + size_t(k) * kThreads;
        if (column < a.c) sums[k] += to_float(x[column]);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    const size_t column = first + size_t(k) * kThreads;
    if (column < a.c) out[column] = from_float<To>(sums[k]);
  }
}

}  // namespace

template <typename From, typename To>
void gather_rows(const GatherRows<From, To>& args, cudaStream_t stream) {
  if (args.indices.n == 0 || args.c == 0) return;
  const unsigned grid = static_cast<unsigned>(args.indices.n);
  gather_kernel<<<grid, kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("gather_rows", stream);
}

template <typename From, typename To>
void scatter_rows_add(const ScatterRows<From, To>& args, cudaStream_t stream) {
  if (args.indices.n == 0 || args.c == 0) return;
  const dim3 grid(static_cast<unsigned>(args.indices.n),
                  static_cast<unsigned>((args.c + kColumnsOfBlock - 1) / kColumnsOfBlock));
  scatter_kernel<<<grid, kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("scatter_rows_add", stream);
}

template void gather_rows(const GatherRows<float, float>&, cudaStream_t);
template void gather_rows(const GatherRows<float, Bfloat16>&, cudaStream_t);
template void gather_rows(const GatherRows<Bfloat16, Bfloat16>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<float, float>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<Bfloat16, float>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<Bfloat16, Bfloat16>&, cudaStream_t);

}  // namespace tunemesh::cuda
