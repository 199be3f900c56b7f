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
constexpr int kRowGroup = 12;  // 12 x 2 accumulators of 32 registers
constexpr int kWholePanelRows = 12;
#elif defined(TM_ISA_avx2)
constexpr int kRowGroup = 6;  // 6 x 2 accumulators of 16 registers
constexpr int kWholePanelRows = 3;
#else
constexpr int kRowGroup = 4;
constexpr int kWholePanelRows = 4;
#endif

// Below this many columns, a row of A is read too few times to be worth packing.
constexpr size_t kUnpackedColumns = 64;

// Up to this depth, C is read and written more than A and B.
constexpr size_t kShallow = 64;

// Rows of a k-major source that are packed side by side, so that it is read in long stretches.
constexpr size_t kPackedTogether = 8;

constexpr size_t kPrefetchedColumns = 32;  // of a packed weight, ahead of the one being transposed

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
  bool from_zero;       // the chain starts here, not from C
  const float* next_b;  // brought to the cache meanwhile, 16 floats for each k
  const float* next_c;  // likewise, the rows of the next tile
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
  const float* next_c = tile.next_c;
#pragma GCC unroll 12
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) __builtin_prefetch(next_c + r * c_stride + 16 * v, 1);
  }
  const float* a = tile.a.data;
  const size_t a_stride = tile.a.stride;
  const float* b = tile.b;
  const float* next_b = tile.next_b;
#pragma GCC unroll 4
  for (size_t k = tile.depth; k > 0; k--) {
    __builtin_prefetch(next_b, 0, 2);
    next_b += 16;
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

// By rows - 1. Kernels too tall for a whole panel are left out.
template <int kVectors, bool kIsPacked>
struct Kernels {
  static constexpr int kTallest = kVectors == 2 ? kWholePanelRows : kRowGroup;
  MicroKernel of_rows[kRowGroup] = {};
  constexpr Kernels() { add<1>(); }
  template <int kRows>
  constexpr void add() {
    of_rows[kRows - 1] = micro_kernel<kRows, kVectors, kIsPacked>;
    if constexpr (kRows < kTallest) add<kRows + 1>();
  }
};

constexpr Kernels<1, false> kHalfUnpacked;
constexpr Kernels<1, true> kHalfPacked;
constexpr Kernels<2, false> kWholeUnpacked;
constexpr Kernels<2, true> kWholePacked;

MicroKernel choose_kernel(size_t rows, bool is_whole, bool is_packed) {
  if (is_whole) return (is_packed ? kWholePacked.of_rows : kWholeUnpacked.of_rows)[rows - 1];
  return (is_packed ? kHalfPacked.of_rows : kHalfUnpacked.of_rows)[rows - 1];
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
  tile.next_c = copy;
  const size_t c_stride = tile.c_stride;
  tile.c_stride = kPanelColumns;
  kernel(tile);
  for (size_t r = 0; r < rows; r++) {
    for (size_t j = 0; j < columns; j++) c[r * c_stride + j] = copy[r * kPanelColumns + j];
  }
}

// One row group against the `columns` <= 32 columns of one panel. Moves the tile's pointers along:
// a copy of a tile just written would wait for its stores.
inline void multiply_panel(MicroTile& tile, size_t rows, size_t columns, bool is_packed) {
  const size_t step = rows <= size_t{kWholePanelRows} && columns > 16 ? kPanelColumns : 16;
  const MicroKernel kernel = choose_kernel(rows, step == kPanelColumns, is_packed);
  for (;;) {
    if (columns < step) return run_on_edge(kernel, tile, rows, columns);
    kernel(tile);
    columns -= step;
    if (columns == 0) return;
    tile.b += step;
    tile.c += step;
    tile.next_c += step;
  }
}

// Rows dealt evenly to groups: 13 rows are 7 + 6, not 12 + 1.
struct Groups {
  size_t count;
  size_t begin[kBlockRows / kRowGroup + 1];  // and the end of the last one

  explicit Groups(size_t rows) : count((rows + kRowGroup - 1) / kRowGroup) {
    for (size_t g = 0; g <= count; g++) begin[g] = rows * g / count;
  }
  size_t height(size_t g) const { return begin[g + 1] - begin[g]; }
};

// Packs alpha * A[row .., k .. k + depth] as one [k][rows of the group] after another.
void pack_rows(const GemmTask& task, size_t row, const Groups& groups, size_t k, size_t depth,
               float* packed) {
  if (task.a_layout == GemmA::kRows) {
    for (size_t g = 0; g < groups.count; g++) {
      const size_t begin = groups.begin[g], height = groups.height(g);
      const float* from = task.a + (row + begin) * task.a_stride + k;
      for (size_t i = 0; i < depth; i += 16) {
        transpose_block(from + i, task.a_stride, height, smaller(16, depth - i), task.alpha,
                        packed + begin * depth + i * height, height);
      }
    }
    return;
  }
  const Vec16 alpha = set1(task.alpha);
  for (size_t i = 0; i < depth; i += kPackedTogether) {
    const size_t i_end = smaller(i + kPackedTogether, depth);
    for (size_t g = 0; g < groups.count; g++) {
      const size_t begin = groups.begin[g], height = groups.height(g);
      const float* from = task.a + (k + i) * task.a_stride + row + begin;
      float* to = packed + begin * depth + i * height;
      for (size_t j = i; j < i_end; j++, from += task.a_stride, to += height) {
        __builtin_prefetch(from + kPackedTogether * task.a_stride, 0, 2);
        store_tail(to, load_tail(from, height) * alpha, height);
      }
    }
  }
}

// Packs B[k .. k + depth, column .. column + columns], columns <= 32, as part of a panel, padded
// with zeros.
void pack_columns(const GemmTask& task, size_t k, size_t depth, size_t column, size_t columns,
                  float* panel) {
  if (task.b_layout == GemmB::kDepth) {
    const size_t left = smaller(columns, 16), right = columns - left;
    const float* from = task.b + k * task.b_stride + column;
    for (size_t i = 0; i < depth; i++, from += task.b_stride, panel += kPanelColumns) {
      __builtin_prefetch(from + kPackedTogether * task.b_stride, 0, 2);
      __builtin_prefetch(from + kPackedTogether * task.b_stride + 16, 0, 2);
      store(panel, load_up_to(from, left));
      store(panel + 16, load_up_to(from + 16, right));
    }
    return;
  }
  if (columns < kPanelColumns) memset(panel, 0, depth * kPanelColumns * sizeof(float));
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
      if (task.b_layout == GemmB::kTransposedPanels && i == 0) {
        for (size_t line = 0; line < 32; line++) {
          __builtin_prefetch(from + (j + kPrefetchedColumns) * stride + line * 16, 0, 2);
        }
      }
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
  // In the order in which the source lies in memory.
  size_t together = depth;
  if (task.b_layout == GemmB::kDepth) together = kPackedTogether;
  if (task.b_layout == GemmB::kTransposedPanels) together = kPanelColumns;
  for (size_t i = 0; i < depth; i += together) {
    for (size_t j = 0; j < columns; j += kPanelColumns) {
      pack_columns(task, k + i, smaller(together, depth - i), column + j,
                   smaller(kPanelColumns, columns - j),
                   scratch + j / kPanelColumns * stride + i * kPanelColumns);
    }
  }
  return {scratch, stride};
}

// A block of C for one block of k, with A packed or read in place.
struct Block {
  const GemmTask& task;
  const Groups& groups;
  size_t row;
  size_t column, columns;
  size_t k, depth;
  const float* packed_a;  // null where A is read in place
  Panels panels;
};

inline void multiply_group(const Block& block, size_t group, size_t column) {
  const GemmTask& task = block.task;
  const size_t begin = block.groups.begin[group], height = block.groups.height(group);
  const size_t width = smaller(kPanelColumns, block.columns - column);
  MicroTile tile;
  tile.depth = block.depth;
  tile.a = block.packed_a
               ? RowsOfA{block.packed_a + begin * block.depth, 0}
               : RowsOfA{task.a + (block.row + begin) * task.a_stride + block.k, task.a_stride};
  tile.b = block.panels.data + column / kPanelColumns * block.panels.stride;
  tile.c = task.c + (block.row + begin) * task.c_stride + block.column + column;
  tile.c_stride = task.c_stride;
  tile.from_zero = block.k == 0 && !task.accumulate;
  // The first two row groups of a panel bring one half each of the next panel.
  tile.next_b = tile.b;
  if (group < 2 && column + kPanelColumns < block.columns) {
    tile.next_b += block.panels.stride + group * block.depth * 16;
  }
  if (block.depth <= kShallow) {
    tile.next_c = column + kPanelColumns < block.columns ? tile.c + kPanelColumns : tile.c;
  } else {
    tile.next_c = group + 1 < block.groups.count ? tile.c + height * task.c_stride : tile.c;
  }
  multiply_panel(tile, height, width, block.packed_a != nullptr);
}

void multiply_block(const Block& block) {
  if (block.depth <= kShallow) {
    // C is most of the traffic: in the order in which it lies in memory.
    for (size_t group = 0; group < block.groups.count; group++) {
      for (size_t j = 0; j < block.columns; j += kPanelColumns) multiply_group(block, group, j);
    }
    return;
  }
  for (size_t j = 0; j < block.columns; j += kPanelColumns) {
    for (size_t group = 0; group < block.groups.count; group++) multiply_group(block, group, j);
  }
}

void gemm_tile(const GemmTask& task, const GemmTile& tile) {
  for (size_t column = tile.column_begin; column < tile.column_end; column += kBlockColumns) {
    const size_t columns = smaller(kBlockColumns, tile.column_end - column);
    const bool is_packed =
        task.a_layout == GemmA::kDepth || task.alpha != 1.0f || columns > kUnpackedColumns;
    for (size_t k = 0; k < task.k; k += kBlockDepth) {
      const size_t depth = smaller(kBlockDepth, task.k - k);
      const Panels panels =
          panels_of(task, k, depth, column, columns, tile.scratch + kGemmScratchA);
      for (size_t row = tile.row_begin; row < tile.row_end; row += kBlockRows) {
        const Groups groups(smaller(kBlockRows, tile.row_end - row));
        if (is_packed) pack_rows(task, row, groups, k, depth, tile.scratch);
        const float* packed_a = is_packed ? tile.scratch : nullptr;
        multiply_block({task, groups, row, column, columns, k, depth, packed_a, panels});
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
