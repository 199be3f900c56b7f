#include "kernels/cuda/attention_layout.cuh"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 32;  // of a transposed tile
constexpr unsigned kSearchBlocks = 264;

// (c) one thread for each table row; (f) 40 bytes written for a document.
__global__ void __launch_bounds__(kThreads) ragged_kernel(RaggedTables t) {
  const int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  if (i > t.batch) return;
  const int32_t first = t.starts[0];
  const int32_t begin = t.starts[min(i, t.num_documents)];
#pragma unroll
  for (int k = 0; k < kRaggedTensors; ++k) {
    if (t.offsets[k] != nullptr) t.offsets[k][i] = (begin - first) * t.strides[k];
  }
  if (i < t.batch) t.lengths[i] = i < t.num_documents ? t.starts[i + 1] - begin : 0;
}

// (c) a tile of 32 tokens x 32 heads through shared memory, 32 x 8 threads; (f) 8 bytes an element.
__global__ void __launch_bounds__(kThreads) head_major_kernel(HeadMajorLse a) {
  __shared__ float tile[kSide][kSide + 1];
  const size_t document = blockIdx.z;
  const size_t token0 = size_t{blockIdx.x} * kSide, head0 = size_t{blockIdx.y} * kSide;
  for (unsigned row = threadIdx.y; row < kSide; row += blockDim.y) {
    const size_t token = token0 + row, head = head0 + threadIdx.x;
    if (token < a.length && head < a.heads) {
      tile[row][threadIdx.x] = a.rows[(document * a.length + token) * a.stride + head];
    }
  }
  __syncthreads();
  for (unsigned row = threadIdx.y; row < kSide; row += blockDim.y) {
    const size_t head = head0 + row, token = token0 + threadIdx.x;
    if (token < a.length && head < a.heads) {
      a.out[(document * a.heads + head) * a.length + token] = tile[threadIdx.x][row];
    }
  }
}

// (c) threads stride over elements; all that find one write the same 1.
__global__ void __launch_bounds__(kThreads) nonzero_kernel(NonzeroSearch a) {
  const uint16_t* rows = static_cast<const uint16_t*>(a.rows);
  const size_t count = a.n * a.width, step = size_t{gridDim.x} * kThreads;
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    if ((rows[i / a.width * a.stride + i % a.width] & 0x7fff) == 0) continue;
    *a.flag = 1;
    return;
  }
}

}  // namespace

void fill_ragged_tables(const RaggedTables& tables, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(tables.batch / kThreads + 1);
  ragged_kernel<<<blocks, kThreads, 0, stream>>>(tables);
  CUDA_CHECK_LAUNCH("ragged_kernel", stream);
}

void make_head_major(const HeadMajorLse& args, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((args.length + kSide - 1) / kSide),
                  static_cast<unsigned>((args.heads + kSide - 1) / kSide),
                  static_cast<unsigned>(args.documents));
  head_major_kernel<<<grid, dim3(kSide, kThreads / kSide), 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("head_major_kernel", stream);
}

void find_nonzero(const NonzeroSearch& args, cudaStream_t stream) {
  nonzero_kernel<<<kSearchBlocks, kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("nonzero_kernel", stream);
}

}  // namespace tunemesh::cuda
