// Gradients of a group's adapters (TmGroupAdapterGrads of kernels/backend.h) with bf16 rows, all in
// two launches. Each is a product of a wide matrix and one of few columns, summed over tokens:
//   product[w, r] = sum_n wide[n, w] narrow[n, r]
//   dB of a part   wide dy's columns of the part, narrow the part's tail of x
//   dA of all      wide x, narrow the tails of dy
//
//   shapes  wide [n, width], narrow [n, ranks] in rows of their strides; results f32, overwritten
//           or added to: [width, ranks] (dB), or for each part [part_ranks, width] (dA)
//   launch  products: a block of 4 warps for a tile of 128 x 64 and a span of tokens, 3 stages of
//           32 tokens through shared memory (39 KB); mma.m16n8k16. Sums: a thread an element
//   needs   strides and first columns multiples of 8 elements, pointers of 16 bytes, width and
//           ranks multiples of 8, and the partial sums' memory: adapter_grads_fit()
//   order   tokens ascending in steps of 16 within a span (the tensor cores' own order within a
//           step), spans ascending. Spans follow from the shapes alone
//   memory  partial sums f32 [spans, ranks, width] in the products' workspace
//   floor   2 n (sum of widths and ranks) bytes; x is read once for all parts
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

struct AdapterProduct {
  const Bfloat16* wide;
  const Bfloat16* narrow;
  size_t wide_stride, narrow_stride;
  unsigned width, ranks;
  float* to[TM_GROUP_PARTS];  // of each part; dB: the first alone
  unsigned part_ranks;        // dA: ranks of a part. 0: dB
  // Filled in by the launch.
  unsigned num_tiles;
  size_t first_partial;  // floats
};

constexpr int kMostAdapterProducts = TM_GROUP_PARTS + 1;

struct AdapterProducts {
  AdapterProduct at[kMostAdapterProducts];
  int count = 0;
  size_t n;
  float* partials;
  size_t num_partials;  // floats that there is room for
  bool accumulate;      // the spans' sum is added to what is there
  // Filled in by the launch.
  unsigned num_spans, span_tokens;
};

// False where a product has not the form that the kernel needs, or the partial sums no room.
bool adapter_grads_fit(const AdapterProducts& products);
void adapter_grads(AdapterProducts products, cudaStream_t stream);

}  // namespace tunemesh::cuda
