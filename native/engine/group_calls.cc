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

// Where the A matrices of several linears are trained, x is read once for all.
struct AdapterRows {
  const LayerWeights& weights;
  const TmGroupShape& shape;
  size_t count = 0;  // adapted parts
};

void adapter_a_grads(const Pass& pass, const AdapterRows& rows, TmLinearWeightGrad call) {
  const GroupMembers& members = kGroupMembers[&rows.shape - pass.weights.groups.shapes.data()];
  call.out = rows.count * rows.shape.rank;
  const auto grad_of = [&](size_t part) {
    return rows.weights.linears[members.first + part].lora_a_grad;
  };
  if (rows.count > 1) call.dw = pass.work.adapter_grads;
  for (size_t part = 0; rows.count == 1 && part < members.count; ++part) {
    if (rows.shape.is_adapted[part]) call.dw = grad_of(part);
  }
  TM_RUN(pass.device, linear_weight_grad, &call);
  if (rows.count == 1) return;
  const size_t bytes = rows.shape.rank * rows.shape.in * sizeof(float);
  const float* from = pass.work.adapter_grads;
  for (size_t part = 0; part < members.count; ++part) {
    if (!rows.shape.is_adapted[part]) continue;
    const TmCopyRows copy = {grad_of(part), from, bytes, bytes, bytes, 1};
    TM_RUN(pass.device, copy_rows, &copy);
    from += rows.shape.rank * rows.shape.in;
  }
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
  TM_RUN(pass.device, group_backward, &args);
}

void group_weight_grads(const Pass& pass, size_t layer, const GroupBackwardCall& call) {
  const GroupStrides strides = strides_of(pass, call.group);
  const GroupPlan& groups = pass.weights.groups;
  AdapterRows rows = {pass.weights.layers[layer], groups.shapes[call.group]};
  TmElement* tail = pass.work.layers[layer].tails[call.group];
  size_t tail_stride = groups.borders[call.group];
  if (tail == nullptr) {  // it stayed in the input's rows
    tail = pass.device.at(const_cast<TmElement*>(call.x), rows.shape.in);
    tail_stride = strides.x;
  }
  for (size_t part = 0; part < rows.shape.num_parts; ++part) {
    const LinearWeights& linear = rows.weights.linears[kGroupMembers[call.group].first + part];
    TmLinearWeightGrad grad = {
        call.dy[part], strides.dy,           call.x,        strides.x, linear.weight_grad,
        pass.n,        rows.shape.out[part], rows.shape.in, 0,         1.0f};
    if (linear.weight_grad != nullptr) TM_RUN(pass.device, linear_weight_grad, &grad);
    if (linear.bias_grad != nullptr) {
      TM_RUN(pass.device, bias_grad_add, call.dy[part], pass.n, rows.shape.out[part], strides.dy,
             linear.bias_grad);
    }
    if (!linear.has_adapter()) continue;
    grad.x = pass.device.at(tail, rows.count++ * rows.shape.rank);
    grad.x_stride = tail_stride;
    grad.dw = linear.lora_b_grad;
    grad.in = rows.shape.rank;
    TM_RUN(pass.device, linear_weight_grad, &grad);
  }
  if (rows.count == 0) return;
  TmElement* const dy_tail = pass.device.at(call.dy[0], groups.out_width(call.group));
  adapter_a_grads(
      pass, rows,
      {dy_tail, strides.dy, call.x, strides.x, nullptr, pass.n, 0, rows.shape.in, 0, 1.0f});
}

}  // namespace tunemesh
