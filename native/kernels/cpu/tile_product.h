// Small matrix products for attention: C[m, n] (+)= A[m, k] B[k, n]. For *_isa.cc only.
//
// A is read one element at a time, so that it may lie transposed; B and C are read in vectors along
// n. Each element of C is one fma chain over ascending k, from 0 or from C: the same bits for every
// tile size, hence on every path.
#pragma once
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {

struct TileProduct {
  const float* a;
  size_t a_row, a_column;  // strides in floats
  const float* b;
  size_t b_stride;
  float* c;
  size_t c_stride;
  size_t k;
  bool accumulate;
};

constexpr size_t kTileRows = 6;
#if defined(TM_ISA_avx512)
constexpr size_t kTileVectors = 4;  // 24 sums, 4 of B, 1 of A in 32 registers
#else
constexpr size_t kTileVectors = 1;  // 12 sums, 2 of B, 1 of A in 16 registers
#endif

template <size_t kRows, size_t kVectors>
inline void tile_product(const TileProduct& t) {
  float* const c = t.c;
  const size_t a_row = t.a_row, a_column = t.a_column, b_stride = t.b_stride;
  const size_t c_stride = t.c_stride, depth = t.k;
  Vec16 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      sums[r][v] = t.accumulate ? load(c + r * c_stride + 16 * v) : zero();
    }
  }
  const float* a = t.a;
  const float* b = t.b;
  for (size_t k = 0; k < depth; ++k, a += a_column, b += b_stride) {
    Vec16 right[kVectors];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) right[v] = load(b + 16 * v);
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const Vec16 left = set1(a[r * a_row]);
#pragma GCC unroll 8
      for (size_t v = 0; v < kVectors; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) store(c + r * c_stride + 16 * v, sums[r][v]);
  }
}

// The last n < 16 columns.
template <size_t kRows>
inline void tail_product(const TileProduct& t, size_t n) {
  Vec16 sums[kRows];
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) {
    sums[r] = t.accumulate ? load_tail(t.c + r * t.c_stride, n) : zero();
  }
  for (size_t k = 0; k < t.k; ++k) {
    const Vec16 right = load_tail(t.b + k * t.b_stride, n);
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      sums[r] = fma(set1(t.a[r * t.a_row + k * t.a_column]), right, sums[r]);
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) store_tail(t.c + r * t.c_stride, sums[r], n);
}

// kRows rows, any number of columns. Moves t.b and t.c along: a copy of `t` would wait for the
// stores that have just filled it.
template <size_t kRows>
inline void row_product(TileProduct& t, size_t n) {
  for (; n >= 16 * kTileVectors; n -= 16 * kTileVectors) {
    tile_product<kRows, kTileVectors>(t);
    t.b += 16 * kTileVectors;
    t.c += 16 * kTileVectors;
  }
  if constexpr (kTileVectors > 1) {
    const size_t vectors = n / 16;
    if (vectors == 3) tile_product<kRows, 3>(t);
    if (vectors == 2) tile_product<kRows, 2>(t);
    if (vectors == 1) tile_product<kRows, 1>(t);
    t.b += 16 * vectors;
    t.c += 16 * vectors;
    n -= 16 * vectors;
  }
  if (n > 0) tail_product<kRows>(t, n);
}

// m <= kTileRows rows. Leaves t.b and t.c changed.
inline void rows_product(TileProduct& t, size_t m, size_t n) {
  switch (m) {
    case 6:
      return row_product<6>(t, n);
    case 5:
      return row_product<5>(t, n);
    case 4:
      return row_product<4>(t, n);
    case 3:
      return row_product<3>(t, n);
    case 2:
      return row_product<2>(t, n);
    case 1:
      return row_product<1>(t, n);
  }
}

}  // namespace TM_ISA
}  // namespace tunemesh
