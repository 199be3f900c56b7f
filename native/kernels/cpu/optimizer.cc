// AdamW of all trained tensors: cuts the canonical vector into tasks, gives tensors of floats to
// the instruction path's kernel, and updates half ones here, one operation a line as the reference.
//
//   order   elementwise; tasks are ranges of canonical blocks, so threads change nothing
//   floor   28 bytes an element of floats, 14 of half ones with half gradients
#include <string.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "kernels/byte_moments.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/ops_table.h"
#include "kernels/stochastic_rounding.h"

namespace tunemesh {
namespace {

constexpr size_t kBlockElements = 256;
constexpr size_t kTaskBlocks = 64;

float from_half(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Elements [begin, end) of one tensor.
struct Part {
  const TmAdamW& call;
  const TmTrainedTensor& tensor;
  Range range;
};

float gradient_at(const Part& part, size_t i) {
  const size_t at = part.tensor.gradient_offset + i;
  return part.tensor.is_half_gradient ? from_half(part.call.half_gradient[at])
                                      : part.call.gradient[at];
}

void store_rounded(uint16_t* to, float value, uint32_t noise) {
  *to = stochastic_bfloat16(std::bit_cast<uint32_t>(value), noise);
}

// An element of a half tensor in float32, but for its rounding: the weight is stored.
struct HalfUpdate {
  const Part& part;
  const AdamWScalars& s;
  PhiloxBlock noise = {};  // of the element's group

  void start_group(size_t i) {
    const uint64_t group = (part.tensor.first_block * kBlockElements + i) / kRoundingGroup;
    noise = rounding_block(part.call.seed, group, part.call.step);
  }
  void run(size_t i, float& m, float& v) const {
    const TmTrainedTensor& t = part.tensor;
    uint16_t* const at = static_cast<uint16_t*>(t.p) + i / t.columns * t.p_stride + i % t.columns;
    const float g = gradient_at(part, i) * s.clip;
    float p = from_half(*at);
    if (t.decays && s.has_decay) p = p - p * s.decay;
    m = m + (g - m) * s.one_minus_beta1;
    v = v * s.beta2 + (g * g) * s.one_minus_beta2;
    const float denominator = std::sqrt(v) / s.correction2 + s.epsilon;
    store_rounded(at, p - s.step_size * (m / denominator), noise_of(Rounded::kWeight, i));
  }
  uint32_t noise_of(Rounded what, size_t i) const {
    return rounding_noise(noise, what, static_cast<unsigned>(i % kRoundingGroup));
  }
};

void update_half(const Part& part, const AdamWScalars& s) {
  auto* const ms = static_cast<uint16_t*>(part.tensor.m);
  auto* const vs = static_cast<uint16_t*>(part.tensor.v);
  HalfUpdate update = {part, s};
  for (size_t i = part.range.begin; i < part.range.end; ++i) {
    if (i % kRoundingGroup == 0) update.start_group(i);
    float m = from_half(ms[i]), v = from_half(vs[i]);
    update.run(i, m, v);
    store_rounded(ms + i, m, update.noise_of(Rounded::kFirstMoment, i));
    store_rounded(vs + i, v, update.noise_of(Rounded::kSecondMoment, i));
  }
}

// One block, moments of bytes.
void update_byte_block(const Part& part, const AdamWScalars& s) {
  const TmTrainedTensor& t = part.tensor;
  const auto [begin, end] = part.range;
  uint8_t& m_exponent = t.m_exponents[begin / kBlockElements];
  uint8_t& v_exponent = t.v_exponents[begin / kBlockElements];
  auto* const m_codes = static_cast<uint8_t*>(t.m) + begin;
  auto* const v_codes = static_cast<uint8_t*>(t.v) + begin;
  float m[kBlockElements], v[kBlockElements];
  uint32_t m_noise[kBlockElements], v_noise[kBlockElements];
  uint32_t largest_m = 0, largest_v = 0;
  HalfUpdate update = {part, s};
  for (size_t i = begin; i < end; ++i) {
    if (i % kRoundingGroup == 0) update.start_group(i);
    const size_t k = i - begin;
    m[k] = first_moment_value(m_codes[k], m_exponent);
    v[k] = second_moment_value(v_codes[k], v_exponent);
    update.run(i, m[k], v[k]);
    m_noise[k] = update.noise_of(Rounded::kFirstMoment, i);
    v_noise[k] = update.noise_of(Rounded::kSecondMoment, i);
    largest_m = std::max(largest_m, noisy_magnitude(bits_of_float(m[k]) & 0x7fffffffu, m_noise[k]));
    largest_v = std::max(largest_v, noisy_magnitude(bits_of_float(v[k]) & 0x7fffffffu, v_noise[k]));
  }
  m_exponent = static_cast<uint8_t>(block_exponent(largest_m));
  v_exponent = static_cast<uint8_t>(block_exponent(largest_v));
  for (size_t k = 0; k < end - begin; ++k) {
    m_codes[k] = first_moment_code(m[k], m_noise[k], m_exponent);
    v_codes[k] = second_moment_code(v[k], v_noise[k], v_exponent);
  }
}

void update_bytes(const Part& part, const AdamWScalars& s) {
  for (size_t first = part.range.begin; first < part.range.end; first += kBlockElements) {
    const size_t end = std::min(first + kBlockElements, part.range.end);
    update_byte_block({part.call, part.tensor, {first, end}}, s);
  }
}

void update_floats(const Part& part, const AdamWScalars& s, const OpsKernels& ops) {
  const TmTrainedTensor& t = part.tensor;
  const size_t first = part.range.begin;
  ops.adamw({static_cast<float*>(t.p) + first, static_cast<float*>(t.m) + first,
             static_cast<float*>(t.v) + first, part.call.gradient + t.gradient_offset + first,
             part.range.end - first, t.decays && s.has_decay},
            s);
}

// Elements are floats here, so a copy of floats is one as they are.
void copy_weights(const Part& part) {
  const TmTrainedTensor& t = part.tensor;
  for (size_t i = part.range.begin; i < part.range.end;) {
    const size_t row = i / t.columns, column = i % t.columns;
    const size_t count = std::min(t.columns - column, part.range.end - i);
    TmElement* const to = t.copy + row * t.copy_stride + column;
    if (t.is_half) {
      const uint16_t* const from = static_cast<uint16_t*>(t.p) + row * t.p_stride + column;
      for (size_t k = 0; k < count; ++k) to[k] = from_half(from[k]);
    } else {
      memcpy(to, static_cast<float*>(t.p) + i, count * sizeof(float));
    }
    i += count;
  }
}

}  // namespace

TmStatus adamw(TmContext* context, const TmAdamW* args) {
  const AdamWScalars scalars(*args);
  const OpsKernels& ops = context->kernels.ops;
  parallel_ranges(context->pool, args->num_blocks, kTaskBlocks, [&](size_t begin, size_t end) {
    const TmTrainedTensor* const all = args->tensors;
    const TmTrainedTensor* tensor = std::upper_bound(all, all + args->num_tensors, begin,
                                                     [](size_t block, const TmTrainedTensor& t) {
                                                       return block < t.first_block;
                                                     }) -
                                    1;
    for (; tensor < all + args->num_tensors && tensor->first_block < end; ++tensor) {
      const size_t start = tensor->first_block;
      const size_t from = begin > start ? (begin - start) * kBlockElements : 0;
      const size_t to = std::min(tensor->n, (end - start) * kBlockElements);
      if (from >= to) continue;
      const Part part = {*args, *tensor, {from, to}};
      if (tensor->m_exponents != nullptr) {
        update_bytes(part, scalars);
      } else if (tensor->is_half) {
        update_half(part, scalars);
      } else {
        update_floats(part, scalars, ops);
      }
      if (tensor->copy != nullptr) copy_weights(part);
    }
  });
  return TM_OK;
}

}  // namespace tunemesh
