#include "engine/decoder_layer.h"
#include "engine/layer_calls.h"

namespace tunemesh {
namespace {

void attend(const Pass& pass, const LayerActivations& saved) {
  if (pass.cache_start > 0) {
    const TmDecodeAttention call = decode_attention_call(pass, saved);
    TM_RUN(pass.device, decode_attention, &call);
    return;
  }
  const TmAttention call = attention_call(pass, saved);
  TM_RUN(pass.device, attention_forward, &call);
}

void attention_half(const Pass& pass, size_t layer) {
  const ModelConfig& config = pass.config;
  const Workspace& work = pass.work;
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = work.layers[layer];
  const RowStrides& strides = work.strides;
  const size_t cached = pass.cache_start * config.kv_width();
  TmElement* const k = pass.device.at(saved.k, cached);
  TmElement* const v = pass.device.at(saved.v, cached);
  TmElement* const q_raw = config.qk_norm ? saved.q_raw : saved.q;
  TmElement* const k_raw = config.qk_norm ? saved.k_raw : k;

  norm_forward(pass, {work.residual[layer], weights.input_norm.gain, saved.normed1, saved.rstd1,
                      strides.normed, work.quantised[kQkvGroup]});
  run_group(pass, layer, {kQkvGroup, saved.normed1, {q_raw, k_raw, v}, nullptr, true});
  if (config.qk_norm) {
    head_norm_forward(pass, {q_raw, weights.q_norm.gain, saved.q, saved.q_rstd, 0},
                      {config.num_heads, strides.raw_query, strides.query});
    head_norm_forward(pass, {k_raw, weights.k_norm.gain, k, saved.k_rstd, 0},
                      {config.num_kv_heads, strides.raw_key, strides.key});
  }
  rotate(pass, {saved.q, k, strides.query, strides.key, false});
  attend(pass, saved);
  run_group(pass, layer, {kOutputGroup, saved.attention, {saved.x_mid}, work.residual[layer]});
}

void gate_and_up(const Pass& pass, size_t layer) {
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = pass.work.layers[layer];
  norm_forward(pass, {saved.x_mid, weights.post_norm.gain, saved.normed2, saved.rstd2,
                      pass.work.strides.normed, pass.work.quantised[kGateUpGroup]});
  run_group(pass, layer, {kGateUpGroup, saved.normed2, {saved.gate, saved.up}, nullptr, true});
}

}  // namespace

void layer_forward(const Pass& pass, size_t layer) {
  const LayerActivations& saved = pass.work.layers[layer];
  attention_half(pass, layer);
  gate_and_up(pass, layer);
  swiglu_forward(pass, saved);
  run_group(pass, layer,
            {kDownGroup, saved.swiglu, {pass.work.residual[layer + 1]}, saved.x_mid, true});
}

void layer_again(const Pass& pass, size_t layer) {
  const LayerActivations& saved = pass.work.layers[layer];
  if (saved.recomputes_attention) attention_half(pass, layer);
  if (saved.recomputes_gate_up) gate_and_up(pass, layer);
}

}  // namespace tunemesh
