// RMS normalisation.
//   forward   y[n,c] = (x[n,c] rstd[n]) gain[c],  rstd[n] = 1 / sqrt(mean_c(x[n,c]^2) + epsilon)
//   backward  dx = rstd (dy gain - x k),  k[n] = rstd[n]^2 mean_c(dy gain x)
//             dgain[c] += sum_n dy x rstd
//
//   shapes  x, y, dy, dx [n, c] in rows of their strides; gain, dgain [c]; rstd [n]. For q/k norm
//           a row is one head: q and k are dense [tokens, heads * F], so n = tokens * heads and
//           c = stride = F
//   alias   y may be x; dx may be dy (not where dx_add)
//   order   sums over c: dot() of vector_math.h, fma; then rstd and k in double, rounded once.
//           dgain: one fma chain over ascending n from the old value
//   floor   forward 8 N C bytes, backward 16 N C, plus 8 N C where the gain is trained
//   source  Zhang & Sennrich 2019, with epsilon inside the root as in the Llama checkpoints
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/vector_math.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

void forward(const TmRmsNorm& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    const float* x = a.x + i * a.x_stride;
    float* y = a.y + i * a.y_stride;
    const double mean = static_cast<double>(dot(x, x, a.c)) / static_cast<double>(a.c);
    const float rstd =
        static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(a.epsilon)));
    if (a.rstd) a.rstd[i] = rstd;
    const Vec16 r = set1(rstd);
    for (size_t j = 0; j < a.c; j += 16) {
      const size_t left = a.c - j;
      store_up_to(y + j, load_up_to(x + j, left) * r * load_up_to(a.gain + j, left), left);
    }
  }
}

// sum over c of (dy * gain) * x, in the order of dot().
float weighted_dot(const TmRmsNormBackward& a, const float* dy, const float* x) {
  Vec16 s[4] = {zero(), zero(), zero(), zero()};
  size_t j = 0;
  for (; j + 64 <= a.c; j += 64) {
    for (size_t k = 0; k < 4; ++k) {
      const size_t at = j + 16 * k;
      s[k] = fma(load(dy + at) * load(a.gain + at), load(x + at), s[k]);
    }
  }
  for (; j < a.c; j += 16) {
    const size_t left = a.c - j;
    const Vec16 g = load_up_to(dy + j, left) * load_up_to(a.gain + j, left);
    s[0] = fma(g, load_up_to(x + j, left), s[0]);
  }
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

void backward(const TmRmsNormBackward& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    const float* x = a.x + i * a.x_stride;
    const float* dy = a.dy + i * a.dy_stride;
    float* dx = a.dx + i * a.dx_stride;
    const double rstd = static_cast<double>(a.rstd[i]);
    const double mean = static_cast<double>(weighted_dot(a, dy, x)) / static_cast<double>(a.c);
    const Vec16 k = set1(static_cast<float>(rstd * rstd * mean));
    const Vec16 r = set1(a.rstd[i]);
    for (size_t j = 0; j < a.c; j += 16) {
      const size_t left = a.c - j;
      const Vec16 g = load_up_to(dy + j, left) * load_up_to(a.gain + j, left);
      const Vec16 inner = fnma(load_up_to(x + j, left), k, g);
      const Vec16 result = a.dx_add ? fma(inner, r, load_up_to(dx + j, left)) : inner * r;
      store_up_to(dx + j, result, left);
    }
  }
}

void gain_grad(const TmRmsNormBackward& a, Range columns) {
  for (size_t j = columns.begin; j < columns.end; j += 16) {
    const size_t left = columns.end - j;
    Vec16 s = load_up_to(a.dgain + j, left);
    for (size_t i = 0; i < a.n; ++i) {
      const Vec16 normed = load_up_to(a.x + i * a.x_stride + j, left) * set1(a.rstd[i]);
      s = fma(load_up_to(a.dy + i * a.dy_stride + j, left), normed, s);
    }
    store_up_to(a.dgain + j, s, left);
  }
}

}  // namespace

void register_norm(OpsKernels& kernels) {
  kernels.rms_norm_forward = forward;
  kernels.rms_norm_backward = backward;
  kernels.rms_norm_gain_grad = gain_grad;
}

}  // namespace TM_ISA
}  // namespace tunemesh
