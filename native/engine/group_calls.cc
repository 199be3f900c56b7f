// A layer's calls on a backend with linear groups (layer_calls.h).
#include "engine/layer_calls.h"

namespace tunemesh {
namespace {

// Elements from row to row of a group's operands.
struct GroupStrides {
  size_t x, dy, dx;
  std::array<size_t, TM_GROUP_PARTS> y;
};

GroupStrides strides_of(const Pass& pass, Group group) {
  const RowStrides& rows = pass.work.strides;
  const size_t hidden = pass.config.hidden_size;
  switch (group) {
    case kQkvGroup:
      return {rows.normed, rows.query_grad, hidden, {rows.raw_query, rows.raw_key, rows.value}};
    case kOutputGroup:
      return {rows.attention, rows.dx, pass.config.query_width(), {hidden}};
    case kGateUpGroup:
      return {rows.normed, rows.gate_up, hidden, {rows.gate_up, rows.gate_up}};
    default:
      return {rows.swiglu, rows.dx, rows.swiglu, {hidden}};
  }
}

// Backward needs the tail when x's rows are long overwritten; rows that stay keep theirs.
void keep_tail(const Pass& pass, size_t layer, const GroupCall& call) {
  TmElement* const kept = pass.work.layers[layer].tails[call.group];
  const size_t border = pass.weights.groups.borders[call.group];
  if (kept == nullptr || border == 0) return;
  const size_t element = pass.device.element_bytes();
  TmCopyRows copy = {};
  copy.to = kept;
  copy.from = pass.device.at(call.x, pass.weights.groups.shapes[call.group].in);
  copy.to_stride = copy.row_bytes = border * element;
  copy.from_stride = strides_of(pass, call.group).x * element;
  copy.n = pass.n;
  TM_RUN(pass.device, copy_rows, &copy);
}

}  // namespace

void group_forward(const Pass& pass, size_t layer, const GroupCall& call) {
  const GroupStrides strides = strides_of(pass, call.group);
  TmGroupForward args = {};
  args.shape = &pass.weights.groups.shapes[call.group];
  args.packed = pass.weights.layers[layer].groups[call.group];
  args.x = call.x;
  args.x_stride = strides.x;
  for (size_t part = 0; part < args.shape->num_parts; ++part) {
    args.y[part] = call.y[part];
    args.y_stride[part] = strides.y[part];
  }
  args.residual = call.residual;
  args.residual_stride = pass.config.hidden_size;
  args.n = pass.n;
  args.scale = pass.weights.lora_scale;
  args.quantised = pass.work.quantised[call.group];
  args.is_quantised = call.is_quantised && args.quantised.q != nullptr ? 1 : 0;
  TM_RUN(pass.device, group_forward, &args);
  keep_tail(pass, layer, call);
}

void group_input_grad(const Pass& pass, size_t layer, const GroupBackwardCall& call) {
  const GroupStrides strides = strides_of(pass, call.group);
  if (call.dx == nullptr && pass.weights.groups.borders[call.group] == 0) return;
  TmGroupBackward args = {};
  args.shape = &pass.weights.groups.shapes[call.group];
  args.packed = pass.weights.layers[layer].groups[call.group];
  args.dy = call.dy[0];
  args.dy_stride = strides.dy;
  args.dx = call.dx;
  args.dx_stride = strides.dx;
  args.n = pass.n;
  args.scale = pass.weights.lora_scale;
  args.quantised = pass.work.quantised[call.group];
  args.is_quantised = call.is_quantised && args.quantised.q != nullptr ? 1 : 0;
  TM_RUN(pass.device, group_backward, &args);
}

void group_weight_grads(const Pass& pass, size_t layer, const GroupBackwardCall& call) {
  const GroupStrides strides = strides_of(pass, call.group);
  const GroupPlan& groups = pass.weights.groups;
  const LayerWeights& weights = pass.weights.layers[layer];
  const TmGroupShape& shape = groups.shapes[call.group];
  TmGroupAdapterGrads adapters = {};
  for (size_t part = 0; part < shape.num_parts; ++part) {
    const LinearWeights& linear = weights.linears[kGroupMembers[call.group].first + part];
    const TmLinearWeightGrad grad = {call.dy[part],
                                     strides.dy,
                                     call.x,
                                     strides.x,
                                     linear.weight_grad,
                                     pass.n,
                                     shape.out[part],
                                     shape.in,
                                     linear.adds_grads ? 1 : 0,
                                     1.0f,
                                     linear.has_element_grad ? 1 : 0};
    if (linear.weight_grad != nullptr) TM_RUN(pass.device, linear_weight_grad, &grad);
    if (linear.bias_grad != nullptr) {
      TM_RUN(pass.device, bias_grad_add, call.dy[part], pass.n, shape.out[part], strides.dy,
             linear.bias_grad);
    }
    if (linear.adds_grads) adapters.accumulate = 1;
    adapters.lora_a[part] = linear.lora_a_grad;
    adapters.lora_b[part] = linear.lora_b_grad;
  }
  if (groups.borders[call.group] == 0) return;
  adapters.shape = &shape;
  adapters.x = call.x;
  adapters.x_stride = strides.x;
  adapters.x_tail = pass.work.layers[layer].tails[call.group];
  adapters.x_tail_stride = groups.borders[call.group];
  if (adapters.x_tail == nullptr) {  // it stayed in the input's rows
    adapters.x_tail = pass.device.at(const_cast<TmElement*>(call.x), shape.in);
    adapters.x_tail_stride = strides.x;
  }
  adapters.dy = call.dy[0];
  adapters.dy_stride = strides.dy;
  adapters.n = pass.n;
  TM_RUN(pass.device, group_adapter_grads, &adapters);
}

}  // namespace tunemesh
