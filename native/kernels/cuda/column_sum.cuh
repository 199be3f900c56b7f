// Sums down the rows of a matrix, added to a vector, without scratch and in a fixed order.
//
//   launch  column_sum_grid(c), block (32, 32): 32 columns a block
//   order   thread y adds rows y, y + 32, ... ascending from 0; the 32 parts are then added to the
//           old value ascending
#pragma once

namespace tunemesh::cuda {

constexpr int kColumnSumWidth = 32;
constexpr int kColumnSumRows = 32;

inline dim3 column_sum_grid(size_t c) {
  return dim3(static_cast<unsigned>((c + kColumnSumWidth - 1) / kColumnSumWidth));
}
inline dim3 column_sum_block() { return dim3(kColumnSumWidth, kColumnSumRows); }

// term(row, column, sum) answers the sum with the element's term added.
template <typename Term>
__device__ inline void add_column_sums(size_t n, size_t c, Term term, float* sums) {
  __shared__ float partial[kColumnSumRows][kColumnSumWidth + 1];
  const size_t column = size_t{blockIdx.x} * kColumnSumWidth + threadIdx.x;
  float sum = 0;
  if (column < c) {
#pragma unroll 4
    for (size_t row = threadIdx.y; row < n; row += kColumnSumRows) sum = term(row, column, sum);
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= c) return;
  float total = sums[column];
  for (int part = 0; part < kColumnSumRows; ++part) total += partial[part][threadIdx.x];
  sums[column] = total;
}

}  // namespace tunemesh::cuda
