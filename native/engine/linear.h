// A linear layer with its bias and adapter, forward and backward.
#pragma once
#include <cstddef>

#include "engine/decoder_weights.h"
#include "engine/device.h"

namespace tunemesh {

// y = x W^T + bias + (scale x A^T) B^T
//   shapes  x [n, in], y [n, out], lora_u [n, r] receives scale x A^T; all rows contiguous
struct LinearForward {
  const LinearWeights& linear;
  const TmElement* x;
  TmElement* y;
  TmElement* lora_u;
  size_t n, rank;
  float scale;
};
void linear_forward(const Device& device, const LinearForward& args);

// Gradients of the trained parts, overwritten; then dx = dy W + (scale dy B) A where dx is wanted.
struct LinearBackward {
  const LinearWeights& linear;
  const TmElement* dy;
  const TmElement* x;       // forward's input; only read where something is trained
  const TmElement* lora_u;  // from forward
  TmElement* lora_du;       // scratch [n, r]
  TmElement* dx;            // null: not wanted
  bool dx_add;
  size_t n, rank;
  float scale;
};
void linear_backward(const Device& device, const LinearBackward& args);

}  // namespace tunemesh
