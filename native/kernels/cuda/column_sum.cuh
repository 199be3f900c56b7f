// Sums down the rows of a matrix, added to a vector, in two launches and a fixed order.
//
//   partial  column_parts() spans of rows, each summed by the kernel that reads them (bias.cu,
//            rmsnorm.cu) to a row of partial sums [parts, c]
//   whole    add_partial_sums(): the parts are added to the old value
//
//   launch   partial: block (32, 8), a chunk of 16 bytes a lane; whole: block (32, 8), 32 columns
//   order    partial: warp w adds rows w, w + 8, ... of its span ascending from 0, the 8 warps are
//            added ascending. whole: warp w adds its eighth of the parts ascending from 0; old
//            value plus eighths ascending. The spans follow from the number of rows and columns
//            alone
//   floor    s n c bytes, and 8 parts c for the partial sums
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

// Memory for what lives within one call: the products' workspace.
struct Scratch {
  float* data;
  size_t num_floats;
};

constexpr int kColumnSumWarps = 8;
constexpr size_t kMostColumnParts = 64;
constexpr size_t kLeastPartRows = 64;

// sums[c] += the parts' rows of c floats.
struct PartialSums {
  const float* partials;
  size_t parts, c;
  float* sums;
};
void add_partial_sums(const PartialSums& args, cudaStream_t stream);

struct ColumnParts {
  size_t parts, rows;  // rows of a part, but for the last
};
// As many spans as there are rows and room for. Room for one must be there.
inline ColumnParts column_parts(size_t n, size_t c, const Scratch& scratch) {
  const size_t room = scratch.num_floats / c;
  size_t parts = (n + kLeastPartRows - 1) / kLeastPartRows;
  if (parts > kMostColumnParts) parts = kMostColumnParts;
  if (parts > room) parts = room;
  const size_t rows = (n + parts - 1) / parts;
  return {(n + rows - 1) / rows, rows};
}

#ifdef __CUDACC__

template <typename Element>
inline dim3 partial_sums_grid(size_t c, const ColumnParts& parts) {
  const size_t block_columns = size_t{32} * Chunk<Element>::kWidth;
  return dim3(static_cast<unsigned>((c + block_columns - 1) / block_columns),
              static_cast<unsigned>(parts.parts));
}
inline dim3 partial_sums_block() { return dim3(32, kColumnSumWarps); }

// add(row, column, left, sums) adds a row's chunk of elements to a lane's sums; blockIdx.y is the
// part.
template <typename Element, typename Add>
__device__ inline void sum_part(size_t n, size_t c, size_t rows, Add add, float* partials) {
  constexpr int kWidth = Chunk<Element>::kWidth;
  __shared__ float warps[kColumnSumWarps][32][kWidth + 1];
  const size_t column = (size_t{blockIdx.x} * 32 + threadIdx.x) * kWidth;
  const size_t begin = size_t{blockIdx.y} * rows, end = min(begin + rows, n);
  float sums[kWidth] = {};
  if (column < c) {
#pragma unroll 4
    for (size_t row = begin + threadIdx.y; row < end; row += kColumnSumWarps) {
      add(row, column, c - column, sums);
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) warps[threadIdx.y][threadIdx.x][i] = sums[i];
  __syncthreads();
  const size_t first = size_t{blockIdx.x} * 32 * kWidth;
  for (unsigned i = threadIdx.y * 32 + threadIdx.x; i < 32 * kWidth; i += 32 * kColumnSumWarps) {
    if (first + i >= c) continue;
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kColumnSumWarps; ++warp) {
      total += warps[warp][i / kWidth][i % kWidth];
    }
    partials[size_t{blockIdx.y} * c + first + i] = total;
  }
}

#endif

}  // namespace tunemesh::cuda
