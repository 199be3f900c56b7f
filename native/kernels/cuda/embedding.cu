#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/embedding.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 128, kGatherThreads = 256;

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
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(GatherRows<From, To> a) {
  if (!is_valid(a.indices, blockIdx.x)) return;
  using C = Chunk<To>;
  const From* from = a.table + static_cast<size_t>(a.indices.rows[blockIdx.x]) * a.c;
  To* to = a.out + size_t{blockIdx.x} * a.c;
  for (size_t j = threadIdx.x * C::kWidth; j < a.c; j += size_t{kGatherThreads} * C::kWidth) {
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

// Where each row occurs first, and how often: [height] each, of rows that occur alone.
struct Occurrences {
  int32_t* first;  // null: not known
  int32_t* count;
};

template <bool kMarks>
__global__ void __launch_bounds__(kThreads) occurrences_kernel(RowIndices a, Occurrences o) {
  const size_t position = size_t{blockIdx.x} * kThreads + threadIdx.x;
  if (position >= a.n) return;
  const int32_t row = a.rows[position];
  if (row < 0 || static_cast<size_t>(row) >= a.height) return;
  if constexpr (kMarks) {  // the least and the sum of integers: the same in any order
    atomicMin(&o.first[row], static_cast<int32_t>(position));
    atomicAdd(&o.count[row], 1);
  } else {
    o.first[row] = INT32_MAX;
    o.count[row] = 0;
  }
}

// A thread's columns of the row that its block adds to: chunks of 16 bytes of From.
template <typename From, typename To>
struct RowSum {
  using C = Chunk<From>;
  float at[C::kWidth];

  __device__ void load(const To* from, size_t left) {
#pragma unroll
    for (int i = 0; i < C::kWidth; i += Chunk<To>::kWidth) {
      const size_t before = static_cast<size_t>(i);
      const Chunk<To> chunk = Chunk<To>::load(from + i, left > before ? left - before : 0);
#pragma unroll
      for (int j = 0; j < Chunk<To>::kWidth; ++j) at[i + j] = chunk[j];
    }
  }
  __device__ void add(const From* from, size_t left) {
    const C chunk = C::load(from, left);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) at[i] += chunk[i];
  }
  __device__ void store(To* to, size_t left) const {
#pragma unroll
    for (int i = 0; i < C::kWidth; i += Chunk<To>::kWidth) {
      const size_t before = static_cast<size_t>(i);
      if (left <= before) return;
      float part[Chunk<To>::kWidth];
#pragma unroll
      for (int j = 0; j < Chunk<To>::kWidth; ++j) part[j] = at[i + j];
      Chunk<To>::rounded(part).store(to + i, left - before);
    }
  }
};

// The block of a row's first occurrence adds all of them, the others end. Where occurrences are not
// known, a block looks through the positions before its own.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) scatter_kernel(ScatterRows<From, To> a, Occurrences o) {
  __shared__ int offsets[kThreads];
  const size_t position = blockIdx.x;
  if (!is_valid(a.indices, position)) return;
  const int32_t row = a.indices.rows[position];
  int left_over = INT32_MAX;
  if (o.first != nullptr) {
    if (static_cast<size_t>(o.first[row]) != position) return;
    left_over = o.count[row];
  }
  for (size_t base = 0; o.first == nullptr && base < position; base += kThreads) {
    const size_t j = base + threadIdx.x;
    if (__syncthreads_or(j < position && a.indices.rows[j] == row)) return;
  }
  const size_t column = (size_t{blockIdx.y} * kThreads + threadIdx.x) * Chunk<From>::kWidth;
  const size_t left = column < a.c ? a.c - column : 0;
  To* out = a.out + static_cast<size_t>(row) * a.c + column;
  RowSum<From, To> sum;
  if (left > 0) {
    sum.load(out, left);
    sum.add(a.x + position * a.c + column, left);
  }
  // Other occurrences lie behind this one.
  --left_over;
  for (size_t base = position + 1; left_over > 0 && base < a.indices.n; base += kThreads) {
    const int total = matches_of_chunk(a.indices, row, base, offsets);
    for (int m = 0; m < total && left > 0; ++m) {
      sum.add(a.x + (base + static_cast<size_t>(offsets[m])) * a.c + column, left);
    }
    left_over -= total;
  }
  if (left > 0) sum.store(out, left);
}

template <typename From, typename To>
void launch_scatter(const ScatterRows<From, To>& args, const Occurrences& occurrences,
                    cudaStream_t stream) {
  constexpr size_t kColumns = size_t{kThreads} * Chunk<From>::kWidth;
  const dim3 grid(static_cast<unsigned>(args.indices.n),
                  static_cast<unsigned>((args.c + kColumns - 1) / kColumns));
  scatter_kernel<<<grid, kThreads, 0, stream>>>(args, occurrences);
  CUDA_CHECK_LAUNCH("scatter_rows_add", stream);
}

}  // namespace

template <typename From, typename To>
void gather_rows(const GatherRows<From, To>& args, cudaStream_t stream) {
  if (args.indices.n == 0 || args.c == 0) return;
  const unsigned grid = static_cast<unsigned>(args.indices.n);
  gather_kernel<<<grid, kGatherThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("gather_rows", stream);
}

template <typename From, typename To>
void scatter_rows_add(const ScatterRows<From, To>& args, cudaStream_t stream) {
  if (args.indices.n == 0 || args.c == 0) return;
  launch_scatter(args, {nullptr, nullptr}, stream);
}

template <typename From, typename To>
void scatter_rows_add(const ScatterRows<From, To>& args, const Scratch& scratch,
                      cudaStream_t stream) {
  const RowIndices& rows = args.indices;
  if (rows.n == 0 || args.c == 0) return;
  if (2 * rows.height > scratch.num_floats) return scatter_rows_add(args, stream);
  auto* const first = reinterpret_cast<int32_t*>(scratch.data);
  const Occurrences occurrences = {first, first + rows.height};
  const unsigned grid = static_cast<unsigned>((rows.n + kThreads - 1) / kThreads);
  occurrences_kernel<false><<<grid, kThreads, 0, stream>>>(rows, occurrences);
  CUDA_CHECK_LAUNCH("scatter_rows_add, clear", stream);
  occurrences_kernel<true><<<grid, kThreads, 0, stream>>>(rows, occurrences);
  CUDA_CHECK_LAUNCH("scatter_rows_add, mark", stream);
  launch_scatter(args, occurrences, stream);
}

template void gather_rows(const GatherRows<float, float>&, cudaStream_t);
template void gather_rows(const GatherRows<float, Bfloat16>&, cudaStream_t);
template void gather_rows(const GatherRows<Bfloat16, Bfloat16>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<float, float>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<Bfloat16, Bfloat16>&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<float, float>&, const Scratch&, cudaStream_t);
template void scatter_rows_add(const ScatterRows<Bfloat16, float>&, const Scratch&, cudaStream_t);

}  // namespace tunemesh::cuda
