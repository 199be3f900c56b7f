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
};
void norm_forward(const Pass& pass, const NormCall& call);
// The same values once more in backward, rather than keeping them.
void norm_again(const Pass& pass, const NormCall& call);
// q/k norm: every head of every token is a row of head_size.
void head_norm_forward(const Pass& pass, const NormCall& call, size_t heads);

struct NormBackwardCall {
  const TmElement* x;
  const float* rstd;
  const NormWeights* weights;
};
// work.dx += d norm / d x of work.dnormed
void norm_backward_add(const Pass& pass, const NormBackwardCall& call);
struct HeadGradient {
  TmElement* values;  // [n, heads * F], in place
  size_t heads;
};
void head_norm_backward(const Pass& pass, const NormBackwardCall& call, HeadGradient gradient);

struct RotateCall {
  TmElement* x;
  size_t heads;
  bool inverse;
};
void rotate(const Pass& pass, const RotateCall& call);

TmAttention attention_call(const Pass& pass, const LayerActivations& saved);
// Of the one newest token, at row pass.cache_start of the cache.
TmDecodeAttention decode_attention_call(const Pass& pass, const LayerActivations& saved);
// work.swiglu = silu(gate) * up
void swiglu_forward(const Pass& pass, const LayerActivations& saved);

struct LinearCall {
  Linear which;
  const TmElement* x;
  TmElement* y;
};
void run_linear(const Pass& pass, size_t layer, const LinearCall& call);

struct LinearBackwardCall {
  Linear which;
  const TmElement* dy;
  const TmElement* x;
  TmElement* dx;
  bool dx_add;
};
void run_linear_backward(const Pass& pass, size_t layer, const LinearBackwardCall& call);

}  // namespace tunemesh
