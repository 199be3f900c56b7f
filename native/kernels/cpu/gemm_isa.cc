// Packing and blocking of the matrix products (gemm.h), once for each instruction path.
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_micro.h"
#include "kernels/cpu/gemm_transpose.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

// Rows of a group in a product of more than 16 columns.
constexpr size_t kRowGroup = kWholePanelRows > 3 ? kWholePanelRows : kHalfPanelRows;
constexpr size_t kShortestGroup = 4;
static_assert(kRowGroup >= kShortestGroup);

// Up to this many columns, a row of A is read too few times to be worth transposing.
constexpr size_t kNarrowColumns = 64;
constexpr size_t kCopiedRowStride = kBlockDepth + 16;  // rows in different sets of the cache

// Up to this depth, C is read and written more than A and B.
constexpr size_t kShallow = 64;

// Rows of a k-major source that are packed side by side, so that it is read in long stretches.
constexpr size_t kPackedTogether = 8;

constexpr size_t kPrefetchedColumns = 32;  // of a packed weight, ahead of the one being transposed

// Rows dealt evenly to groups: 13 rows are 7 + 6, not 12 + 1.
struct Groups {
  size_t count;
  size_t begin[kBlockRows / kShortestGroup + 1];  // and the end of the last one

  Groups(size_t rows, size_t tallest) : count((rows + tallest - 1) / tallest) {
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
    const Vec16 scale = set1(task.b_scale);
    const float* from = task.b + k * task.b_stride + column;
    for (size_t i = 0; i < depth; i++, from += task.b_stride, panel += kPanelColumns) {
      __builtin_prefetch(from + kPackedTogether * task.b_stride, 0, 2);
      __builtin_prefetch(from + kPackedTogether * task.b_stride + 16, 0, 2);
      store(panel, load_up_to(from, left) * scale);
      store(panel + 16, load_up_to(from + 16, right) * scale);
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

// How the kernels see the rows of A in one block.
enum class ViewOfA {
  kPacked,   // [k][rows] of each group
  kCopied,   // the rows of one group at a time, multiplied by alpha
  kInPlace,  // the caller's matrix
};

// Narrow products read an element of A too few times to be worth packing.
ViewOfA choose_view(const GemmTask& task, size_t columns) {
  if (task.a_layout == GemmA::kDepth) {
    return columns <= kPanelColumns && task.alpha == 1.0f ? ViewOfA::kInPlace : ViewOfA::kPacked;
  }
  if (columns > kNarrowColumns) return ViewOfA::kPacked;
  return task.alpha == 1.0f ? ViewOfA::kInPlace : ViewOfA::kCopied;
}

// A block of C for one block of k.
struct Block {
  const GemmTask& task;
  const Groups& groups;
  size_t row;
  size_t column, columns;
  size_t k, depth;
  ViewOfA view;
  float* a;  // packed or copied
  Panels panels;
};

inline void set_rows_of_a(const Block& block, size_t group, MicroTile& tile) {
  const GemmTask& task = block.task;
  const size_t begin = block.groups.begin[group];
  tile.a_row_step = 1;
  tile.a_depth_step = 1;
  if (block.view == ViewOfA::kPacked) {
    tile.a = block.a + begin * block.depth;
    tile.a_depth_step = block.groups.height(group);
  } else if (block.view == ViewOfA::kCopied) {
    tile.a = block.a;
    tile.a_row_step = kCopiedRowStride;
  } else if (task.a_layout == GemmA::kRows) {
    tile.a = task.a + (block.row + begin) * task.a_stride + block.k;
    tile.a_row_step = task.a_stride;
  } else {
    tile.a = task.a + block.k * task.a_stride + block.row + begin;
    tile.a_depth_step = task.a_stride;
  }
}

inline void multiply_group(const Block& block, size_t group, size_t column) {
  const GemmTask& task = block.task;
  const size_t begin = block.groups.begin[group], height = block.groups.height(group);
  const size_t row = block.row + begin, c_column = block.column + column;
  MicroTile tile;
  tile.depth = block.depth;
  set_rows_of_a(block, group, tile);
  tile.b = block.panels.data + column / kPanelColumns * block.panels.stride;
  tile.c = task.c +
           (task.is_c_transposed ? c_column * task.c_stride + row : row * task.c_stride + c_column);
  tile.c_stride = task.c_stride;
  tile.from_zero = block.k == 0 && !task.accumulate;
  tile.next = tile.b;
  tile.next_step = 16;
  if (block.view == ViewOfA::kInPlace && task.a_layout == GemmA::kDepth) {
    tile.next = tile.a + kPackedTogether * task.a_stride;
    tile.next_step = task.a_stride;
  } else if (group < 2 && column + kPanelColumns < block.columns) {
    // The first two row groups of a panel bring one half each of the next panel.
    tile.next += block.panels.stride + group * block.depth * 16;
  }
  if (block.depth <= kShallow) {
    tile.next_c = column + kPanelColumns < block.columns ? tile.c + kPanelColumns : tile.c;
  } else {
    tile.next_c = group + 1 < block.groups.count ? tile.c + height * task.c_stride : tile.c;
  }
  multiply_panel(tile, height, smaller(kPanelColumns, block.columns - column),
                 task.is_c_transposed);
}

// Copies alpha * A of one group, row after row, into the first level of the cache.
void copy_group(const Block& block, size_t group) {
  const GemmTask& task = block.task;
  const Vec16 alpha = set1(task.alpha);
  const float* from = task.a + (block.row + block.groups.begin[group]) * task.a_stride + block.k;
  float* to = block.a;
  for (size_t r = 0; r < block.groups.height(group); r++) {
    size_t i = 0;
    for (; i + 16 <= block.depth; i += 16) store(to + i, load(from + i) * alpha);
    if (i < block.depth) store(to + i, load_tail(from + i, block.depth - i) * alpha);
    from += task.a_stride;
    to += kCopiedRowStride;
  }
}

void multiply_block(const Block& block) {
  const size_t num_groups = block.groups.count;
  if (block.depth <= kShallow || block.view == ViewOfA::kCopied) {
    // Shallow: C is most of the traffic, so take it in the order in which it lies in memory.
    for (size_t group = 0; group < num_groups; group++) {
      if (block.view == ViewOfA::kCopied) copy_group(block, group);
      for (size_t j = 0; j < block.columns; j += kPanelColumns) multiply_group(block, group, j);
    }
    return;
  }
  for (size_t j = 0; j < block.columns; j += kPanelColumns) {
    for (size_t group = 0; group < num_groups; group++) multiply_group(block, group, j);
  }
}

void gemm_tile(const GemmTask& task, const GemmTile& tile) {
  for (size_t column = tile.column_begin; column < tile.column_end; column += kBlockColumns) {
    const size_t columns = smaller(kBlockColumns, tile.column_end - column);
    const ViewOfA view = choose_view(task, columns);
    const size_t tallest = columns <= 16 ? size_t{kHalfPanelRows} : kRowGroup;
    for (size_t k = 0; k < task.k; k += kBlockDepth) {
      const size_t depth = smaller(kBlockDepth, task.k - k);
      const Panels panels =
          panels_of(task, k, depth, column, columns, tile.scratch + kGemmScratchA);
      for (size_t row = tile.row_begin; row < tile.row_end; row += kBlockRows) {
        const Groups groups(smaller(kBlockRows, tile.row_end - row), tallest);
        if (view == ViewOfA::kPacked) pack_rows(task, row, groups, k, depth, tile.scratch);
        multiply_block({task, groups, row, column, columns, k, depth, view, tile.scratch, panels});
      }
    }
  }
}

void pack_panel(const float* rows, size_t num_rows, size_t in, float* panel) {
  GemmTask task{};
  task.b = rows;
  task.b_stride = in;
  task.b_layout = GemmB::kColumns;
  task.b_scale = 1.0f;
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
