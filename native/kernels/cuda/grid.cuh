// Launches of kernels that treat each element of a matrix alone: rows on grid.x, which may be long,
// columns of 4 a thread on grid.y.
#pragma once
#include <stddef.h>

namespace tunemesh::cuda {

constexpr int kElementThreads = 256;
constexpr int kElementsOfThread = 4;
constexpr size_t kElementsOfBlock = size_t{kElementThreads} * kElementsOfThread;

inline dim3 element_grid(size_t rows, size_t columns) {
  return dim3(static_cast<unsigned>(rows),
              static_cast<unsigned>((columns + kElementsOfBlock - 1) / kElementsOfBlock));
}

// Calls visit(column) for this thread's columns of the row blockIdx.x.
template <typename Visit>
__device__ inline void for_each_column(size_t columns, Visit visit) {
  const size_t first = size_t{blockIdx.y} * kElementsOfBlock + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kElementsOfThread; ++k) {
    const size_t column = first + size_t(k) * kElementThreads;
    if (column < columns) visit(column);
  }
}

// One long vector: blocks on grid.x.
inline unsigned vector_grid(size_t n) {
  return static_cast<unsigned>((n + kElementsOfBlock - 1) / kElementsOfBlock);
}
template <typename Visit>
__device__ inline void for_each_element(size_t n, Visit visit) {
  const size_t first = size_t{blockIdx.x} * kElementsOfBlock + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kElementsOfThread; ++k) {
    const size_t i = first + size_t(k) * kElementThreads;
    if (i < n) visit(i);
  }
}

}  // namespace tunemesh::cuda
