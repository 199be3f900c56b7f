#include "engine/layer_calls.h"

#include <cmath>

namespace tunemesh {
namespace {

TmRmsNorm norm_args(const NormCall& call, size_t n, size_t width) {
  TmRmsNorm args = {};
  args.x = call.x;
  args.gain = call.gain;
  args.y = call.y;
  args.rstd = call.rstd;
  args.n = n;
  args.c = width;
  args.x_stride = width;
  args.y_stride = width;
  return args;
}

TmRmsNormBackward norm_backward_args(const NormBackwardCall& call, size_t n, size_t width) {
  TmRmsNormBackward args = {};
  args.x = call.x;
  args.gain = call.weights->gain;
  args.dgain = call.weights->gain_grad;
  args.rstd = call.rstd;
  args.n = n;
  args.c = width;
  args.x_stride = width;
  args.dy_stride = width;
  args.dx_stride = width;
  return args;
}

}  // namespace

void norm_forward(const Pass& pass, const NormCall& call) {
  TmRmsNorm args = norm_args(call, pass.n, pass.config.hidden_size);
  args.epsilon = static_cast<float>(pass.config.rms_norm_epsilon);
  TM_RUN(pass.device, rms_norm_forward, &args);
}

void norm_again(const Pass& pass, const NormCall& call) { norm_forward(pass, call); }

void head_norm_forward(const Pass& pass, const NormCall& call, size_t heads) {
  TmRmsNorm args = norm_args(call, pass.n * heads, pass.config.head_size);
  args.epsilon = static_cast<float>(pass.config.rms_norm_epsilon);
  TM_RUN(pass.device, rms_norm_forward, &args);
}

void norm_backward_add(const Pass& pass, const NormBackwardCall& call) {
  TmRmsNormBackward args = norm_backward_args(call, pass.n, pass.config.hidden_size);
  args.dy = pass.work.dnormed;
  args.dx = pass.work.dx;
  args.dx_add = 1;
  TM_RUN(pass.device, rms_norm_backward, &args);
}

void head_norm_backward(const Pass& pass, const NormBackwardCall& call, HeadGradient gradient) {
  TmRmsNormBackward args = norm_backward_args(call, pass.n * gradient.heads, pass.config.head_size);
  args.dy = gradient.values;
  args.dx = gradient.values;
  TM_RUN(pass.device, rms_norm_backward, &args);
}

void rotate(const Pass& pass, const RotateCall& call) {
  TmRope args = {};
  args.x = call.x;
  args.x_stride = call.heads * pass.config.head_size;
  args.positions = pass.work.positions;
  args.cos = pass.work.rotary_cos;
  args.sin = pass.work.rotary_sin;
  args.n = pass.n;
  args.heads = call.heads;
  args.head_size = pass.config.head_size;
  args.inverse = call.inverse ? 1 : 0;
  TM_RUN(pass.device, rope, &args);
}

TmAttention attention_call(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  TmAttention args = {};
  args.q = saved.q;
  args.k = saved.k;
  args.v = saved.v;
  args.q_stride = config.query_width();
  args.k_stride = config.kv_width();
  args.v_stride = config.kv_width();
  args.out = saved.attention;
  args.out_stride = config.query_width();
  args.lse = saved.lse;
  args.document_starts = pass.work.document_starts;
  args.host_document_starts = pass.host_document_starts;
  args.num_documents = pass.num_documents;
  args.n = pass.n;
  args.num_heads = config.num_heads;
  args.num_kv_heads = config.num_kv_heads;
  args.head_size = config.head_size;
  args.window = config.sliding_window;
  args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_size)));
  args.scratch = pass.work.attention_scratch;
  args.scratch_bytes = pass.work.attention_scratch_bytes;
  return args;
}

TmDecodeAttention decode_attention_call(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  const size_t window = config.sliding_window;
  TmDecodeAttention args = {};
  args.q = saved.q;
  args.k = saved.k;
  args.v = saved.v;
  args.k_stride = config.kv_width();
  args.v_stride = config.kv_width();
  args.out = saved.attention;
  args.end = pass.cache_start + 1;
  args.first = window > 0 && args.end > window ? args.end - window : 0;
  args.num_heads = config.num_heads;
  args.num_kv_heads = config.num_kv_heads;
  args.head_size = config.head_size;
  args.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_size)));
  args.scores = pass.work.decode_scores;
  args.score_stride = pass.work.decode_score_stride;
  return args;
}

void swiglu_forward(const Pass& pass, const LayerActivations& saved) {
  const size_t width = pass.config.intermediate_size;
  TmSwiGlu args = {};
  args.gate = saved.gate;
  args.up = saved.up;
  args.out = pass.work.swiglu;
  args.n = pass.n;
  args.d = width;
  args.in_stride = width;
  args.out_stride = width;
  TM_RUN(pass.device, swiglu_forward, &args);
}

void run_linear(const Pass& pass, size_t layer, const LinearCall& call) {
  linear_forward(pass.device, {pass.weights.layers[layer].linears[call.which], call.x, call.y,
                               pass.work.layers[layer].lora_u[call.which], pass.n,
                               pass.weights.lora_rank, pass.weights.lora_scale});
}

void run_linear_backward(const Pass& pass, size_t layer, const LinearBackwardCall& call) {
  const LayerActivations& saved = pass.work.layers[layer];
  linear_backward(pass.device, {pass.weights.layers[layer].linears[call.which], call.dy, call.x,
                                saved.lora_u[call.which], pass.work.lora_du, call.dx, call.dx_add,
                                pass.n, pass.weights.lora_rank, pass.weights.lora_scale});
}

}  // namespace tunemesh
