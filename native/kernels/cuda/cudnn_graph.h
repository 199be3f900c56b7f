// One attention of cuDNN, built for a shape: what cudnn_graph.cc makes of the frontend's headers,
// which nothing else includes (they compile for minutes).
#pragma once
#include <cudnn.h>
#include <stdint.h>

#include <array>
#include <memory>
#include <string>

namespace tunemesh::cuda {

// All that a plan depends on. Strides are of tokens, in elements.
//   dense   `batch` documents of `length` tokens each, one after another
//   ragged  up to `batch` documents of up to `length` tokens, total_tokens in all; their lengths
//           and where their rows begin come with each run
struct AttentionShape {
  bool backward = false, ragged = false;
  bool is_free = false;  // backward: sums in whatever order is fastest
  int64_t batch = 0, length = 0, total_tokens = 0;
  int64_t num_heads = 0, num_kv_heads = 0, head_size = 0;
  int64_t window = 0;  // 0: none
  float scale = 0;
  int64_t lse_stride = 0;  // heads in a row of the log-sum-exps
  int64_t q_stride = 0, k_stride = 0, v_stride = 0, out_stride = 0;
  int64_t dout_stride = 0, dq_stride = 0, dk_stride = 0, dv_stride = 0;  // backward only

  bool operator==(const AttentionShape&) const = default;
};

enum class AttentionTensor { kQ, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv };
inline constexpr size_t kAttentionTensors = 9;

struct AttentionPointers {
  // By AttentionTensor; the last four in the backward only. Lse of the dense backward is
  // [batch, heads, length], everywhere else token-major.
  std::array<void*, kAttentionTensors> tensors = {};
  // Ragged only: [batch + 1] int32 for each tensor, in its elements; [batch] int32.
  std::array<void*, kAttentionTensors> offsets = {};
  void* lengths = nullptr;
};

class CudnnGraph {
 public:
  // Null, and one line in `why`, where this cuDNN or this card does not serve the shape.
  static std::unique_ptr<CudnnGraph> build(cudnnHandle_t handle, const AttentionShape& shape,
                                           std::string* why);
  ~CudnnGraph();
  CudnnGraph(const CudnnGraph&) = delete;
  CudnnGraph& operator=(const CudnnGraph&) = delete;

  size_t workspace_bytes() const { return workspace_bytes_; }
  // Empty, or what went wrong.
  std::string run(cudnnHandle_t handle, const AttentionPointers& pointers, void* workspace) const;

 private:
  struct Frontend;
  explicit CudnnGraph(const AttentionShape& shape);

  AttentionShape shape_;
  std::unique_ptr<Frontend> frontend_;
  size_t workspace_bytes_ = 0;
};

}  // namespace tunemesh::cuda
