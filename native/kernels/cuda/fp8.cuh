// Rows of elements as e4m3 numbers with a scale each (kernels/elements.h, TmQuantiseRows), and what
// else the fp8 groups need beside their products; Element float or bfloat16 (s bytes).
//
//   quantise_rows  q[i, j] = e4m3(x[i, j] * 448 / largest_i), scales[i] = largest_i / 448: the same
//                  bits as on the CPU. A row of up to 32,768 numbers is read once: its chunks stay
//                  in registers between maximum and rounding
//   transpose      to[j, i] = from[i, j]; once a load, for the weights' second layout
//   add_to_rows    y[i, j] += residual[i, j] + bias[j], rounded once; either may be null
//
//   shapes  x [n, c] in rows of x_stride, q [n, c] dense, scales f32 [n]
//   launch  quantise_rows: a warp a row up to 1,024 numbers, else a block of 256
//   floor   quantise_rows n c (s + 1) bytes; add_to_rows 3 s n c
//   order   a maximum has no order; every element has one owner
//   source  OCP 8-bit Floating Point Specification 1.0 (E4M3); cards convert by instruction
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

template <typename Element>
void quantise_rows(const TmQuantiseRows& args, cudaStream_t stream);

template <typename Element>
struct Transpose {
  const Element* from;  // [rows, columns] in rows of `stride`
  size_t stride, rows, columns;
  Element* to;  // [columns, rows] dense
};
template <typename Element>
void transpose(const Transpose<Element>& args, cudaStream_t stream);

template <typename Element>
struct AddToRows {
  Element* y;
  size_t y_stride;  // [n, c]
  const Element* residual;
  size_t residual_stride;
  const Element* bias;  // [c]
  size_t n, c;
};
template <typename Element>
void add_to_rows(const AddToRows<Element>& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
