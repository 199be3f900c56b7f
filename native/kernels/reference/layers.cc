// Reference: embedding, normalisation, bias, rotary positions, SwiGLU and loss. See reference.h.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/reference/reference.h"

namespace tunemesh::reference {

template <typename Real>
void embedding_forward(const Embedding<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    for (size_t j = 0; j < a.c; ++j) a.rows[i * a.c + j] = a.table[size_t(a.tokens[i]) * a.c + j];
  }
}

template <typename Real>
void embedding_backward_add(const Embedding<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    for (size_t j = 0; j < a.c; ++j) a.table[size_t(a.tokens[i]) * a.c + j] += a.rows[i * a.c + j];
  }
}

template <typename Real>
void rms_norm_forward(const RmsNorm<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    Real sum = 0;
    for (size_t j = 0; j < a.c; ++j) sum += a.x.row(i)[j] * a.x.row(i)[j];
    const Real rstd = Real(1) / std::sqrt(sum / Real(a.c) + Real(a.epsilon));
    if (a.rstd) a.rstd[i] = rstd;
    for (size_t j = 0; j < a.c; ++j) a.y.row(i)[j] = a.x.row(i)[j] * rstd * a.gain[j];
  }
}

template <typename Real>
void rms_norm_backward(const RmsNormBackward<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    const Real* x = a.x.row(i);
    const Real* dy = a.dy.row(i);
    const Real rstd = a.rstd[i];
    Real mean = 0;
    for (size_t j = 0; j < a.c; ++j) mean += dy[j] * a.gain[j] * (x[j] * rstd);
    mean /= Real(a.c);
    for (size_t j = 0; j < a.c; ++j) {
      if (a.dgain) a.dgain[j] += dy[j] * (x[j] * rstd);
      const Real dx = rstd * (dy[j] * a.gain[j] - x[j] * rstd * mean);
      a.dx.row(i)[j] = a.dx_add ? a.dx.row(i)[j] + dx : dx;
    }
  }
}

template <typename Real>
void bias_add(const Bias<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    for (size_t j = 0; j < a.c; ++j) a.y.row(i)[j] += a.bias[j];
  }
}

template <typename Real>
void bias_grad_add(const Bias<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    for (size_t j = 0; j < a.c; ++j) a.bias[j] += a.y.row(i)[j];
  }
}

template <typename Real>
void rope(const Rope<Real>& a) {
  const size_t half = a.head_size / 2;
  for (size_t i = 0; i < a.n; ++i) {
    const Real* cos = a.cos + size_t(a.positions[i]) * half;
    const Real* sin = a.sin + size_t(a.positions[i]) * half;
    for (size_t h = 0; h < a.heads; ++h) {
      Real* x = a.x.row(i) + h * a.head_size;
      for (size_t j = 0; j < half; ++j) {
        const Real s = a.inverse ? -sin[j] : sin[j];
        const Real low = x[j], high = x[j + half];
        x[j] = low * cos[j] - high * s;
        x[j + half] = high * cos[j] + low * s;
      }
    }
  }
}

template <typename Real>
void swiglu_forward(const SwiGlu<Real>& a) {
  for (size_t i = 0; i < a.n; ++i) {
    for (size_t j = 0; j < a.d; ++j) {
      const Real gate = a.gate.row(i)[j];
      a.out.row(i)[j] = gate / (Real(1) + std::exp(-gate)) * a.up.row(i)[j];
    }
  }
}

template <typename Real>
void swiglu_backward(const SwiGluBackward<Real>& a) {
  const SwiGlu<Real>& f = a.forward;
  for (size_t i = 0; i < f.n; ++i) {
    for (size_t j = 0; j < f.d; ++j) {
      const Real gate = f.gate.row(i)[j], up = f.up.row(i)[j], dout = a.dout.row(i)[j];
      const Real sigmoid = Real(1) / (Real(1) + std::exp(-gate));
      if (f.out.data) f.out.row(i)[j] = gate * sigmoid * up;
      a.dup.row(i)[j] = dout * (gate * sigmoid);
      a.dgate.row(i)[j] = dout * up * sigmoid * (Real(1) + gate * (Real(1) - sigmoid));
    }
  }
}

template <typename Real>
void cross_entropy(const CrossEntropy<Real>& a) {
  for (size_t i = 0; i < a.rows; ++i) {
    Real* x = a.logits.row(i);
    const Real max = *std::max_element(x, x + a.v);
    Real sum = 0;
    for (size_t j = 0; j < a.v; ++j) sum += std::exp(x[j] - max);
    a.row_losses[i] = double(std::log(sum) - (x[a.targets[i]] - max));
    if (!a.dlogits) continue;
    for (size_t j = 0; j < a.v; ++j) {
      const Real p = std::exp(x[j] - max) / sum;
      x[j] = (p - Real(j == size_t(a.targets[i]))) * Real(a.grad_scale);
    }
  }
}

#define INSTANTIATE(Real)                                              \
  template void embedding_forward<Real>(const Embedding<Real>&);       \
  template void embedding_backward_add<Real>(const Embedding<Real>&);  \
  template void rms_norm_forward<Real>(const RmsNorm<Real>&);          \
  template void rms_norm_backward<Real>(const RmsNormBackward<Real>&); \
  template void bias_add<Real>(const Bias<Real>&);                     \
  template void bias_grad_add<Real>(const Bias<Real>&);                \
  template void rope<Real>(const Rope<Real>&);                         \
  template void swiglu_forward<Real>(const SwiGlu<Real>&);             \
  template void swiglu_backward<Real>(const SwiGluBackward<Real>&);    \
  template void cross_entropy<Real>(const CrossEntropy<Real>&);
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace tunemesh::reference
