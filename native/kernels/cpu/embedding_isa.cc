// Rows and columns: embedding gradient, scatter, bias, elementwise addition. (What only copies rows
// is in ops_table.cc.)
//   scatter_rows_add  out[rows[i], c] += x[i, c]     bias_grad_add  dbias[c] += sum_n dy[n, c]
//
//   order   one chain per column over ascending n from the old value; no fma
//   tasks   columns, so that a row that occurs twice is added to by one thread
//   floor   12 bytes an element: bound by memory
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

void scatter_rows_add(const ScatterRows& a, Range columns) {
  for (size_t i = 0; i < a.n; ++i) {
    const float* x = a.x + i * a.c;
    float* out = a.out + static_cast<size_t>(a.rows[i]) * a.c;
    for (size_t j = columns.begin; j < columns.end; j += 16) {
      const size_t left = columns.end - j;
      store_up_to(out + j, load_up_to(out + j, left) + load_up_to(x + j, left), left);
    }
  }
}

void bias_add(const Bias& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    float* y = a.y + i * a.stride;
    for (size_t j = 0; j < a.c; j += 16) {
      const size_t left = a.c - j;
      store_up_to(y + j, load_up_to(y + j, left) + load_up_to(a.bias + j, left), left);
    }
  }
}

void bias_grad_add(const Bias& a, Range columns) {
  for (size_t j = columns.begin; j < columns.end; j += 16) {
    const size_t left = columns.end - j;
    Vec16 s = load_up_to(a.dbias + j, left);
    for (size_t i = 0; i < a.n; ++i) s = s + load_up_to(a.dy + i * a.stride + j, left);
    store_up_to(a.dbias + j, s, left);
  }
}

void add_elements(const AddElements& a, Range elements) {
  for (size_t i = elements.begin; i < elements.end; i += 16) {
    const size_t left = elements.end - i;
    store_up_to(a.y + i, load_up_to(a.y + i, left) + load_up_to(a.x + i, left), left);
  }
}

}  // namespace

void register_embedding(OpsKernels& kernels) {
  kernels.scatter_rows_add = scatter_rows_add;
  kernels.bias_add = bias_add;
  kernels.bias_grad_add = bias_grad_add;
  kernels.add = add_elements;
}

}  // namespace TM_ISA
}  // namespace tunemesh
