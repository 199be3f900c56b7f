// Rows taken from a table and added back to one.
//   gather   out[i,c] = table[rows[i],c]
//   scatter  out[rows[i],c] += x[i,c]
//
//   shapes  table, out [height, c] resp. x, out [n, c], row-major and dense; rows [n] on the device
//   launch  gather: grid n, block 256. scatter: grid (n, columns), block 128, a chunk of 16 bytes a
//           thread; the block of a row's first occurrence adds all of them, the others end
//   types   a table of floats may be gathered into bfloat16, rows of bfloat16 added to floats;
//           scatter's sums are float, rounded once where the result is bfloat16
//   faults  an index outside [0, height) is recorded and its row left out
//   order   scatter: each element one chain of additions from the old value, positions ascending,
//           as on the CPU to the bit; no float atomics
//   floor   gather 2 s n c bytes (s bytes an element); scatter s n c + 2 s (rows touched) c bytes
//   memory  with scratch of 2 height integers two more kernels note where each row occurs first and
//           how often, so that only blocks of rows that occur again look for them; without it each
//           block compares its index with all others, n^2 comparisons from the second-level cache
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/fault.cuh"

namespace tunemesh::cuda {

struct RowIndices {
  const int32_t* rows;
  size_t n, height;
  FaultOperation operation;
  DeviceFault* fault;
};
template <typename From, typename To>
struct GatherRows {
  RowIndices indices;
  const From* table;
  size_t c;
  To* out;
};
template <typename From, typename To>
struct ScatterRows {
  RowIndices indices;
  const From* x;
  size_t c;
  To* out;
};
template <typename From, typename To>
void gather_rows(const GatherRows<From, To>& args, cudaStream_t stream);
template <typename From, typename To>
void scatter_rows_add(const ScatterRows<From, To>& args, cudaStream_t stream);
template <typename From, typename To>
void scatter_rows_add(const ScatterRows<From, To>& args, const Scratch& scratch,
                      cudaStream_t stream);

}  // namespace tunemesh::cuda
