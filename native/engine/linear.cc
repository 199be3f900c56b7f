#include "engine/linear.h"

namespace tunemesh {
namespace {

TmLinear product(const TmElement* x, const TmWeight& weight, TmElement* y) {
  TmLinear call = {};
  call.x = x;
  call.x_stride = weight.in;
  call.w = weight;
  call.y = y;
  call.y_stride = weight.out;
  call.alpha = 1.0f;
  return call;
}

// dx [n, in] from dy [n, out]: in backward x is the output and y the input.
void backward_input(const Device& device, TmLinear call) {
  TM_RUN(device, linear_backward_input, &call);
}

}  // namespace

void linear_forward(const Device& device, const LinearForward& args) {
  const LinearWeights& linear = args.linear;
  TmLinear base = product(args.x, linear.weight, args.y);
  base.n = args.n;
  TM_RUN(device, linear_forward, &base);
  if (linear.bias != nullptr) {
    TM_RUN(device, bias_add, args.y, args.n, linear.weight.out, linear.weight.out, linear.bias);
  }
  if (!linear.has_adapter()) return;
  TmLinear down = product(args.x, linear.lora_a, args.lora_u);
  down.n = args.n;
  down.alpha = args.scale;
  TM_RUN(device, linear_forward, &down);
  TmLinear up = product(args.lora_u, linear.lora_b, args.y);
  up.n = args.n;
  up.accumulate = 1;
  TM_RUN(device, linear_forward, &up);
}

void linear_backward(const Device& device, const LinearBackward& args) {
  const LinearWeights& linear = args.linear;
  const size_t out = linear.weight.out;
  const size_t in = linear.weight.in;
  const int adds = linear.adds_grads ? 1 : 0;
  if (linear.weight_grad != nullptr) {
    const TmLinearWeightGrad call = {args.dy,
                                     out,
                                     args.x,
                                     in,
                                     linear.weight_grad,
                                     args.n,
                                     out,
                                     in,
                                     adds,
                                     1.0f,
                                     linear.has_element_grad ? 1 : 0};
    TM_RUN(device, linear_weight_grad, &call);
  }
  if (linear.bias_grad != nullptr) {
    TM_RUN(device, bias_grad_add, args.dy, args.n, out, out, linear.bias_grad);
  }
  if (args.dx != nullptr) {
    TmLinear call = product(nullptr, linear.weight, nullptr);
    call.x = args.dx;
    call.y = const_cast<TmElement*>(args.dy);
    call.n = args.n;
    call.accumulate = args.dx_add ? 1 : 0;
    backward_input(device, call);
  }
  if (!linear.has_adapter()) return;
  const size_t rank = args.rank;
  const TmLinearWeightGrad b_grad = {
      args.dy, out, args.lora_u, rank, linear.lora_b_grad, args.n, out, rank, adds, 1.0f, 0};
  TM_RUN(device, linear_weight_grad, &b_grad);
  TmLinear du = product(args.lora_du, linear.lora_b, nullptr);
  du.y = const_cast<TmElement*>(args.dy);
  du.n = args.n;
  du.alpha = args.scale;
  backward_input(device, du);
  const TmLinearWeightGrad a_grad = {
      args.lora_du, rank, args.x, in, linear.lora_a_grad, args.n, rank, in, adds, 1.0f, 0};
  TM_RUN(device, linear_weight_grad, &a_grad);
  if (args.dx == nullptr) return;
  TmLinear through_a = product(args.dx, linear.lora_a, nullptr);
  through_a.y = args.lora_du;
  through_a.n = args.n;
  through_a.accumulate = 1;
  backward_input(device, through_a);
}

}  // namespace tunemesh
