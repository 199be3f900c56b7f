// Reference: AdamW. See reference.h and backend.h; compiled without contraction, so each line
// rounds once.
#include <bit>
#include <cmath>

#include "kernels/reference/reference.h"
#include "kernels/stochastic_rounding.h"

namespace tunemesh::reference {
namespace {

float widened(const void* from, size_t i, bool is_half) {
  if (!is_half) return static_cast<const float*>(from)[i];
  return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(from)[i]} << 16);
}

// How a result of one tensor is stored.
struct Store {
  const TmAdamW& call;
  const TmTrainedTensor& tensor;
  size_t i;  // in the tensor

  void put(void* to, size_t at, float value, Rounded what) const {
    if (!tensor.is_half) {
      static_cast<float*>(to)[at] = value;
      return;
    }
    const uint64_t number = tensor.first_block * 256 + i;
    const PhiloxBlock noise = rounding_block(call.seed, number / kRoundingGroup, call.step);
    const auto element = static_cast<unsigned>(number % kRoundingGroup);
    static_cast<uint16_t*>(to)[at] =
        stochastic_bfloat16(std::bit_cast<uint32_t>(value), rounding_noise(noise, what, element));
  }
};

void update_tensor(const TmAdamW& a, const TmTrainedTensor& t) {
  const float decay = a.learning_rate * a.weight_decay;
  const float one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  const float one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  const float beta2 = static_cast<float>(a.beta2);
  const float step_size = a.learning_rate / a.bias_correction1;
  for (size_t i = 0; i < t.n; ++i) {
    const size_t row = i / t.columns, column = i % t.columns;
    const size_t at = row * t.p_stride + column;
    const float gradient = t.is_half_gradient
                               ? widened(a.half_gradient, t.gradient_offset + i, true)
                               : widened(a.gradient, t.gradient_offset + i, false);
    const float g = gradient * a.clip_factor;
    float p = widened(t.p, at, t.is_half);
    if (t.decays && a.weight_decay != 0.0f) {
      const float shrink = p * decay;
      p = p - shrink;
    }
    const float m_before = widened(t.m, i, t.is_half);
    const float toward = (g - m_before) * one_minus_beta1;
    const float m = m_before + toward;
    const float kept = widened(t.v, i, t.is_half) * beta2;
    const float fresh = (g * g) * one_minus_beta2;
    const float v = kept + fresh;
    const float root = std::sqrt(v) / a.bias_correction2_sqrt;
    const float denominator = root + a.epsilon;
    const float move = step_size * (m / denominator);
    const Store store = {a, t, i};
    store.put(t.p, at, p - move, Rounded::kWeight);
    store.put(t.m, i, m, Rounded::kFirstMoment);
    store.put(t.v, i, v, Rounded::kSecondMoment);
    if (t.copy != nullptr) t.copy[row * t.copy_stride + column] = widened(t.p, at, t.is_half);
  }
}

}  // namespace

void adamw(const TmAdamW& a) {
  for (size_t i = 0; i < a.num_tensors; ++i) update_tensor(a, a.host_tensors[i]);
}

}  // namespace tunemesh::reference
