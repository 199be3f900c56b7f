// SwiGLU: out = silu(gate) up, silu(g) = g sigmoid(g).
//   backward  dup = dout silu(gate),  dgate = (dout up) (sigmoid (1 + gate (1 - sigmoid)))
//
//   shapes  [n, d]: gate, up, dgate, dup in rows of in_stride, out and dout in rows of out_stride
//   alias   elementwise: dgate may be gate, dup may be up
//   order   sigmoid and 1 - sigmoid both come from e = exp(-|gate|), so that neither cancels: the
//           larger is 1 / (1 + e), the other e times that. One fma: fma(gate, 1 - sigmoid, 1)
//   floor   forward 12, backward 20 (24 with out) bytes an element
//   source  Shazeer 2020
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/vector_math.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

struct Sigmoid {
  Vec16 value, complement;  // sigmoid(x), 1 - sigmoid(x)
};

inline Sigmoid sigmoid(Vec16 x) {
  const Vec16 e = exp_nonpositive(neg(abs(x)));
  const Vec16 large = set1(1.0f) / (set1(1.0f) + e);
  const Vec16 small = e * large;
  const Mask16 is_negative = less(x, zero());
  return {select(is_negative, small, large), select(is_negative, large, small)};
}

void forward(const TmSwiGlu& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    const float* gate = a.gate + i * a.in_stride;
    const float* up = a.up + i * a.in_stride;
    float* out = a.out + i * a.out_stride;
    for (size_t j = 0; j < a.d; j += 16) {
      const size_t left = a.d - j;
      const Vec16 g = load_up_to(gate + j, left);
      store_up_to(out + j, g * sigmoid(g).value * load_up_to(up + j, left), left);
    }
  }
}

void backward(const TmSwiGluBackward& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    const size_t in = i * a.in_stride, out = i * a.out_stride;
    for (size_t j = 0; j < a.d; j += 16) {
      const size_t left = a.d - j;
      const Vec16 g = load_up_to(a.gate + in + j, left);
      const Vec16 u = load_up_to(a.up + in + j, left);
      const Vec16 dout = load_up_to(a.dout + out + j, left);
      const Sigmoid s = sigmoid(g);
      const Vec16 silu = g * s.value;
      const Vec16 slope = s.value * fma(g, s.complement, set1(1.0f));
      store_up_to(a.dgate + in + j, dout * u * slope, left);
      store_up_to(a.dup + in + j, dout * silu, left);
      if (a.out) store_up_to(a.out + out + j, silu * u, left);
    }
  }
}

}  // namespace

void register_activation(OpsKernels& kernels) {
  kernels.swiglu_forward = forward;
  kernels.swiglu_backward = backward;
}

}  // namespace TM_ISA
}  // namespace tunemesh
