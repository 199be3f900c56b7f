// Packing and micro-kernels of the matrix products (gemm.h), once for each instruction path.
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_transpose.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

// Rows of a micro-kernel: what the accumulators leave of the register file. A kernel of few rows
// takes the whole panel at once, a taller one on AVX2 one half after the other.
#if defined(TM_ISA_avx512)
constexpr size_t kRowGroup = 12;      // 12 x 2 accumulators of 32 registers
constexpr size_t kWholePanelRows = 12;
#elif defined(TM_ISA_avx2)
constexpr size_t kRowGroup = 6;       // 6 x 2 accumulators of 16 registers
constexpr size_t kWholePanelRows = 3;
#else
constexpr size_t kRowGroup = 4;
constexpr size_t kWholePanelRows = 4;
#endif

// Below this many columns, a row of A is read too few times to be worth packing.
constexpr size_t kUnpackedColumns = 64;

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// One row group of A: packed [k][rows], or rows of the caller's matrix.
struct RowsOfA {
  const float* data;
  size_t stride;  // between rows, where not packed
};

struct MicroTile {
  size_t depth;
  RowsOfA a;
  const float* b;
  float* c;
  size_t c_stride;
  bool from_zero;  // the chain starts here, not from C
};

template <int kRows, int kVectors, bool kIsPacked>
void micro_kernel(const MicroTile& tile) {
  Vec16 sums[kRows][kVectors];
  float* c = tile.c;
  const size_t c_stride = tile.c_stride;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      sums[r][v] = tile.from_zero ? zero() : load(c + r * c_stride + 16 * v);
    }
  }
  const float* a = tile.a.data;
  const size_t a_stride = tile.a.stride;
  const float* b = tile.b;
#pragma GCC unroll 4
  for (size_t k = tile.depth; k > 0; k--) {
    Vec16 columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) columns[v] = load(b + 16 * v);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r++) {
      const Vec16 x = set1(kIsPacked ? a[r] : a[r * a_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; v++) sums[r][v] = fma(x, columns[v], sums[r][v]);
    }
    a += kIsPacked ? kRows : 1;
    b += kPanelColumns;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) store(c + r * c_stride + 16 * v, sums[r][v]);
  }
}

using MicroKernel = void (*)(const MicroTile&);

template <int kVectors, bool kIsPacked>
MicroKernel kernel_of(size_t rows) {
  switch (rows) {
    case 1: return micro_kernel<1, kVectors, kIsPacked>;
    case 2: return micro_kernel<2, kVectors, kIsPacked>;
    case 3: return micro_kernel<3, kVectors, kIsPacked>;
#if !defined(TM_ISA_avx2)
    case 4: return micro_kernel<4, kVectors, kIsPacked>;
#endif
#if defined(TM_ISA_avx512)
    case 5: return micro_kernel<5, kVectors, kIsPacked>;
    case 6: return micro_kernel<6, kVectors, kIsPacked>;
    case 7: return micro_kernel<7, kVectors, kIsPacked>;
    case 8: return micro_kernel<8, kVectors, kIsPacked>;
    case 9: return micro_kernel<9, kVectors, kIsPacked>;
    case 10: return micro_kernel<10, kVectors, kIsPacked>;
    case 11: return micro_kernel<11, kVectors, kIsPacked>;
    default: return micro_kernel<12, kVectors, kIsPacked>;
#else
    default: break;
#endif
  }
  if constexpr (kVectors == 1 && kRowGroup == 6) {
    if (rows == 4) return micro_kernel<4, 1, kIsPacked>;
    if (rows == 5) return micro_kernel<5, 1, kIsPacked>;
    return micro_kernel<6, 1, kIsPacked>;
  }
  return nullptr;
}

MicroKernel choose_kernel(size_t rows, int vectors, bool is_packed) {
  if (vectors == 2) return is_packed ? kernel_of<2, true>(rows) : kernel_of<2, false>(rows);
  return is_packed ? kernel_of<1, true>(rows) : kernel_of<1, false>(rows);
}

// Runs a kernel on columns that C does not have in full: through a copy of the tile.
void run_on_edge(MicroKernel kernel, MicroTile tile, size_t rows, size_t columns) {
  alignas(64) float copy[kRowGroup * kPanelColumns];
  float* c = tile.c;
  for (size_t r = 0; r < rows && !tile.from_zero; r++) {
    for (size_t j = 0; j < columns; j++) copy[r * kPanelColumns + j] = c[r * tile.c_stride + j];
    for (size_t j = columns; j < kPanelColumns; j++) copy[r * kPanelColumns + j] = 0.0f;
  }
  tile.c = copy;
  const size_t c_stride = tile.c_stride;
  tile.c_stride = kPanelColumns;
  kernel(tile);
  for (size_t r = 0; r < rows; r++) {
    for (size_t j = 0; j < columns; j++) c[r * c_stride + j] = copy[r * kPanelColumns + j];
  }
}

// One row group against the `columns` <= 32 columns of one panel.
void multiply_panel(const MicroTile& tile, size_t rows, size_t columns, bool is_packed) {
  const size_t step = rows <= kWholePanelRows && columns > 16 ? kPanelColumns : 16;
  const MicroKernel kernel = choose_kernel(rows, static_cast<int>(step / 16), is_packed);
  for (size_t j = 0; j < columns; j += step) {
    MicroTile part = tile;
    part.b += j;
    part.c += j;
    if (columns - j >= step) {
      kernel(part);
    } else {
      run_on_edge(kernel, part, rows, columns - j);
    }
  }
}

// Rows are dealt evenly to the groups: 13 rows are 7 + 6, not 12 + 1.
size_t group_end(size_t rows, size_t group, size_t num_groups) {
  return rows * (group + 1) / num_groups;
}

// Packs alpha * A[row .. row + rows, k .. k + depth] as [k][rows].
void pack_group(const GemmTask& task, size_t row, size_t rows, size_t k, size_t depth,
                float* packed) {
  if (task.a_layout == GemmA::kRows) {
    for (size_t i = 0; i < depth; i += 16) {
      transpose_block(task.a + row * task.a_stride + k + i, task.a_stride, rows,
                      smaller(16, depth - i), task.alpha, packed + i * rows, rows);
    }
    return;
  }
  const Vec16 alpha = set1(task.alpha);
  const float* from = task.a + k * task.a_stride + row;
  for (size_t i = 0; i < depth; i++) {
    store_tail(packed + i * rows, load_tail(from + i * task.a_stride, rows) * alpha, rows);
  }
}

// Packs B[k .. k + depth, column .. column + columns] as one panel, padded with zeros.
void pack_columns(const GemmTask& task, size_t k, size_t depth, size_t column, size_t columns,
                  float* panel) {
  if (columns < kPanelColumns) memset(panel, 0, depth * kPanelColumns * sizeof(float));
  if (task.b_layout == GemmB::kDepth) {
    for (size_t i = 0; i < depth; i++) {
      const float* from = task.b + (k + i) * task.b_stride + column;
      float* to = panel + i * kPanelColumns;
      store_up_to(to, load_up_to(from, columns), columns);
      if (columns > 16) store_up_to(to + 16, load_up_to(from + 16, columns - 16), columns - 16);
    }
    return;
  }
  for (size_t i = 0; i < depth; i += 16) {
    const size_t kk = k + i;
    const float* from = task.b + column * task.b_stride + kk;
    size_t stride = task.b_stride;
    if (task.b_layout == GemmB::kTransposedPanels) {
      from = task.b + (kk / kPanelColumns * task.b_stride + column) * kPanelColumns +
             kk % kPanelColumns;
      stride = kPanelColumns;
    }
    for (size_t j = 0; j < columns; j += 16) {
      transpose_block(from + j * stride, stride, smaller(16, columns - j), smaller(16, depth - i),
                      1.0f, panel + i * kPanelColumns + j, kPanelColumns);
    }
  }
}

// A rectangle of B as panels.
struct Panels {
  const float* data;
  size_t stride;  // floats between panels
};

Panels panels_of(const GemmTask& task, size_t k, size_t depth, size_t column, size_t columns,
                 float* scratch) {
  if (task.b_layout == GemmB::kPanels) {
    return {task.b + column * task.b_stride + k * kPanelColumns, task.b_stride * kPanelColumns};
  }
  const size_t stride = depth * kPanelColumns;
  for (size_t j = 0; j < columns; j += kPanelColumns) {
    pack_columns(task, k, depth, column + j, smaller(kPanelColumns, columns - j),
                 scratch + j / kPanelColumns * stride);
  }
  return {scratch, stride};
}

// C[row .. row + rows, column .. column + columns] for one block of k.
void multiply_block(const GemmTask& task, const GemmTile& block, size_t k, size_t depth,
                    Panels panels) {
  const size_t row = block.row_begin, rows = block.row_end - block.row_begin;
  const size_t columns = block.column_end - block.column_begin;
  const bool is_packed = task.a_layout == GemmA::kDepth || task.alpha != 1.0f ||
                         columns > kUnpackedColumns;
  const size_t num_groups = (rows + kRowGroup - 1) / kRowGroup;
  if (is_packed) {
    for (size_t g = 0, begin = 0; g < num_groups; g++) {
      const size_t end = group_end(rows, g, num_groups);
      pack_group(task, row + begin, end - begin, k, depth, block.scratch + begin * depth);
      begin = end;
    }
  }
  for (size_t j = 0; j < columns; j += kPanelColumns) {
    for (size_t g = 0, begin = 0; g < num_groups; g++) {
      const size_t end = group_end(rows, g, num_groups);
      MicroTile tile;
      tile.depth = depth;
      tile.a = is_packed ? RowsOfA{block.scratch + begin * depth, 0}
                         : RowsOfA{task.a + (row + begin) * task.a_stride + k, task.a_stride};
      tile.b = panels.data + j / kPanelColumns * panels.stride;
      tile.c = task.c + (row + begin) * task.c_stride + block.column_begin + j;
      tile.c_stride = task.c_stride;
      tile.from_zero = k == 0 && !task.accumulate;
      multiply_panel(tile, end - begin, smaller(kPanelColumns, columns - j), is_packed);
      begin = end;
    }
  }
}

void gemm_tile(const GemmTask& task, const GemmTile& tile) {
  for (size_t column = tile.column_begin; column < tile.column_end; column += kBlockColumns) {
    const size_t column_end = smaller(column + kBlockColumns, tile.column_end);
    for (size_t k = 0; k < task.k; k += kBlockDepth) {
      const size_t depth = smaller(kBlockDepth, task.k - k);
      const Panels panels = panels_of(task, k, depth, column, column_end - column,
                                      tile.scratch + kGemmScratchA);
      for (size_t row = tile.row_begin; row < tile.row_end; row += kBlockRows) {
        const size_t row_end = smaller(row + kBlockRows, tile.row_end);
        multiply_block(task, {row, row_end, column, column_end, tile.scratch}, k, depth, panels);
      }
    }
  }
}

void pack_panel(const float* rows, size_t num_rows, size_t in, float* panel) {
  GemmTask task{};
  task.b = rows;
  task.b_stride = in;
  task.b_layout = GemmB::kColumns;
  pack_columns(task, 0, in, 0, num_rows, panel);
}

}  // namespace

void register_gemm(CpuKernels& kernels);
void register_gemm(CpuKernels& kernels) {
  kernels.gemm_tile = gemm_tile;
  kernels.pack_panel = pack_panel;
  kernels.gemm_row_group = kRowGroup;
}

}  // namespace TM_ISA
}  // namespace tunemesh
