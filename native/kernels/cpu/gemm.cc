#include "kernels/cpu/gemm.h"

#include <string.h>

#include <algorithm>

namespace tunemesh {
namespace {

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// What bringing one element to the micro-kernel costs, in multiply-adds of the same core: A once
// for each tile of columns, B once for each tile of rows. Rough, from the benchmark of gemm.h.
double reading_cost(GemmA layout) { return layout == GemmA::kRows ? 16.0 : 10.0; }
double reading_cost(GemmB layout) {
  switch (layout) {
    case GemmB::kPanels:
      return 8.0;
    case GemmB::kDepth:
      return 10.0;
    case GemmB::kColumns:
    case GemmB::kTransposedPanels:
      break;
  }
  return 24.0;
}

constexpr double kTileCost = 30e3;    // of starting a tile
constexpr double kUnevenness = 0.05;  // of a thread that is not helped by others

struct TileSize {
  size_t rows, columns;
};

// Cuts C into the tiles that the estimate likes best: full threads, little repeated packing, and a
// few tiles for each thread where that is cheap, so that a thread that lost its core is made up
// for.
TileSize choose_tiles(const GemmTask& task, size_t num_threads, size_t row_group) {
  if (num_threads == 1 || task.m * task.n * task.k < 64 * 1024) return {task.m, task.n};
  const size_t max_tiles = 8 * num_threads;
  const size_t num_row_groups = divide_up(task.m, row_group);
  const size_t num_panels = divide_up(task.n, kPanelColumns);
  TileSize best{task.m, task.n};
  double best_cost = 1e300;
  for (size_t i = 1; i <= std::min(max_tiles, num_row_groups); i++) {
    const size_t rows = divide_up(num_row_groups, i) * row_group;
    for (size_t j = 1; i * j <= max_tiles && j <= num_panels; j++) {
      const size_t columns = divide_up(num_panels, j) * kPanelColumns;
      const size_t num_tiles = divide_up(task.m, rows) * divide_up(task.n, columns);
      const double rounds = static_cast<double>(divide_up(num_tiles, num_threads));
      const double work = static_cast<double>(rows * columns) +
                          reading_cost(task.a_layout) * static_cast<double>(rows) +
                          reading_cost(task.b_layout) * static_cast<double>(columns);
      const double cost =
          rounds * (work * static_cast<double>(task.k) + kTileCost) * (1.0 + kUnevenness / rounds);
      if (cost < best_cost) {
        best_cost = cost;
        best = {rows, columns};
      }
    }
  }
  return best;
}

void multiply(TmContext* context, const GemmTask& task) {
  if (task.m == 0 || task.n == 0) return;
  if (task.k == 0) {
    const size_t rows = task.is_c_transposed ? task.n : task.m;
    const size_t columns = task.is_c_transposed ? task.m : task.n;
    for (size_t i = 0; i < rows && !task.accumulate; i++) {
      memset(task.c + i * task.c_stride, 0, columns * sizeof(float));
    }
    return;
  }
  const CpuKernels& kernels = context->kernels;
  const size_t num_threads = static_cast<size_t>(context->pool.num_threads());
  // Tiles of a narrow product end on whole cache lines of a k-major A.
  const size_t row_unit = task.n <= 16 ? 48 : kernels.gemm_row_group;
  const TileSize size = choose_tiles(task, num_threads, row_unit);
  const size_t tiles_across = divide_up(task.n, size.columns);
  const size_t num_tiles = divide_up(task.m, size.rows) * tiles_across;
  context->pool.parallel_for(num_tiles, [&](size_t index, int thread) {
    GemmTile tile;
    tile.row_begin = index / tiles_across * size.rows;
    tile.row_end = std::min(tile.row_begin + size.rows, task.m);
    tile.column_begin = index % tiles_across * size.columns;
    tile.column_end = std::min(tile.column_begin + size.columns, task.n);
    tile.scratch = context->gemm_scratch + static_cast<size_t>(thread) * kGemmScratchFloats;
    kernels.gemm_tile(task, tile);
  });
}

TmStatus check_linear(const char* name, const TmLinear& args) {
  if (!args.w.rows && !args.w.packed) {
    return fail(TM_BAD_ARGUMENT, "%s: the weight has neither rows nor packed panels", name);
  }
  if (args.x_stride < args.w.in || args.y_stride < args.w.out) {
    return fail(TM_BAD_ARGUMENT, "%s: strides %zu and %zu are below the sizes in %zu and out %zu",
                name, args.x_stride, args.y_stride, args.w.in, args.w.out);
  }
  return TM_OK;
}

}  // namespace

TmStatus linear_forward(TmContext* context, const TmLinear* args) {
  if (TmStatus status = check_linear("linear_forward", *args)) return status;
  const TmWeight& w = args->w;
  GemmTask task{};
  task.m = args->n;
  task.n = w.out;
  task.k = w.in;
  task.a = args->x;
  task.a_stride = args->x_stride;
  task.a_layout = GemmA::kRows;
  task.b = w.packed ? w.packed : w.rows;
  task.b_stride = w.in;
  task.b_layout = w.packed ? GemmB::kPanels : GemmB::kColumns;
  task.c = args->y;
  task.c_stride = args->y_stride;
  task.alpha = args->alpha;
  task.b_scale = 1.0f;
  task.accumulate = args->accumulate != 0;
  multiply(context, task);
  return TM_OK;
}

TmStatus linear_backward_input(TmContext* context, const TmLinear* args) {
  if (TmStatus status = check_linear("linear_backward_input", *args)) return status;
  const TmWeight& w = args->w;
  GemmTask task{};
  task.m = args->n;
  task.n = w.in;
  task.k = w.out;
  task.a = args->y;
  task.a_stride = args->y_stride;
  task.a_layout = GemmA::kRows;
  task.b = w.rows ? w.rows : w.packed;
  task.b_stride = w.in;
  task.b_layout = w.rows ? GemmB::kDepth : GemmB::kTransposedPanels;
  task.c = const_cast<float*>(args->x);
  task.c_stride = args->x_stride;
  task.alpha = args->alpha;
  task.b_scale = 1.0f;
  task.accumulate = args->accumulate != 0;
  multiply(context, task);
  return TM_OK;
}

TmStatus linear_weight_grad(TmContext* context, const TmLinearWeightGrad* args) {
  if (args->x_stride < args->in || args->dy_stride < args->out) {
    return fail(TM_BAD_ARGUMENT,
                "linear_weight_grad: strides %zu and %zu are below the sizes in %zu and out %zu",
                args->x_stride, args->dy_stride, args->in, args->out);
  }
  GemmTask task{};
  task.k = args->n;
  task.a_layout = GemmA::kDepth;
  task.b_layout = GemmB::kDepth;
  task.c = static_cast<float*>(args->dw);
  task.c_stride = args->in;
  task.accumulate = args->accumulate != 0;
  // A low, wide gradient is computed as its transpose, so that the long side is the one read in
  // place. A product's factors may change sides: fma(a, b, c) = fma(b, a, c).
  task.is_c_transposed = args->out <= kPanelColumns && args->in > args->out;
  if (task.is_c_transposed) {
    task.m = args->in;
    task.n = args->out;
    task.a = args->x;
    task.a_stride = args->x_stride;
    task.b = args->dy;
    task.b_stride = args->dy_stride;
  } else {
    task.m = args->out;
    task.n = args->in;
    task.a = args->dy;
    task.a_stride = args->dy_stride;
    task.b = args->x;
    task.b_stride = args->x_stride;
  }
  task.alpha = task.is_c_transposed ? 1.0f : args->alpha;
  task.b_scale = task.is_c_transposed ? args->alpha : 1.0f;
  multiply(context, task);
  return TM_OK;
}

size_t packed_weight_floats(size_t out, size_t in) {
  return divide_up(out, kPanelColumns) * kPanelColumns * in;
}

TmStatus pack_weight(TmContext* context, const float* rows, size_t out, size_t in, float* packed) {
  context->pool.parallel_for(divide_up(out, kPanelColumns), [&](size_t panel, int) {
    const size_t first = panel * kPanelColumns;
    context->kernels.pack_panel(rows + first * in, std::min(kPanelColumns, out - first), in,
                                packed + first * in);
  });
  return TM_OK;
}

}  // namespace tunemesh
