// Launches of kernels that treat each chunk (element.cuh) of a matrix alone: a chunk a thread, 256
// threads a block, several rows a block where rows are short. Rows are on grid.x, which may be
// long.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

namespace tunemesh::cuda {

constexpr int kElementThreads = 256;
constexpr int kElementsOfThread = 4;
constexpr size_t kElementsOfBlock = size_t{kElementThreads} * kElementsOfThread;

struct ChunkLaunch {
  dim3 grid, block;
  ChunkLaunch(size_t rows, size_t chunks) {
    block.x = 1;
    while (block.x < kElementThreads && block.x < chunks) block.x *= 2;
    block.y = kElementThreads / block.x;
    grid.x = static_cast<unsigned>((rows + block.y - 1) / block.y);
    grid.y = static_cast<unsigned>((chunks + block.x - 1) / block.x);
  }
};
template <typename Element>
inline size_t chunks_of(size_t columns) {
  constexpr size_t kWidth = 16 / sizeof(Element);
  return (columns + kWidth - 1) / kWidth;
}

#ifdef __CUDACC__
struct ChunkPlace {
  size_t row, chunk;
  __device__ ChunkPlace()
      : row(size_t{blockIdx.x} * blockDim.y + threadIdx.y),
        chunk(size_t{blockIdx.y} * blockDim.x + threadIdx.x) {}
};
#endif

// One long vector of floats: blocks on grid.x.
inline unsigned vector_grid(size_t n) {
  return static_cast<unsigned>((n + kElementsOfBlock - 1) / kElementsOfBlock);
}
#ifdef __CUDACC__
template <typename Visit>
__device__ inline void for_each_element(size_t n, Visit visit) {
  const size_t first = size_t{blockIdx.x} * kElementsOfBlock + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kElementsOfThread; ++k) {
    const size_t i = first + size_t(k) * kElementThreads;
    if (i < n) visit(i);
  }
}
#endif

}  // namespace tunemesh::cuda
