// A device's operations on the host's buffers: each call allocates on the device, copies its
// operands in, runs, and copies back what the operation may have written. So the cases written for
// the CPU run on a card as they are; poison travels both ways. Elements are floats on the host
// whatever they are on the device.
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "op_case.h"

namespace tunemesh {

// The table that staged_backend() wraps; contexts are its own.
inline const TmBackend* staged_device = nullptr;

class Staging {
 public:
  explicit Staging(TmContext* context) : context_(context) {}
  ~Staging() {
    for (const Buffer& buffer : buffers_) staged_device->release(context_, buffer.device);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  template <typename T>
  const T* in(const T* host, size_t count) {
    return static_cast<const T*>(stage({const_cast<T*>(host), nullptr, count * sizeof(T), false}));
  }
  template <typename T>
  T* in_out(T* host, size_t count) {
    return static_cast<T*>(stage({host, nullptr, count * sizeof(T), true}));
  }
  const TmElement* elements_in(const TmElement* host, size_t count) {
    return stage_elements(const_cast<TmElement*>(host), count, false);
  }
  TmElement* elements_in_out(TmElement* host, size_t count) {
    return stage_elements(host, count, true);
  }

  // What the operation answered, or the first failure around it.
  TmStatus finish(TmStatus status) {
    if (status_ == TM_OK) status_ = status;
    for (const Buffer& buffer : buffers_) {
      if (status_ != TM_OK) break;
      if (!buffer.is_output) continue;
      status_ = copy_out(buffer);
    }
    if (status_ == TM_OK) status_ = staged_device->synchronize(context_);
    return status_;
  }

 private:
  struct Buffer {
    void *host, *device;
    size_t bytes;  // on the host
    bool is_output, is_half = false;
  };

  TmElement* stage_elements(TmElement* host, size_t count, bool is_output) {
    const bool is_half = staged_device->element_bytes(context_) == sizeof(uint16_t);
    return static_cast<TmElement*>(
        stage({host, nullptr, count * sizeof(TmElement), is_output, is_half}));
  }

  // Operands that overlap must be the same buffer: one is made for both.
  void* stage(Buffer wanted) {
    if (wanted.host == nullptr) return nullptr;
    for (Buffer& buffer : buffers_) {
      if (buffer.host != wanted.host || buffer.bytes != wanted.bytes) continue;
      buffer.is_output = buffer.is_output || wanted.is_output;
      return buffer.device;
    }
    TmStatus status = staged_device->allocate(context_, wanted.bytes, &wanted.device);
    if (status == TM_OK) status = copy_in(wanted);
    if (status_ == TM_OK) status_ = status;
    buffers_.push_back(wanted);
    return wanted.device;
  }

  TmStatus copy_in(const Buffer& buffer) {
    if (!buffer.is_half) {
      return staged_device->copy_in(context_, buffer.device, buffer.host, buffer.bytes);
    }
    std::vector<uint16_t> halves(buffer.bytes / sizeof(TmElement));
    const auto* host = static_cast<const TmElement*>(buffer.host);
    for (size_t i = 0; i < halves.size(); ++i) halves[i] = to_bf16(host[i]);
    return staged_device->copy_in(context_, buffer.device, halves.data(),
                                  halves.size() * sizeof(uint16_t));
  }
  TmStatus copy_out(const Buffer& buffer) {
    if (!buffer.is_half) {
      return staged_device->copy_out(context_, buffer.host, buffer.device, buffer.bytes);
    }
    return staged_device->read_elements(context_, static_cast<float*>(buffer.host),
                                        static_cast<const TmElement*>(buffer.device),
                                        buffer.bytes / sizeof(TmElement));
  }

  TmContext* context_;
  std::vector<Buffer> buffers_;
  TmStatus status_ = TM_OK;
};

// Floats of n rows of c in rows of `stride`.
inline size_t extent(size_t n, size_t stride, size_t c) {
  return n == 0 ? 0 : (n - 1) * stride + c;
}

inline TmAttention stage_attention(Staging& s, TmAttention a) {
  const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
  a.q = s.elements_in(a.q, extent(a.n, a.q_stride, wide));
  a.k = s.elements_in(a.k, extent(a.n, a.k_stride, narrow));
  a.v = s.elements_in(a.v, extent(a.n, a.v_stride, narrow));
  a.out = s.elements_in_out(a.out, extent(a.n, a.out_stride, wide));
  a.lse = s.in_out(a.lse, a.n * a.num_heads);
  a.document_starts = s.in(a.document_starts, a.num_documents + 1);
  a.scratch = s.in_out(static_cast<char*>(a.scratch), a.scratch_bytes);
  return a;
}

inline void stage_attention_entries(TmBackend& staged) {
  staged.attention_forward = [](TmContext* context, const TmAttention* args) {
    Staging s(context);
    const TmAttention call = stage_attention(s, *args);
    return s.finish(staged_device->attention_forward(context, &call));
  };
  staged.attention_backward = [](TmContext* context, const TmAttentionBackward* args) {
    Staging s(context);
    TmAttentionBackward b = *args;
    b.forward = stage_attention(s, args->forward);
    const TmAttention& a = b.forward;
    const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
    b.dout = s.elements_in(b.dout, extent(a.n, b.dout_stride, wide));
    b.dq = s.elements_in_out(b.dq, extent(a.n, b.dq_stride, wide));
    b.dk = s.elements_in_out(b.dk, extent(a.n, b.dk_stride, narrow));
    b.dv = s.elements_in_out(b.dv, extent(a.n, b.dv_stride, narrow));
    return s.finish(staged_device->attention_backward(context, &b));
  };
  staged.decode_attention = [](TmContext* context, const TmDecodeAttention* args) {
    Staging s(context);
    TmDecodeAttention a = *args;
    const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
    a.q = s.elements_in(a.q, wide);
    a.k = s.elements_in(a.k, extent(a.end, a.k_stride, narrow));
    a.v = s.elements_in(a.v, extent(a.end, a.v_stride, narrow));
    a.out = s.elements_in_out(a.out, wide);
    a.scores = s.in_out(a.scores, a.num_heads * a.score_stride);
    return s.finish(staged_device->decode_attention(context, &a));
  };
}

inline TmLinear stage_linear(Staging& s, TmLinear a, bool is_forward) {
  const size_t x = extent(a.n, a.x_stride, a.w.in), y = extent(a.n, a.y_stride, a.w.out);
  a.w.rows = s.in(a.w.rows, a.w.out * a.w.in);
  a.w.packed = s.elements_in(a.w.packed, staged_device->packed_weight_elements(a.w.out, a.w.in));
  a.x = is_forward ? s.elements_in(a.x, x) : s.elements_in_out(const_cast<TmElement*>(a.x), x);
  a.y = is_forward ? s.elements_in_out(a.y, y) : const_cast<TmElement*>(s.elements_in(a.y, y));
  return a;
}

inline void stage_linear_entries(TmBackend& staged) {
  staged.pack_weight = [](TmContext* context, const float* rows, size_t out, size_t in,
                          float* packed) {
    Staging s(context);
    packed = s.elements_in_out(packed, staged_device->packed_weight_elements(out, in));
    return s.finish(staged_device->pack_weight(context, rows, out, in, packed));
  };
  staged.linear_forward = [](TmContext* context, const TmLinear* args) {
    Staging s(context);
    const TmLinear call = stage_linear(s, *args, true);
    return s.finish(staged_device->linear_forward(context, &call));
  };
  staged.linear_backward_input = [](TmContext* context, const TmLinear* args) {
    Staging s(context);
    const TmLinear call = stage_linear(s, *args, false);
    return s.finish(staged_device->linear_backward_input(context, &call));
  };
  staged.linear_weight_grad = [](TmContext* context, const TmLinearWeightGrad* args) {
    Staging s(context);
    TmLinearWeightGrad a = *args;
    a.dy = s.elements_in(a.dy, extent(a.n, a.dy_stride, a.out));
    a.x = s.elements_in(a.x, extent(a.n, a.x_stride, a.in));
    a.dw = a.is_element ? s.elements_in_out(static_cast<TmElement*>(a.dw), a.out * a.in)
                        : s.in_out(static_cast<float*>(a.dw), a.out * a.in);
    return s.finish(staged_device->linear_weight_grad(context, &a));
  };
}

// Tables are staged up to the highest row that is named; `limit` where the call says it.
inline size_t height_of(const int32_t* rows, size_t n, size_t limit) {
  size_t height = 0;
  for (size_t i = 0; i < n; ++i) {
    if (rows[i] < 0 || static_cast<size_t>(rows[i]) >= limit) continue;
    height = height > static_cast<size_t>(rows[i]) ? height : static_cast<size_t>(rows[i]) + 1;
  }
  return height;
}
constexpr size_t kNoLimit = size_t{1} << 31;

inline void stage_row_entries(TmBackend& staged) {
  staged.embedding_forward = [](TmContext* context, const int32_t* tokens, size_t n,
                                const TmWeight* table, float* out) {
    Staging s(context);
    TmWeight rows = *table;
    rows.rows = s.in(rows.rows, height_of(tokens, n, kNoLimit) * rows.in);
    tokens = s.in(tokens, n);
    out = s.elements_in_out(out, n * rows.in);
    return s.finish(staged_device->embedding_forward(context, tokens, n, &rows, out));
  };
  staged.gather_rows = [](TmContext* context, const float* x, const int32_t* rows, size_t n,
                          size_t c, float* out) {
    Staging s(context);
    x = s.elements_in(x, height_of(rows, n, kNoLimit) * c);
    rows = s.in(rows, n);
    out = s.elements_in_out(out, n * c);
    return s.finish(staged_device->gather_rows(context, x, rows, n, c, out));
  };
  staged.embedding_backward_add = [](TmContext* context, const int32_t* tokens, size_t n,
                                     const float* dout, size_t c, size_t v, float* table_grad) {
    Staging s(context);
    tokens = s.in(tokens, n);
    dout = s.elements_in(dout, n * c);
    table_grad = s.in_out(table_grad, v * c);
    return s.finish(
        staged_device->embedding_backward_add(context, tokens, n, dout, c, v, table_grad));
  };
  staged.scatter_rows_add = [](TmContext* context, const float* x, const int32_t* rows, size_t n,
                               size_t c, float* out) {
    Staging s(context);
    out = s.elements_in_out(out, height_of(rows, n, kNoLimit) * c);
    rows = s.in(rows, n);
    x = s.elements_in(x, n * c);
    return s.finish(staged_device->scatter_rows_add(context, x, rows, n, c, out));
  };
}

inline void stage_norm_entries(TmBackend& staged) {
  staged.rms_norm_forward = [](TmContext* context, const TmRmsNorm* args) {
    Staging s(context);
    TmRmsNorm a = *args;
    a.x = s.elements_in(a.x, extent(a.n, a.x_stride, a.c));
    a.gain = s.in(a.gain, a.c);
    a.y = s.elements_in_out(a.y, extent(a.n, a.y_stride, a.c));
    a.rstd = s.in_out(a.rstd, a.n);
    return s.finish(staged_device->rms_norm_forward(context, &a));
  };
  staged.rms_norm_backward = [](TmContext* context, const TmRmsNormBackward* args) {
    Staging s(context);
    TmRmsNormBackward a = *args;
    a.dy = s.elements_in(a.dy, extent(a.n, a.dy_stride, a.c));
    a.x = s.elements_in(a.x, extent(a.n, a.x_stride, a.c));
    a.gain = s.in(a.gain, a.c);
    a.rstd = s.in(a.rstd, a.n);
    a.dx = s.elements_in_out(a.dx, extent(a.n, a.dx_stride, a.c));
    a.dgain = s.in_out(a.dgain, a.c);
    return s.finish(staged_device->rms_norm_backward(context, &a));
  };
  staged.bias_add = [](TmContext* context, float* y, size_t n, size_t c, size_t stride,
                       const float* bias) {
    Staging s(context);
    y = s.elements_in_out(y, extent(n, stride, c));
    bias = s.in(bias, c);
    return s.finish(staged_device->bias_add(context, y, n, c, stride, bias));
  };
  staged.bias_grad_add = [](TmContext* context, const float* dy, size_t n, size_t c, size_t stride,
                            float* dbias) {
    Staging s(context);
    dy = s.elements_in(dy, extent(n, stride, c));
    dbias = s.in_out(dbias, c);
    return s.finish(staged_device->bias_grad_add(context, dy, n, c, stride, dbias));
  };
  staged.add = [](TmContext* context, float* y, const float* x, size_t n) {
    Staging s(context);
    y = s.elements_in_out(y, n);
    x = s.elements_in(x, n);
    return s.finish(staged_device->add(context, y, x, n));
  };
}

inline void stage_activation_entries(TmBackend& staged) {
  staged.rope = [](TmContext* context, const TmRope* args) {
    Staging s(context);
    TmRope a = *args;
    size_t num_positions = 0;
    for (size_t i = 0; i < a.n; ++i) {
      const size_t end = static_cast<size_t>(a.positions[i]) + 1;
      num_positions = num_positions > end ? num_positions : end;
    }
    a.x = s.elements_in_out(a.x, extent(a.n, a.x_stride, a.heads * a.head_size));
    a.positions = s.in(a.positions, a.n);
    a.cos = s.in(a.cos, num_positions * (a.head_size / 2));
    a.sin = s.in(a.sin, num_positions * (a.head_size / 2));
    return s.finish(staged_device->rope(context, &a));
  };
  staged.swiglu_forward = [](TmContext* context, const TmSwiGlu* args) {
    Staging s(context);
    TmSwiGlu a = *args;
    a.gate = s.elements_in(a.gate, extent(a.n, a.in_stride, a.d));
    a.up = s.elements_in(a.up, extent(a.n, a.in_stride, a.d));
    a.out = s.elements_in_out(a.out, extent(a.n, a.out_stride, a.d));
    return s.finish(staged_device->swiglu_forward(context, &a));
  };
  staged.swiglu_backward = [](TmContext* context, const TmSwiGluBackward* args) {
    Staging s(context);
    TmSwiGluBackward a = *args;
    a.dout = s.elements_in(a.dout, extent(a.n, a.out_stride, a.d));
    a.gate = s.elements_in(a.gate, extent(a.n, a.in_stride, a.d));
    a.up = s.elements_in(a.up, extent(a.n, a.in_stride, a.d));
    a.dgate = s.elements_in_out(a.dgate, extent(a.n, a.in_stride, a.d));
    a.dup = s.elements_in_out(a.dup, extent(a.n, a.in_stride, a.d));
    a.out = s.elements_in_out(a.out, extent(a.n, a.out_stride, a.d));
    return s.finish(staged_device->swiglu_backward(context, &a));
  };
  staged.cross_entropy = [](TmContext* context, const TmCrossEntropy* args) {
    Staging s(context);
    TmCrossEntropy a = *args;
    a.logits = s.elements_in_out(a.logits, extent(a.rows, a.stride, a.v));
    a.targets = s.in(a.targets, a.rows);
    a.row_losses = s.in_out(a.row_losses, a.rows);
    return s.finish(staged_device->cross_entropy(context, &a));
  };
}

inline void stage_update_entries(TmBackend& staged) {
  staged.adamw = [](TmContext* context, const TmAdamW* args) {
    Staging s(context);
    TmAdamW a = *args;
    std::vector<TmTrainedTensor> tensors;
    for (size_t i = 0; i < a.num_tensors; ++i) {
      TmTrainedTensor t = a.host_tensors[i];
      const size_t rows = t.n / t.columns, bytes = t.is_half ? 2 : 4;
      t.p = s.in_out(static_cast<char*>(t.p), extent(rows, t.p_stride, t.columns) * bytes);
      const size_t moment_bytes = t.m_exponents != nullptr ? 1 : bytes;
      t.m = s.in_out(static_cast<char*>(t.m), t.n * moment_bytes);
      t.v = s.in_out(static_cast<char*>(t.v), t.n * moment_bytes);
      t.m_exponents = s.in_out(t.m_exponents, (t.n + 255) / 256);
      t.v_exponents = s.in_out(t.v_exponents, (t.n + 255) / 256);
      t.copy = s.elements_in_out(t.copy, extent(rows, t.copy_stride, t.columns));
      tensors.push_back(t);
    }
    size_t count = 0;
    for (const TmTrainedTensor& t : tensors) count = std::max(count, t.gradient_offset + t.n);
    a.gradient = s.in(a.gradient, count);
    a.half_gradient = s.in(a.half_gradient, count);
    a.tensors = s.in(tensors.data(), tensors.size());
    return s.finish(staged_device->adamw(context, &a));
  };
  staged.round_and_add = [](TmContext* context, const TmRoundAndAdd* args) {
    Staging s(context);
    TmRoundAndAdd a = *args;
    a.gradient = s.in(a.gradient, a.num_blocks * 256);
    a.accumulator = s.in_out(a.accumulator, a.num_blocks * 256);
    return s.finish(staged_device->round_and_add(context, &a));
  };
}

// Stays valid; one device at a time.
inline const TmBackend* staged_backend(const TmBackend* device) {
  static TmBackend staged;
  staged_device = device;
  staged = *device;
  stage_attention_entries(staged);
  stage_linear_entries(staged);
  stage_row_entries(staged);
  stage_norm_entries(staged);
  stage_activation_entries(staged);
  stage_update_entries(staged);
  return &staged;
}

}  // namespace tunemesh
