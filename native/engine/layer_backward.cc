#include "engine/decoder_layer.h"
#include "engine/layer_calls.h"

namespace tunemesh {
namespace {

// Gradients of gate and up, written over them and quantised where those are fp8; swiglu computed
// anew to `out` where not null.
void swiglu_backward(const Pass& pass, const LayerActivations& saved, TmElement* out) {
  TmSwiGluBackward call = {};
  call.dout = pass.work.dswiglu;
  call.gate = saved.gate;
  call.up = saved.up;
  call.dgate = saved.gate;
  call.dup = saved.up;
  call.out = out;
  call.n = pass.n;
  call.d = pass.config.intermediate_size;
  call.in_stride = pass.work.strides.gate_up;
  call.out_stride = pass.work.strides.swiglu;
  call.quantised = pass.work.quantised[kGateUpGroup];
  TM_RUN(pass.device, swiglu_backward, &call);
}

// Does the layer's output gradient come quantised from the norm of the layer above? Not where
// something of this layer is computed again in between, which would use the same memory.
bool is_output_grad_quantised(const Pass& pass, size_t layer) {
  const LayerActivations& saved = pass.work.layers[layer];
  return layer + 1 < pass.config.num_layers && !saved.recomputes_attention &&
         !saved.recomputes_gate_up;
}

// down_proj's input, where it was not kept, is computed anew for its own gradient: with groups by
// swiglu's backward, which has read gate and up anyway.
void down_and_swiglu_backward(const Pass& pass, size_t layer, bool below_down) {
  const Workspace& work = pass.work;
  const LayerActivations& saved = work.layers[layer];
  const bool needs_input =
      pass.weights.layers[layer].linears[kDown].is_trained() && !saved.keeps_inputs;
  const GroupBackwardCall down = {kDownGroup,
                                  {work.dx},
                                  saved.swiglu,
                                  below_down ? work.dswiglu : nullptr,
                                  is_output_grad_quantised(pass, layer)};
  if (below_down && pass.weights.groups.is_used) {
    group_input_grad(pass, layer, down);
    swiglu_backward(pass, saved, needs_input ? saved.swiglu : nullptr);
    group_weight_grads(pass, layer, down);
    return;
  }
  if (needs_input) swiglu_forward(pass, saved);
  run_group_backward(pass, layer, down);
  if (below_down) swiglu_backward(pass, saved, nullptr);
}

void mlp_backward(const Pass& pass, size_t layer, bool to_input) {
  const Workspace& work = pass.work;
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = work.layers[layer];
  const bool below_down =
      to_input || weights.linears[kGate].is_trained() || weights.linears[kUp].is_trained();
  down_and_swiglu_backward(pass, layer, below_down);
  if (!below_down) return;
  if (!saved.keeps_inputs) {
    norm_forward(pass, {saved.x_mid, weights.post_norm.gain, saved.normed2, saved.rstd2,
                        work.strides.normed});
  }
  run_group_backward(pass, layer,
                     {kGateUpGroup,
                      {saved.gate, saved.up},
                      saved.normed2,
                      to_input ? work.dnormed : nullptr,
                      true});
  if (!to_input) return;
  norm_backward_add(pass,
                    {saved.x_mid, saved.rstd2, &weights.post_norm, work.quantised[kOutputGroup]});
}

// `quantised`: where the gradients of q, k and v go as e4m3 numbers too.
void attention_backward(const Pass& pass, const LayerActivations& saved,
                        const TmQuantised& quantised) {
  const ModelConfig& config = pass.config;
  const Workspace& work = pass.work;
  TmAttentionBackward call = {};
  call.forward = attention_call(pass, saved);
  call.dout = work.dattention;
  call.dout_stride = config.query_width();
  call.dq = work.dq;
  call.dk = work.dk;
  call.dv = work.dv;
  call.dq_stride = work.strides.query_grad;
  call.dk_stride = work.strides.key_grad;
  call.dv_stride = work.strides.value_grad;
  TM_RUN(pass.device, attention_backward, &call);
  rotate(pass, {work.dq, work.dk, work.strides.query_grad, work.strides.key_grad, true, quantised});
}

void attention_half_backward(const Pass& pass, size_t layer, BackwardDepth depth) {
  const ModelConfig& config = pass.config;
  const Workspace& work = pass.work;
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = work.layers[layer];
  const RowStrides& strides = work.strides;
  const bool below_output = depth >= BackwardDepth::kAttention;
  run_group_backward(
      pass, layer,
      {kOutputGroup, {work.dx}, saved.attention, below_output ? work.dattention : nullptr, true});
  if (!below_output) return;
  const bool to_input = depth == BackwardDepth::kInput;
  const bool is_quantised = to_input && !config.qk_norm;
  attention_backward(pass, saved, is_quantised ? work.quantised[kQkvGroup] : TmQuantised{});
  if (config.qk_norm) {
    head_norm_backward(pass, {saved.q_raw, saved.q_rstd, &weights.q_norm},
                       {work.dq, config.num_heads, strides.query_grad, strides.raw_query});
    head_norm_backward(pass, {saved.k_raw, saved.k_rstd, &weights.k_norm},
                       {work.dk, config.num_kv_heads, strides.key_grad, strides.raw_key});
  }
  if (!saved.keeps_inputs) {
    norm_forward(pass, {work.residual[layer], weights.input_norm.gain, saved.normed1, saved.rstd1,
                        strides.normed});
  }
  run_group_backward(pass, layer,
                     {kQkvGroup,
                      {work.dq, work.dk, work.dv},
                      saved.normed1,
                      to_input ? work.dnormed : nullptr,
                      is_quantised});
  if (!to_input) return;
  const bool is_output_grad = layer > 0 && is_output_grad_quantised(pass, layer - 1);
  norm_backward_add(pass, {work.residual[layer], saved.rstd1, &weights.input_norm,
                           is_output_grad ? work.quantised[kDownGroup] : TmQuantised{}});
}

}  // namespace

void layer_backward(const Pass& pass, size_t layer, BackwardDepth depth) {
  layer_again(pass, layer);
  mlp_backward(pass, layer, depth >= BackwardDepth::kOutput);
  if (depth >= BackwardDepth::kOutput) attention_half_backward(pass, layer, depth);
}

}  // namespace tunemesh
