// Micro-kernels of the matrix products: a few rows of C against one panel of B, for one block of k,
// with the sums in registers. Included by gemm_isa.cc only.
#pragma once

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_transpose.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {

// Rows of a micro-kernel: what the sums leave of the register file. On AVX2 a kernel of few rows
// takes the whole panel at once, a taller one a half after the other.
#if defined(TM_ISA_avx512)
constexpr int kWholePanelRows = 12;  // 12 x 2 sums of 32 registers
constexpr int kHalfPanelRows = 16;   // 16 x 1: a cache line of a k-major A
#elif defined(TM_ISA_avx2)
constexpr int kWholePanelRows = 3;
constexpr int kHalfPanelRows = 6;  // 6 x 2 sums of 16 registers
#else
constexpr int kWholePanelRows = 4;
constexpr int kHalfPanelRows = 4;
#endif

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

struct MicroTile {
  size_t depth;
  const float* a;  // (r, k) at a[r * a_row_step + k * a_depth_step]; one of the steps is 1
  size_t a_row_step, a_depth_step;
  const float* b;  // [k][32]
  float* c;
  size_t c_stride;
  bool from_zero;     // the chain starts here, not from C
  const float* next;  // brought to the cache meanwhile, at each k next_step floats on
  size_t next_step;
  const float* next_c;  // likewise, the rows of the next tile
};

template <int kRows, int kVectors, bool kIsDepthMajor>
void micro_kernel(const MicroTile& tile) {
  Vec16 sums[kRows][kVectors];
  float* c = tile.c;
  const size_t c_stride = tile.c_stride;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      sums[r][v] = tile.from_zero ? zero() : load(c + r * c_stride + 16 * v);
    }
  }
  const float* next_c = tile.next_c;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) __builtin_prefetch(next_c + r * c_stride + 16 * v, 1);
  }
  const float* a = tile.a;
  const size_t a_row_step = kIsDepthMajor ? 1 : tile.a_row_step;
  const size_t a_depth_step = kIsDepthMajor ? tile.a_depth_step : 1;
  const float* b = tile.b;
  const float* next = tile.next;
  const size_t next_step = tile.next_step;
#pragma GCC unroll 4
  for (size_t k = tile.depth; k > 0; k--) {
    __builtin_prefetch(next, 0, 2);
    next += next_step;
    Vec16 columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) columns[v] = load(b + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const Vec16 x = set1(a[r * a_row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
    a += a_depth_step;
    b += kPanelColumns;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) store(c + r * c_stride + 16 * v, sums[r][v]);
  }
}

using MicroKernel = void (*)(const MicroTile&);

// By rows - 1.
template <int kVectors, bool kIsDepthMajor>
struct Kernels {
  static constexpr int kTallest = kVectors == 2 ? kWholePanelRows : kHalfPanelRows;
  MicroKernel of_rows[kTallest] = {};
  constexpr Kernels() { add<1>(); }
  template <int kRows>
  constexpr void add() {
    of_rows[kRows - 1] = micro_kernel<kRows, kVectors, kIsDepthMajor>;
    if constexpr (kRows < kTallest) add<kRows + 1>();
  }
};

inline constexpr Kernels<1, false> kHalfRowMajor;
inline constexpr Kernels<1, true> kHalfDepthMajor;
inline constexpr Kernels<2, false> kWholeRowMajor;
inline constexpr Kernels<2, true> kWholeDepthMajor;

inline MicroKernel choose_kernel(const MicroTile& tile, size_t rows, bool is_whole) {
  const bool is_depth_major = tile.a_row_step == 1;
  if (is_whole) {
    return is_depth_major ? kWholeDepthMajor.of_rows[rows - 1] : kWholeRowMajor.of_rows[rows - 1];
  }
  return is_depth_major ? kHalfDepthMajor.of_rows[rows - 1] : kHalfRowMajor.of_rows[rows - 1];
}

// Runs a kernel on columns that C does not have in full: through a copy of the tile.
inline void run_on_edge(MicroKernel kernel, MicroTile tile, size_t rows, size_t columns) {
  alignas(64) float copy[kHalfPanelRows * kPanelColumns];
  float* c = tile.c;
  const size_t c_stride = tile.c_stride, right = columns - smaller(columns, 16);
  for (size_t r = 0; r < rows && !tile.from_zero; r++) {
    store(copy + r * kPanelColumns, load_up_to(c + r * c_stride, columns));
    store(copy + r * kPanelColumns + 16, load_up_to(c + r * c_stride + 16, right));
  }
  tile.c = copy;
  tile.next_c = copy;
  tile.c_stride = kPanelColumns;
  kernel(tile);
  for (size_t r = 0; r < rows; r++) {
    store_up_to(c + r * c_stride, load(copy + r * kPanelColumns), columns);
    store_up_to(c + r * c_stride + 16, load(copy + r * kPanelColumns + 16), right);
  }
}

// The same where C is stored transposed: element (r, j) at c[j * c_stride + r].
inline void run_on_transposed(MicroKernel kernel, MicroTile tile, size_t rows, size_t columns) {
  alignas(64) float copy[kHalfPanelRows * kPanelColumns];
  alignas(64) float turned[16 * 16 + 16];
  float* c = tile.c;
  const size_t c_stride = tile.c_stride;
  for (size_t j = 0; j < columns && !tile.from_zero; j += 16) {
    transpose_block(c + j * c_stride, c_stride, smaller(16, columns - j), rows, 1.0f, copy + j,
                    kPanelColumns);
  }
  tile.c = copy;
  tile.next_c = copy;
  tile.c_stride = kPanelColumns;
  kernel(tile);
  for (size_t j = 0; j < columns; j += 16) {
    const size_t width = smaller(16, columns - j);
    transpose_block(copy + j, kPanelColumns, rows, width, 1.0f, turned, 16);
    for (size_t i = 0; i < width; i++) {
      store_up_to(c + (j + i) * c_stride, load(turned + i * 16), rows);
    }
  }
}

// One row group against the `columns` <= 32 columns of one panel. Moves the tile's pointers along:
// a copy of a tile just written would wait for its stores.
inline void multiply_panel(MicroTile& tile, size_t rows, size_t columns, bool is_c_transposed) {
  const size_t step = rows <= size_t{kWholePanelRows} && columns > 16 ? kPanelColumns : 16;
  const MicroKernel kernel = choose_kernel(tile, rows, step == kPanelColumns);
  for (;;) {
    const size_t width = smaller(columns, step);
    if (is_c_transposed) {
      run_on_transposed(kernel, tile, rows, width);
    } else if (width < step) {
      run_on_edge(kernel, tile, rows, width);
    } else {
      kernel(tile);
    }
    columns -= width;
    if (columns == 0) return;
    tile.b += step;
    tile.c += is_c_transposed ? step * tile.c_stride : step;
    tile.next_c += step;
  }
}

}  // namespace TM_ISA
}  // namespace tunemesh
