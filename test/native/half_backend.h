// The CPU's table with bfloat16 elements, as a GPU's context has them: each call widens its rows to
// floats, runs on the CPU, and rounds what it wrote back to nearest even. So the engine's layout of
// 2-byte elements, its packed copies of trained weights and its float masters are checked where
// there is no GPU. With linear groups (host_groups.h) or without.
#pragma once
#include <cstring>
#include <deque>
#include <vector>

#include "host_groups.h"
#include "kernels/backend.h"

namespace tunemesh::test {

inline float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t narrowed(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// n rows of `width` elements, `stride` apart.
struct Rows {
  size_t n, stride, width;
};

// A call's operands as floats; finish() writes the outputs' rows back, and nothing between them.
class Widened {
 public:
  TmElement* in(const TmElement* half, Rows rows) { return take(half, rows, false); }
  TmElement* in_out(TmElement* half, Rows rows) { return take(half, rows, true); }

  TmStatus finish(TmStatus status) {
    for (const Operand& operand : operands_) {
      if (!operand.is_output || status != TM_OK) continue;
      for (size_t i = 0; i < operand.rows.n; ++i) {
        const size_t at = i * operand.rows.stride;
        for (size_t j = at; j < at + operand.rows.width; ++j) {
          operand.half[j] = narrowed(operand.floats[j]);
        }
      }
    }
    return status;
  }

 private:
  struct Operand {
    uint16_t* half;
    Rows rows;
    std::vector<float> floats;
    bool is_output;
  };

  // Rows that start at the same place are one operand: a call may write over what it reads.
  TmElement* take(const TmElement* half, Rows rows, bool is_output) {
    if (half == nullptr) return nullptr;
    auto* const from = const_cast<uint16_t*>(reinterpret_cast<const uint16_t*>(half));
    for (Operand& operand : operands_) {
      if (operand.half != from) continue;
      operand.is_output = operand.is_output || is_output;
      return reinterpret_cast<TmElement*>(operand.floats.data());
    }
    const size_t extent = rows.n == 0 ? 0 : (rows.n - 1) * rows.stride + rows.width;
    operands_.push_back({from, rows, std::vector<float>(extent + 16), is_output});
    Operand& made = operands_.back();
    for (size_t i = 0; i < rows.n; ++i) {
      for (size_t j = i * rows.stride; j < i * rows.stride + rows.width; ++j) {
        made.floats[j] = widened(from[j]);
      }
    }
    return reinterpret_cast<TmElement*>(made.floats.data());
  }

  std::deque<Operand> operands_;
};

inline const TmBackend* half_host() { return host_group_backend(); }
inline Rows flat(size_t count) { return {1, count, count}; }

// Row-major halves, as CUDA keeps them: a tied embedding and its head are one copy.
inline TmStatus pack_halves(TmContext*, const float* rows, size_t out, size_t in,
                            TmElement* packed) {
  auto* const to = reinterpret_cast<uint16_t*>(packed);
  for (size_t i = 0; i < out * in; ++i) to[i] = narrowed(rows[i]);
  return TM_OK;
}

inline TmWeight widen_weight(Widened& w, TmWeight weight) {
  if (weight.packed == nullptr) return weight;
  const TmElement* const floats = w.in(weight.packed, flat(weight.out * weight.in));
  weight.rows = reinterpret_cast<const float*>(floats);
  weight.packed = nullptr;
  return weight;
}

inline TmStatus half_linear(TmContext* context, const TmLinear* args, bool is_forward) {
  Widened w;
  TmLinear a = *args;
  a.w = widen_weight(w, a.w);
  const Rows x = {a.n, a.x_stride, a.w.in}, y = {a.n, a.y_stride, a.w.out};
  a.x = is_forward ? w.in(a.x, x) : w.in_out(const_cast<TmElement*>(a.x), x);
  a.y = is_forward ? w.in_out(a.y, y) : w.in(a.y, y);
  const TmBackend* host = half_host();
  return w.finish(is_forward ? host->linear_forward(context, &a)
                             : host->linear_backward_input(context, &a));
}

inline void add_half_linears(TmBackend& half) {
  half.pack_weight = half.pack_trained_weight = pack_halves;
  half.packed_weight_elements = [](size_t out, size_t in) { return out * in; };
  half.linear_forward = [](TmContext* context, const TmLinear* args) {
    return half_linear(context, args, true);
  };
  half.linear_backward_input = [](TmContext* context, const TmLinear* args) {
    return half_linear(context, args, false);
  };
  half.linear_weight_grad = [](TmContext* context, const TmLinearWeightGrad* args) {
    Widened w;
    TmLinearWeightGrad a = *args;
    a.dy = w.in(a.dy, {a.n, a.dy_stride, a.out});
    a.x = w.in(a.x, {a.n, a.x_stride, a.in});
    if (a.is_element) a.dw = w.in_out(static_cast<TmElement*>(a.dw), flat(a.out * a.in));
    return w.finish(half_host()->linear_weight_grad(context, &a));
  };
  half.bias_add = [](TmContext* context, TmElement* y, size_t n, size_t c, size_t stride,
                     const float* bias) {
    Widened w;
    y = w.in_out(y, {n, stride, c});
    return w.finish(half_host()->bias_add(context, y, n, c, stride, bias));
  };
  half.bias_grad_add = [](TmContext* context, const TmElement* dy, size_t n, size_t c,
                          size_t stride, float* dbias) {
    Widened w;
    dy = w.in(dy, {n, stride, c});
    return w.finish(half_host()->bias_grad_add(context, dy, n, c, stride, dbias));
  };
}

inline size_t rows_named(const int32_t* rows, size_t n) {
  int32_t highest = -1;
  for (size_t i = 0; i < n; ++i) highest = rows[i] > highest ? rows[i] : highest;
  return static_cast<size_t>(highest + 1);
}

inline void add_half_rows(TmBackend& half) {
  half.embedding_forward = [](TmContext* context, const int32_t* tokens, size_t n,
                              const TmWeight* table, TmElement* out) {
    Widened w;
    const TmWeight weight = widen_weight(w, *table);
    TmElement* const to = w.in_out(out, flat(n * table->in));
    return w.finish(half_host()->embedding_forward(context, tokens, n, &weight, to));
  };
  half.embedding_backward_add = [](TmContext* context, const int32_t* tokens, size_t n,
                                   const TmElement* dout, size_t c, size_t v, float* grad) {
    Widened w;
    dout = w.in(dout, flat(n * c));
    return w.finish(half_host()->embedding_backward_add(context, tokens, n, dout, c, v, grad));
  };
  half.gather_rows = [](TmContext* context, const TmElement* x, const int32_t* rows, size_t n,
                        size_t c, TmElement* out) {
    Widened w;
    x = w.in(x, flat(rows_named(rows, n) * c));
    out = w.in_out(out, flat(n * c));
    return w.finish(half_host()->gather_rows(context, x, rows, n, c, out));
  };
  half.scatter_rows_add = [](TmContext* context, const TmElement* x, const int32_t* rows, size_t n,
                             size_t c, TmElement* out) {
    Widened w;
    x = w.in(x, flat(n * c));
    out = w.in_out(out, flat(rows_named(rows, n) * c));
    return w.finish(half_host()->scatter_rows_add(context, x, rows, n, c, out));
  };
  half.add = [](TmContext* context, TmElement* y, const TmElement* x, size_t n) {
    Widened w;
    y = w.in_out(y, flat(n));
    x = w.in(x, flat(n));
    return w.finish(half_host()->add(context, y, x, n));
  };
  half.read_elements = [](TmContext*, float* host, const TmElement* device, size_t count) {
    const auto* from = reinterpret_cast<const uint16_t*>(device);
    for (size_t i = 0; i < count; ++i) host[i] = widened(from[i]);
    return TM_OK;
  };
}

// Rows of heads inside wider rows are read whole.
template <class Norm>
Rows norm_rows(const Norm& a, size_t stride) {
  return a.heads == 0 ? Rows{a.n, stride, a.c} : Rows{a.n / a.heads, stride, a.heads * a.c};
}

inline void add_half_norms(TmBackend& half) {
  half.rms_norm_forward = [](TmContext* context, const TmRmsNorm* args) {
    Widened w;
    TmRmsNorm a = *args;
    a.x = w.in(a.x, norm_rows(a, a.x_stride));
    a.y = w.in_out(a.y, norm_rows(a, a.y_stride));
    return w.finish(half_host()->rms_norm_forward(context, &a));
  };
  half.rms_norm_backward = [](TmContext* context, const TmRmsNormBackward* args) {
    Widened w;
    TmRmsNormBackward a = *args;
    a.dy = w.in(a.dy, norm_rows(a, a.dy_stride));
    a.x = w.in(a.x, norm_rows(a, a.x_stride));
    a.dx = w.in_out(a.dx, norm_rows(a, a.dx_stride));
    return w.finish(half_host()->rms_norm_backward(context, &a));
  };
  half.rope = [](TmContext* context, const TmRope* args) {
    Widened w;
    TmRope a = *args;
    a.x = w.in_out(a.x, {a.n, a.x_stride, a.heads * a.head_size});
    return w.finish(half_host()->rope(context, &a));
  };
  half.swiglu_forward = [](TmContext* context, const TmSwiGlu* args) {
    Widened w;
    TmSwiGlu a = *args;
    a.gate = w.in(a.gate, {a.n, a.in_stride, a.d});
    a.up = w.in(a.up, {a.n, a.in_stride, a.d});
    a.out = w.in_out(a.out, {a.n, a.out_stride, a.d});
    return w.finish(half_host()->swiglu_forward(context, &a));
  };
  half.swiglu_backward = [](TmContext* context, const TmSwiGluBackward* args) {
    Widened w;
    TmSwiGluBackward a = *args;
    a.dout = w.in(a.dout, {a.n, a.out_stride, a.d});
    a.gate = w.in(a.gate, {a.n, a.in_stride, a.d});
    a.up = w.in(a.up, {a.n, a.in_stride, a.d});
    a.dgate = w.in_out(a.dgate, {a.n, a.in_stride, a.d});
    a.dup = w.in_out(a.dup, {a.n, a.in_stride, a.d});
    a.out = w.in_out(a.out, {a.n, a.out_stride, a.d});
    return w.finish(half_host()->swiglu_backward(context, &a));
  };
  half.cross_entropy = [](TmContext* context, const TmCrossEntropy* args) {
    Widened w;
    TmCrossEntropy a = *args;
    a.logits = w.in_out(a.logits, {a.rows, a.stride, a.v});
    return w.finish(half_host()->cross_entropy(context, &a));
  };
}

inline TmAttention widen_attention(Widened& w, TmAttention a) {
  const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
  a.q = w.in(a.q, {a.n, a.q_stride, wide});
  a.k = w.in(a.k, {a.n, a.k_stride, narrow});
  a.v = w.in(a.v, {a.n, a.v_stride, narrow});
  a.out = w.in_out(a.out, {a.n, a.out_stride, wide});
  return a;
}

inline void add_half_attention(TmBackend& half) {
  half.attention_forward = [](TmContext* context, const TmAttention* args) {
    Widened w;
    const TmAttention a = widen_attention(w, *args);
    return w.finish(half_host()->attention_forward(context, &a));
  };
  half.attention_backward = [](TmContext* context, const TmAttentionBackward* args) {
    Widened w;
    TmAttentionBackward b = *args;
    b.forward = widen_attention(w, args->forward);
    const TmAttention& a = b.forward;
    const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
    b.dout = w.in(b.dout, {a.n, b.dout_stride, wide});
    b.dq = w.in_out(b.dq, {a.n, b.dq_stride, wide});
    b.dk = w.in_out(b.dk, {a.n, b.dk_stride, narrow});
    b.dv = w.in_out(b.dv, {a.n, b.dv_stride, narrow});
    return w.finish(half_host()->attention_backward(context, &b));
  };
  half.decode_attention = [](TmContext* context, const TmDecodeAttention* args) {
    Widened w;
    TmDecodeAttention a = *args;
    const size_t wide = a.num_heads * a.head_size, narrow = a.num_kv_heads * a.head_size;
    a.q = w.in(a.q, flat(wide));
    a.k = w.in(a.k, {a.end, a.k_stride, narrow});
    a.v = w.in(a.v, {a.end, a.v_stride, narrow});
    a.out = w.in_out(a.out, flat(wide));
    return w.finish(half_host()->decode_attention(context, &a));
  };
}

inline void add_half_groups(TmBackend& half) {
  half.pack_group_trained = half.pack_group_base = [](TmContext*, const TmGroupPack* args) {
    Widened w;
    TmGroupPack a = *args;
    const HostGroup group(*a.shape);
    a.packed = w.in_out(a.packed, flat(group.elements()));
    group.pack(a);
    return w.finish(TM_OK);
  };
  half.group_forward = [](TmContext*, const TmGroupForward* args) {
    Widened w;
    TmGroupForward a = *args;
    const HostGroup group(*a.shape);
    a.packed = w.in(a.packed, flat(group.elements()));
    a.x = w.in_out(a.x, {a.n, a.x_stride, a.shape->in + group.border()});
    for (size_t part = 0; part < a.shape->num_parts; ++part) {
      a.y[part] = w.in_out(a.y[part], {a.n, a.y_stride[part], a.shape->out[part]});
    }
    a.residual = w.in(a.residual, {a.n, a.residual_stride, a.shape->out[0]});
    group.forward(a);
    return w.finish(TM_OK);
  };
  half.group_backward = [](TmContext*, const TmGroupBackward* args) {
    Widened w;
    TmGroupBackward a = *args;
    const HostGroup group(*a.shape);
    a.packed = w.in(a.packed, flat(group.elements()));
    a.dy = w.in_out(a.dy, {a.n, a.dy_stride, group.out() + group.border()});
    a.dx = w.in_out(a.dx, {a.n, a.dx_stride, a.shape->in});
    group.backward(a);
    return w.finish(TM_OK);
  };
  half.group_adapter_grads = [](TmContext* context, const TmGroupAdapterGrads* args) {
    Widened w;
    TmGroupAdapterGrads a = *args;
    const HostGroup group(*a.shape);
    a.x = w.in(a.x, {a.n, a.x_stride, a.shape->in});
    a.x_tail = w.in(a.x_tail, {a.n, a.x_tail_stride, group.border()});
    a.dy = w.in(a.dy, {a.n, a.dy_stride, group.out() + group.border()});
    return w.finish(half_host()->group_adapter_grads(context, &a));
  };
  // The same places, of 2-byte elements.
  half.group_places = [](TmContext*, const TmGroupShape* shape, TmElement* packed,
                         TmGroupPlaces* out) {
    std::vector<float> floats(HostGroup(*shape).elements());
    *out = HostGroup(*shape).places(reinterpret_cast<TmElement*>(floats.data()));
    for (TmPlace* places : {out->weight, out->bias, out->lora_a, out->lora_b}) {
      for (size_t part = 0; part < TM_GROUP_PARTS; ++part) {
        if (places[part].at == nullptr) continue;
        const auto* const at = reinterpret_cast<const float*>(places[part].at);
        places[part].at = reinterpret_cast<TmElement*>(reinterpret_cast<uint16_t*>(packed) +
                                                       (at - floats.data()));
      }
    }
    return TM_OK;
  };
}

// The update's copies are the only elements in it.
inline void add_half_update(TmBackend& half) {
  half.adamw = [](TmContext* context, const TmAdamW* args) {
    Widened w;
    TmAdamW a = *args;
    std::vector<TmTrainedTensor> tensors(a.host_tensors, a.host_tensors + a.num_tensors);
    for (TmTrainedTensor& tensor : tensors) {
      tensor.copy =
          w.in_out(tensor.copy, {tensor.n / tensor.columns, tensor.copy_stride, tensor.columns});
    }
    a.tensors = a.host_tensors = tensors.data();
    return w.finish(half_host()->adamw(context, &a));
  };
}

inline const TmBackend* half_backend(bool has_groups) {
  static const auto make = [](bool is_grouped) {
    TmBackend half = is_grouped ? *host_group_backend() : *tm_cpu_backend();
    half.create = [](const TmContextOptions* options, TmContext** out) {
      TmContextOptions floats = *options;
      floats.precision = TM_FP32;
      return tm_cpu_backend()->create(&floats, out);
    };
    half.element_bytes = [](TmContext*) { return sizeof(uint16_t); };
    half.reads_rows = [](TmContext*) { return 0; };
    half.packs_row_major = [](TmContext*) { return 1; };
    add_half_linears(half);
    add_half_rows(half);
    add_half_norms(half);
    add_half_attention(half);
    add_half_update(half);
    if (is_grouped) add_half_groups(half);
    return half;
  };
  static const TmBackend grouped = make(true), single = make(false);
  return has_groups ? &grouped : &single;
}

}  // namespace tunemesh::test
