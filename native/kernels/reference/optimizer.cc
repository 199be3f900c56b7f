// Reference: AdamW. See reference.h and backend.h; compiled without contraction, so each line
// rounds once.
#include <cmath>

#include "kernels/reference/reference.h"

namespace tunemesh::reference {

void adamw(const TmAdamW& a) {
  const float decay = a.learning_rate * a.weight_decay;
  const float one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  const float one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  const float beta2 = static_cast<float>(a.beta2);
  const float step_size = a.learning_rate / a.bias_correction1;
  for (size_t i = 0; i < a.n; ++i) {
    const float g = a.gradient[i] * a.clip_factor;
    float p = a.p[i];
    if (a.weight_decay != 0.0f) {
      const float shrink = p * decay;
      p = p - shrink;
    }
    const float toward = (g - a.m[i]) * one_minus_beta1;
    const float m = a.m[i] + toward;
    const float kept = a.v[i] * beta2;
    const float fresh = (g * g) * one_minus_beta2;
    const float v = kept + fresh;
    const float root = std::sqrt(v) / a.bias_correction2_sqrt;
    const float denominator = root + a.epsilon;
    const float move = step_size * (m / denominator);
    a.p[i] = p - move;
    a.m[i] = m;
    a.v[i] = v;
  }
}

}  // namespace tunemesh::reference
