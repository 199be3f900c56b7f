#include "kernels/cuda/cudnn_graph.h"

#include <cudnn_frontend.h>

#include <unordered_map>
#include <utility>
#include <vector>

namespace tunemesh::cuda {
namespace {

namespace fe = cudnn_frontend;
using Tensor = std::shared_ptr<fe::graph::Tensor_attributes>;

constexpr size_t kForwardTensors = 5;
constexpr int64_t kOffsetUid = 100, kQueryLengthsUid = 200, kKeyLengthsUid = 201;

int64_t uid_of(AttentionTensor tensor) { return 1 + static_cast<int64_t>(tensor); }

// Builds one graph; each tensor's uid is uid_of() and its ragged offset's kOffsetUid beyond that.
class Builder {
 public:
  Builder(fe::graph::Graph& graph, const AttentionShape& shape) : graph_(graph), shape_(shape) {}

  Tensor input(AttentionTensor which, int64_t heads, int64_t stride) {
    Tensor tensor = graph_.tensor(fe::graph::Tensor_attributes());
    shape_rows(tensor, {which, heads, stride, shape_.head_size});
    return tensor;
  }

  void output(const Tensor& tensor, AttentionTensor which, int64_t heads, int64_t stride) {
    shape_rows(tensor, {which, heads, stride, shape_.head_size});
    tensor->set_output(true);
  }

  // Log-sum-exps, one float for a head: token-major but for the dense backward (cuDNN before 9.26
  // reads those only as [batch, heads, length]).
  void shape_lse(const Tensor& tensor) {
    const AttentionShape& s = shape_;
    if (s.backward && !s.ragged) {
      tensor->set_uid(uid_of(AttentionTensor::kLse))
          .set_dim({s.batch, s.num_heads, s.length, 1})
          .set_stride({s.num_heads * s.length, s.length, 1, 1});
    } else {
      shape_rows(tensor, {AttentionTensor::kLse, s.num_heads, s.lse_stride, 1});
    }
    tensor->set_data_type(fe::DataType_t::FLOAT);
  }

  Tensor lse_input() {
    Tensor tensor = graph_.tensor(fe::graph::Tensor_attributes());
    shape_lse(tensor);
    return tensor;
  }

  Tensor lengths(int64_t uid) { return counts(uid, shape_.batch); }

 private:
  struct Rows {
    AttentionTensor which;
    int64_t heads, stride, width;
  };

  void shape_rows(const Tensor& tensor, const Rows& rows) {
    tensor->set_uid(uid_of(rows.which))
        .set_dim({shape_.batch, rows.heads, shape_.length, rows.width})
        .set_stride({shape_.length * rows.stride, rows.width, rows.stride, 1});
    if (shape_.ragged) {
      tensor->set_ragged_offset(counts(kOffsetUid + uid_of(rows.which), shape_.batch + 1));
    }
  }

  Tensor counts(int64_t uid, int64_t count) {
    return graph_.tensor(fe::graph::Tensor_attributes()
                             .set_uid(uid)
                             .set_dim({count, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT32));
  }

  fe::graph::Graph& graph_;
  const AttentionShape& shape_;
};

// What the forward and the backward share.
template <typename Options>
void set_options(Options& options, const AttentionShape& shape, Builder& builder) {
  options.set_attn_scale(shape.scale)
      .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
      .set_diagonal_band_right_bound(0);
  if (shape.window > 0) options.set_diagonal_band_left_bound(static_cast<int>(shape.window));
  if (!shape.ragged) return;
  options.set_padding_mask(true)
      .set_seq_len_q(builder.lengths(kQueryLengthsUid))
      .set_seq_len_kv(builder.lengths(kKeyLengthsUid));
}

void add_forward(fe::graph::Graph& graph, const AttentionShape& shape) {
  Builder builder(graph, shape);
  auto options = fe::graph::SDPA_attributes().set_name("attention").set_generate_stats(true);
  set_options(options, shape, builder);
  auto [out, lse] = graph.sdpa(
      builder.input(AttentionTensor::kQ, shape.num_heads, shape.q_stride),
      builder.input(AttentionTensor::kK, shape.num_kv_heads, shape.k_stride),
      builder.input(AttentionTensor::kV, shape.num_kv_heads, shape.v_stride), std::move(options));
  builder.output(out, AttentionTensor::kOut, shape.num_heads, shape.out_stride);
  builder.shape_lse(lse);
  lse->set_output(true);
}

void add_backward(fe::graph::Graph& graph, const AttentionShape& shape) {
  Builder builder(graph, shape);
  auto options = fe::graph::SDPA_backward_attributes()
                     .set_name("attention_backward")
                     .set_deterministic_algorithm(!shape.is_free);
  set_options(options, shape, builder);
  if (shape.ragged) {
    options.set_max_total_seq_len_q(shape.total_tokens)
        .set_max_total_seq_len_kv(shape.total_tokens);
  }
  auto [dq, dk, dv] =
      graph.sdpa_backward(builder.input(AttentionTensor::kQ, shape.num_heads, shape.q_stride),
                          builder.input(AttentionTensor::kK, shape.num_kv_heads, shape.k_stride),
                          builder.input(AttentionTensor::kV, shape.num_kv_heads, shape.v_stride),
                          builder.input(AttentionTensor::kOut, shape.num_heads, shape.out_stride),
                          builder.input(AttentionTensor::kDout, shape.num_heads, shape.dout_stride),
                          builder.lse_input(), std::move(options));
  builder.output(dq, AttentionTensor::kDq, shape.num_heads, shape.dq_stride);
  builder.output(dk, AttentionTensor::kDk, shape.num_kv_heads, shape.dk_stride);
  builder.output(dv, AttentionTensor::kDv, shape.num_kv_heads, shape.dv_stride);
}

}  // namespace

struct CudnnGraph::Frontend {
  fe::graph::Graph graph;
};

CudnnGraph::CudnnGraph(const AttentionShape& shape)
    : shape_(shape), frontend_(std::make_unique<Frontend>()) {}
CudnnGraph::~CudnnGraph() = default;

std::unique_ptr<CudnnGraph> CudnnGraph::build(cudnnHandle_t handle, const AttentionShape& shape,
                                              std::string* why) try {
  std::unique_ptr<CudnnGraph> built(new CudnnGraph(shape));
  fe::graph::Graph& graph = built->frontend_->graph;
  graph.set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  if (shape.backward) {
    add_backward(graph, shape);
  } else {
    add_forward(graph, shape);
  }
  int64_t workspace = 0;
  fe::error_t status = graph.build(handle, {fe::HeurMode_t::A});
  if (status.is_good()) status = graph.get_workspace_size(workspace);
  if (status.is_bad()) {
    *why = status.get_message();
    return nullptr;
  }
  built->workspace_bytes_ = static_cast<size_t>(workspace);
  return built;
} catch (const std::exception& error) {
  *why = error.what();
  return nullptr;
}

std::string CudnnGraph::run(cudnnHandle_t handle, const AttentionPointers& pointers,
                            void* workspace) const try {
  std::unordered_map<int64_t, void*> by_uid;
  const size_t count = shape_.backward ? kAttentionTensors : kForwardTensors;
  for (size_t i = 0; i < count; ++i) {
    const int64_t uid = uid_of(static_cast<AttentionTensor>(i));
    by_uid.emplace(uid, pointers.tensors[i]);
    if (shape_.ragged) by_uid.emplace(kOffsetUid + uid, pointers.offsets[i]);
  }
  if (shape_.ragged) {
    by_uid.emplace(kQueryLengthsUid, pointers.lengths);
    by_uid.emplace(kKeyLengthsUid, pointers.lengths);
  }
  fe::error_t status = frontend_->graph.execute(handle, by_uid, workspace);
  return status.is_good() ? std::string() : status.get_message();
} catch (const std::exception& error) {
  return error.what();
}

}  // namespace tunemesh::cuda
