#include "engine/decoder_layer.h"
#include "engine/layer_calls.h"

namespace tunemesh {
namespace {

// Gradients of gate and up, written over them; `work.swiglu` is computed anew for down_proj's own
// gradient.
void swiglu_backward(const Pass& pass, const LayerActivations& saved) {
  const size_t width = pass.config.intermediate_size;
  TmSwiGluBackward call = {};
  call.dout = pass.work.dswiglu;
  call.gate = saved.gate;
  call.up = saved.up;
  call.dgate = saved.gate;
  call.dup = saved.up;
  call.n = pass.n;
  call.d = width;
  call.in_stride = width;
  call.out_stride = width;
  TM_RUN(pass.device, swiglu_backward, &call);
}

void mlp_backward(const Pass& pass, size_t layer, bool to_input) {
  const Workspace& work = pass.work;
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = work.layers[layer];
  const bool below_down =
      to_input || weights.linears[kGate].is_trained() || weights.linears[kUp].is_trained();
  if (weights.linears[kDown].is_trained()) swiglu_forward(pass, saved);
  run_linear_backward(pass, layer,
                      {kDown, work.dx, work.swiglu, below_down ? work.dswiglu : nullptr, false});
  if (!below_down) return;
  swiglu_backward(pass, saved);
  norm_again(pass, {saved.x_mid, weights.post_norm.gain, work.normed, saved.rstd2});
  TmElement* const dnormed = to_input ? work.dnormed : nullptr;
  run_linear_backward(pass, layer, {kGate, saved.gate, work.normed, dnormed, false});
  run_linear_backward(pass, layer, {kUp, saved.up, work.normed, dnormed, true});
  if (!to_input) return;
  norm_backward_add(pass, {saved.x_mid, saved.rstd2, &weights.post_norm});
}

void attention_backward(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  const Workspace& work = pass.work;
  TmAttentionBackward call = {};
  call.forward = attention_call(pass, saved);
  call.dout = work.dattention;
  call.dout_stride = config.query_width();
  call.dq = work.dq;
  call.dk = work.dk;
  call.dv = work.dv;
  call.dq_stride = config.query_width();
  call.dk_stride = config.kv_width();
  call.dv_stride = config.kv_width();
  TM_RUN(pass.device, attention_backward, &call);
  rotate(pass, {work.dq, config.num_heads, true});
  rotate(pass, {work.dk, config.num_kv_heads, true});
}

void attention_half_backward(const Pass& pass, size_t layer, BackwardDepth depth) {
  const ModelConfig& config = pass.config;
  const Workspace& work = pass.work;
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = work.layers[layer];
  const bool below_output = depth >= BackwardDepth::kAttention;
  run_linear_backward(
      pass, layer,
      {kOutput, work.dx, saved.attention, below_output ? work.dattention : nullptr, false});
  if (!below_output) return;
  attention_backward(pass, saved);
  if (config.qk_norm) {
    head_norm_backward(pass, {saved.q_raw, saved.q_rstd, &weights.q_norm},
                       {work.dq, config.num_heads});
    head_norm_backward(pass, {saved.k_raw, saved.k_rstd, &weights.k_norm},
                       {work.dk, config.num_kv_heads});
  }
  norm_again(pass, {work.residual[layer], weights.input_norm.gain, work.normed, saved.rstd1});
  const bool to_input = depth == BackwardDepth::kInput;
  TmElement* const dnormed = to_input ? work.dnormed : nullptr;
  run_linear_backward(pass, layer, {kQuery, work.dq, work.normed, dnormed, false});
  run_linear_backward(pass, layer, {kKey, work.dk, work.normed, dnormed, true});
  run_linear_backward(pass, layer, {kValue, work.dv, work.normed, dnormed, true});
  if (to_input) norm_backward_add(pass, {work.residual[layer], saved.rstd1, &weights.input_norm});
}

}  // namespace

void layer_backward(const Pass& pass, size_t layer, BackwardDepth depth) {
  mlp_backward(pass, layer, depth >= BackwardDepth::kOutput);
  if (depth >= BackwardDepth::kOutput) attention_half_backward(pass, layer, depth);
}

}  // namespace tunemesh
