// The backend's calls as a layer makes them: shapes and strides filled in from the pass.
#pragma once
#include "engine/decoder_layer.h"
#include "engine/linear.h"

namespace tunemesh {

struct NormCall {
  const TmElement* x;
  const float* gain;
  TmElement* y;
  float* rstd;
  size_t y_stride;
  TmQuantised quantised = {};
};
void norm_forward(const Pass& pass, const NormCall& call);
// q/k norm: every head of every token is a row of head_size.
struct HeadRows {
  size_t heads, x_stride, y_stride;  // strides from token to token
};
void head_norm_forward(const Pass& pass, const NormCall& call, const HeadRows& rows);

struct NormBackwardCall {
  const TmElement* x;
  const float* rstd;
  const NormWeights* weights;
  TmQuantised quantised = {};  // of work.dx
};
// work.dx += d norm / d x of work.dnormed
void norm_backward_add(const Pass& pass, const NormBackwardCall& call);
struct HeadGradient {
  TmElement* values;  // [n, heads * F], in place
  size_t heads, stride, x_stride;
};
void head_norm_backward(const Pass& pass, const NormBackwardCall& call, HeadGradient gradient);

// Queries and keys; in one call where they lie in the same rows.
struct RotateCall {
  TmElement *q, *k;
  size_t q_stride, k_stride;
  bool inverse;
  // Of rows [q | k | v], where these lie in the same rows.
  TmQuantised quantised = {};
};
void rotate(const Pass& pass, const RotateCall& call);

TmAttention attention_call(const Pass& pass, const LayerActivations& saved);
// Of the one newest token, at row pass.cache_start of the cache.
TmDecodeAttention decode_attention_call(const Pass& pass, const LayerActivations& saved);
// saved.swiglu = silu(gate) * up, quantised for down_proj where that is fp8
void swiglu_forward(const Pass& pass, const LayerActivations& saved);

// Linears that read the same x, as one product where the backend has groups. Strides are the
// workspace's.
struct GroupCall {
  Group group;
  TmElement* x;
  std::array<TmElement*, TM_GROUP_PARTS> y;
  const TmElement* residual = nullptr;  // added to the one y, which has rows of hidden_size
  // fp8: what made x has quantised it too (Workspace::quantised).
  bool is_quantised = false;
};
void run_group(const Pass& pass, size_t layer, const GroupCall& call);

// Gradients of what is trained, then dx where it is not null.
struct GroupBackwardCall {
  Group group;
  std::array<TmElement*, TM_GROUP_PARTS> dy;  // with groups side by side in the same rows
  const TmElement* x;
  TmElement* dx;
  bool is_quantised = false;  // as in GroupCall, of dy
};
void run_group_backward(const Pass& pass, size_t layer, const GroupBackwardCall& call);
// On a backend with groups: run_group, and the two halves of run_group_backward in this order. The
// first half reads no x.
void group_forward(const Pass& pass, size_t layer, const GroupCall& call);
void group_input_grad(const Pass& pass, size_t layer, const GroupBackwardCall& call);
void group_weight_grads(const Pass& pass, size_t layer, const GroupBackwardCall& call);

}  // namespace tunemesh
