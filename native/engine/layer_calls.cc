#include "engine/layer_calls.h"

#include <cmath>

namespace tunemesh {
namespace {

// The heads' rows follow each other through the whole matrix, or lie inside wider rows.
struct HeadShape {
  size_t heads, head_size;
  bool is_even(size_t stride) const { return stride == heads * head_size; }
};

TmRmsNormBackward norm_backward_args(const NormBackwardCall& call) {
  TmRmsNormBackward args = {};
  args.x = call.x;
  args.gain = call.weights->gain;
  args.dgain = call.weights->gain_grad;
  args.rstd = call.rstd;
  return args;
}

}  // namespace

void norm_forward(const Pass& pass, const NormCall& call) {
  TmRmsNorm args = {};
  args.x = call.x;
  args.gain = call.gain;
  args.y = call.y;
  args.rstd = call.rstd;
  args.n = pass.n;
  args.c = args.x_stride = pass.config.hidden_size;
  args.y_stride = call.y_stride;
  args.epsilon = static_cast<float>(pass.config.rms_norm_epsilon);
  args.quantised = call.quantised;
  TM_RUN(pass.device, rms_norm_forward, &args);
}

void head_norm_forward(const Pass& pass, const NormCall& call, const HeadRows& rows) {
  const HeadShape shape = {rows.heads, pass.config.head_size};
  TmRmsNorm args = {};
  args.x = call.x;
  args.gain = call.gain;
  args.y = call.y;
  args.rstd = call.rstd;
  args.n = pass.n * rows.heads;
  args.c = args.x_stride = args.y_stride = shape.head_size;
  args.epsilon = static_cast<float>(pass.config.rms_norm_epsilon);
  if (!shape.is_even(rows.x_stride) || !shape.is_even(rows.y_stride)) {
    args.heads = rows.heads;
    args.x_stride = rows.x_stride;
    args.y_stride = rows.y_stride;
  }
  TM_RUN(pass.device, rms_norm_forward, &args);
}

void norm_backward_add(const Pass& pass, const NormBackwardCall& call) {
  TmRmsNormBackward args = norm_backward_args(call);
  args.dy = pass.work.dnormed;
  args.dx = pass.work.dx;
  args.n = pass.n;
  args.c = args.x_stride = args.dy_stride = pass.config.hidden_size;
  args.dx_stride = pass.work.strides.dx;
  args.dx_add = 1;
  args.quantised = call.quantised;
  TM_RUN(pass.device, rms_norm_backward, &args);
}

void head_norm_backward(const Pass& pass, const NormBackwardCall& call, HeadGradient gradient) {
  const HeadShape shape = {gradient.heads, pass.config.head_size};
  TmRmsNormBackward args = norm_backward_args(call);
  args.dy = gradient.values;
  args.dx = gradient.values;
  args.n = pass.n * gradient.heads;
  args.c = args.x_stride = args.dy_stride = args.dx_stride = shape.head_size;
  if (!shape.is_even(gradient.stride) || !shape.is_even(gradient.x_stride)) {
    args.heads = gradient.heads;
    args.x_stride = gradient.x_stride;
    args.dy_stride = args.dx_stride = gradient.stride;
  }
  TM_RUN(pass.device, rms_norm_backward, &args);
}

void rotate(const Pass& pass, const RotateCall& call) {
  TmRope args = {};
  args.positions = pass.work.positions;
  args.cos = pass.work.rotary_cos;
  args.sin = pass.work.rotary_sin;
  args.n = pass.n;
  args.head_size = pass.config.head_size;
  args.inverse = call.inverse ? 1 : 0;
  args.x = call.q;
  args.x_stride = call.q_stride;
  args.heads = pass.config.num_heads;
  const bool are_beside = call.k == pass.device.at(call.q, pass.config.query_width());
  if (are_beside && call.k_stride == call.q_stride) {
    args.heads += pass.config.num_kv_heads;
    args.quantised = call.quantised;
    args.quantised_width = pass.config.query_width() + 2 * pass.config.kv_width();
    TM_RUN(pass.device, rope, &args);
    return;
  }
  TM_RUN(pass.device, rope, &args);
  args.x = call.k;
  args.x_stride = call.k_stride;
  args.heads = pass.config.num_kv_heads;
  TM_RUN(pass.device, rope, &args);
}

TmAttention attention_call(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  const RowStrides& strides = pass.work.strides;
  TmAttention args = {};
  args.q = saved.q;
  args.k = saved.k;
  args.v = saved.v;
  args.q_stride = strides.query;
  args.k_stride = strides.key;
  args.v_stride = strides.value;
  args.out = saved.attention;
  args.out_stride = strides.attention;
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
  args.padded_documents = pass.work.spec.tokens;
  return args;
}

TmDecodeAttention decode_attention_call(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  const size_t window = config.sliding_window;
  TmDecodeAttention args = {};
  args.q = saved.q;
  args.k = saved.k;
  args.v = saved.v;
  args.k_stride = pass.work.strides.key;
  args.v_stride = pass.work.strides.value;
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
  args.out = saved.swiglu;
  args.n = pass.n;
  args.d = width;
  args.in_stride = pass.work.strides.gate_up;
  args.out_stride = pass.work.strides.swiglu;
  args.quantised = pass.work.quantised[kDownGroup];
  TM_RUN(pass.device, swiglu_forward, &args);
}

void run_group(const Pass& pass, size_t layer, const GroupCall& call) {
  const LayerWeights& weights = pass.weights.layers[layer];
  const LayerActivations& saved = pass.work.layers[layer];
  const GroupMembers& members = kGroupMembers[call.group];
  if (pass.weights.groups.is_used) return group_forward(pass, layer, call);
  for (size_t part = 0; part < members.count; ++part) {
    const size_t which = members.first + part;
    linear_forward(pass.device, {weights.linears[which], call.x, call.y[part], saved.lora_u[which],
                                 pass.n, pass.weights.lora_rank, pass.weights.lora_scale});
  }
  if (call.residual == nullptr) return;
  TM_RUN(pass.device, add, call.y[0], call.residual, pass.n * pass.config.hidden_size);
}

void run_group_backward(const Pass& pass, size_t layer, const GroupBackwardCall& call) {
  if (pass.weights.groups.is_used) {
    group_input_grad(pass, layer, call);
    group_weight_grads(pass, layer, call);
    return;
  }
  const LayerActivations& saved = pass.work.layers[layer];
  const GroupMembers& members = kGroupMembers[call.group];
  for (size_t part = 0; part < members.count; ++part) {
    const size_t which = members.first + part;
    linear_backward(pass.device, {pass.weights.layers[layer].linears[which], call.dy[part], call.x,
                                  saved.lora_u[which], pass.work.lora_du, call.dx, part > 0, pass.n,
                                  pass.weights.lora_rank, pass.weights.lora_scale});
  }
}

}  // namespace tunemesh
