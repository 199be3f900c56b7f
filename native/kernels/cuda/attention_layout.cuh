// What cuDNN's attention needs beside its own kernels (attention_cudnn.cc).
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace tunemesh::cuda {

inline constexpr int kRaggedTensors = 9;

// Where the rows of a chunk's documents begin in each tensor, from the chunk's first row on, and
// the documents' lengths. Of the `batch` documents of a plan those beyond num_documents are empty
// and lie at the end.
//   offsets[t][i] = (starts[min(i, num_documents)] - starts[0]) * strides[t]   i <= batch
//   lengths[i] = starts[i + 1] - starts[i], 0 beyond                           i < batch
struct RaggedTables {
  const int32_t* starts;  // [num_documents + 1], the chunk's
  int num_documents, batch;
  int32_t strides[kRaggedTensors];
  int32_t* offsets[kRaggedTensors];  // [batch + 1] each
  int32_t* lengths;                  // [batch]
};
void fill_ragged_tables(const RaggedTables& tables, cudaStream_t stream);

// Log-sum-exps from token-major rows to [documents, heads, length].
struct HeadMajorLse {
  const float* rows;  // [documents * length, stride]
  size_t stride;
  float* out;
  size_t documents, heads, length;
};
void make_head_major(const HeadMajorLse& args, cudaStream_t stream);

// *flag = 1 where any bf16 of [n, width] rows is not zero (or is no number), else left.
struct NonzeroSearch {
  const void* rows;
  size_t n, width, stride;
  uint32_t* flag;
};
void find_nonzero(const NonzeroSearch& args, cudaStream_t stream);

}  // namespace tunemesh::cuda
