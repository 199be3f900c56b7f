// Reference: AdamW. See reference.h and backend.h; compiled without contraction, so each line
// rounds once.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/byte_moments.h"
#include "kernels/reference/reference.h"
#include "kernels/stochastic_rounding.h"

namespace tunemesh::reference {
namespace {

float widened(const void* from, size_t i, bool is_half) {
  if (!is_half) return static_cast<const float*>(from)[i];
  return std::bit_cast<float>(uint32_t{static_cast<const uint16_t*>(from)[i]} << 16);
}

struct Place {
  const TmAdamW& call;
  const TmTrainedTensor& tensor;
  size_t i;  // in the tensor

  uint32_t noise(Rounded what) const {
    const uint64_t number = tensor.first_block * 256 + i;
    const PhiloxBlock block = rounding_block(call.seed, number / kRoundingGroup, call.step);
    return rounding_noise(block, what, static_cast<unsigned>(number % kRoundingGroup));
  }
  void put(void* to, size_t at, float value, Rounded what) const {
    if (!tensor.is_half) {
      static_cast<float*>(to)[at] = value;
      return;
    }
    static_cast<uint16_t*>(to)[at] =
        stochastic_bfloat16(std::bit_cast<uint32_t>(value), noise(what));
  }
};

struct Moments {
  float m, v;
};

Moments moments_at(const TmTrainedTensor& t, size_t i) {
  if (t.m_exponents == nullptr) return {widened(t.m, i, t.is_half), widened(t.v, i, t.is_half)};
  return {first_moment_value(static_cast<uint8_t*>(t.m)[i], t.m_exponents[i / 256]),
          second_moment_value(static_cast<uint8_t*>(t.v)[i], t.v_exponents[i / 256])};
}

// Elements from `first` on, at most a block of bytes.
void put_bytes(const TmAdamW& call, const TmTrainedTensor& t, size_t first,
               const std::vector<Moments>& values) {
  uint32_t largest_m = 0, largest_v = 0;
  for (size_t k = 0; k < values.size(); ++k) {
    const Place place = {call, t, first + k};
    const auto bits = [](float value) { return std::bit_cast<uint32_t>(std::fabs(value)); };
    const uint32_t m = noisy_magnitude(bits(values[k].m), place.noise(Rounded::kFirstMoment));
    const uint32_t v = noisy_magnitude(bits(values[k].v), place.noise(Rounded::kSecondMoment));
    largest_m = std::max(largest_m, m);
    largest_v = std::max(largest_v, v);
  }
  const uint32_t m_exponent = block_exponent(largest_m), v_exponent = block_exponent(largest_v);
  t.m_exponents[first / 256] = static_cast<uint8_t>(m_exponent);
  t.v_exponents[first / 256] = static_cast<uint8_t>(v_exponent);
  for (size_t k = 0; k < values.size(); ++k) {
    const Place place = {call, t, first + k};
    static_cast<uint8_t*>(t.m)[first + k] =
        first_moment_code(values[k].m, place.noise(Rounded::kFirstMoment), m_exponent);
    static_cast<uint8_t*>(t.v)[first + k] =
        second_moment_code(values[k].v, place.noise(Rounded::kSecondMoment), v_exponent);
  }
}

void update_tensor(const TmAdamW& a, const TmTrainedTensor& t) {
  const float decay = a.learning_rate * a.weight_decay;
  const float one_minus_beta1 = static_cast<float>(1.0 - a.beta1);
  const float one_minus_beta2 = static_cast<float>(1.0 - a.beta2);
  const float beta2 = static_cast<float>(a.beta2);
  const float step_size = a.learning_rate / a.bias_correction1;
  std::vector<Moments> block;
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
    const Moments before = moments_at(t, i);
    const float toward = (g - before.m) * one_minus_beta1;
    const float m = before.m + toward;
    const float kept = before.v * beta2;
    const float fresh = (g * g) * one_minus_beta2;
    const float v = kept + fresh;
    const float root = std::sqrt(v) / a.bias_correction2_sqrt;
    const float denominator = root + a.epsilon;
    const float move = step_size * (m / denominator);
    const Place place = {a, t, i};
    place.put(t.p, at, p - move, Rounded::kWeight);
    if (t.copy != nullptr) t.copy[row * t.copy_stride + column] = widened(t.p, at, t.is_half);
    if (t.m_exponents == nullptr) {
      place.put(t.m, i, m, Rounded::kFirstMoment);
      place.put(t.v, i, v, Rounded::kSecondMoment);
      continue;
    }
    block.push_back({m, v});
    if (block.size() < 256 && i + 1 < t.n) continue;
    put_bytes(a, t, i + 1 - block.size(), block);
    block.clear();
  }
}

}  // namespace

void adamw(const TmAdamW& a) {
  for (size_t i = 0; i < a.num_tensors; ++i) update_tensor(a, a.host_tensors[i]);
}

}  // namespace tunemesh::reference
