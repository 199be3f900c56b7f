// Rows of a matrix to rows of another stride.
//
//   place_rows  floats to elements, several matrices at once: to[i, j] = from[i, j], rounded to
//               nearest even. A chunk of 16 bytes a thread and turn; grid (blocks, matrices)
//   copy_rows   bytes as they are; 16 a thread where everything is aligned, else one
//
//   floor   what is read and written once
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

constexpr int kMostPlaced = 3 * TM_GROUP_PARTS + TM_GROUP_PARTS;

template <typename Element>
struct PlacedRows {
  const float* from;  // [rows, columns]
  Element* to;
  size_t to_stride, rows, columns;
};
template <typename Element>
struct PlaceRows {
  PlacedRows<Element> at[kMostPlaced];
  int count = 0;
  void add(const PlacedRows<Element>& rows) {
    if (rows.from != nullptr && rows.rows * rows.columns > 0) at[count++] = rows;
  }
};

template <typename Element>
void place_rows(const PlaceRows<Element>& args, cudaStream_t stream);
void copy_rows(const TmCopyRows& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
