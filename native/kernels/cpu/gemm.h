// Matrix products on the CPU: C[m, n] (+)= alpha A[m, k] B[k, n], float32.
//
//   order    each element of C is one fma chain over k ascending, from 0 or from C: blocks of k go
//            through C in memory, and work is split over rows and columns only, so neither the
//            blocking, the thread count nor the instruction path changes a bit. alpha multiplies
//            A's elements, rounded, before the chain.
//   panels   B is read in panels of 32 columns, [k][32], the last one padded with zeros. A packed
//            weight is exactly this, all panels one after another, for B = w^T: the same bytes for
//            every path, so one mapped file serves them all.
//   scratch  kGemmScratchFloats for each thread, from the context; a call allocates nothing.
//   floor    2 m n k flops; bytes of A, B, C once. What is packed on the fly costs a copy of A for
//            each tile's columns and of B for each tile's rows.
//   source   Goto, van de Geijn: Anatomy of high-performance matrix multiplication, 2008
#pragma once
#include <stddef.h>

#include "kernels/cpu/dispatch.h"

namespace tunemesh {

constexpr size_t kPanelColumns = 32;

// Blocking, chosen by bench/results/2026-11-24_cpu-gemm.md. kBlockDepth is a multiple of 32.
constexpr size_t kBlockRows = 192;      // rows of A packed at a time
constexpr size_t kBlockDepth = 384;     // k at a time
constexpr size_t kBlockColumns = 1024;  // columns of B packed at a time
constexpr size_t kGemmScratchA = kBlockRows * (kBlockDepth + 16) + 64;
constexpr size_t kGemmScratchFloats = kGemmScratchA + kBlockDepth * kBlockColumns;

enum class GemmA {
  kRows,   // (m, k) at a[m * stride + k]
  kDepth,  // (m, k) at a[k * stride + m]
};

enum class GemmB {
  kPanels,            // a packed weight, read as it is
  kDepth,             // (k, n) at b[k * stride + n]
  kColumns,           // (k, n) at b[n * stride + k]
  kTransposedPanels,  // (k, n) where n is the packed weight's inner index, k its column
};

struct GemmTask {
  size_t m, n, k;
  const float* a;
  size_t a_stride;
  GemmA a_layout;
  const float* b;
  size_t b_stride;  // kPanels, kTransposedPanels: the packed weight's inner size
  GemmB b_layout;
  float* c;
  size_t c_stride;
  bool is_c_transposed;  // (m, n) at c[n * c_stride + m]
  float alpha;           // multiplies A
  float b_scale;         // multiplies B; read for GemmB::kDepth only
  bool accumulate;
};

// A rectangle of C and the scratch of the thread that computes it.
struct GemmTile {
  size_t row_begin, row_end;
  size_t column_begin, column_end;  // column_begin is a multiple of kPanelColumns
  float* scratch;
};

TmStatus linear_forward(TmContext* context, const TmLinear* args);
TmStatus linear_backward_input(TmContext* context, const TmLinear* args);
TmStatus linear_weight_grad(TmContext* context, const TmLinearWeightGrad* args);
size_t packed_weight_floats(size_t out, size_t in);
TmStatus pack_weight(TmContext* context, const float* rows, size_t out, size_t in, float* packed);

}  // namespace tunemesh
