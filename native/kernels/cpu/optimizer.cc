// AdamW of all trained tensors: cuts the canonical vector into tasks, gives tensors of floats to
// the instruction path's kernel, and updates half ones here, one operation a line as the reference.
//
//   order   elementwise; tasks are ranges of canonical blocks, so threads change nothing
//   floor   28 bytes an element of floats, 14 of half ones with half gradients
#include <string.h>

#include <algorithm>
#include <bit>
#include <cmath>

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

void update_half(const Part& part, const AdamWScalars& s) {
  const TmTrainedTensor& t = part.tensor;
  auto* const ps = static_cast<uint16_t*>(t.p);
  auto* const ms = static_cast<uint16_t*>(t.m);
  auto* const vs = static_cast<uint16_t*>(t.v);
  const bool decays = t.decays && s.has_decay;
  for (size_t first = part.range.begin; first < part.range.end; first += kRoundingGroup) {
    const uint64_t group = (t.first_block * kBlockElements + first) / kRoundingGroup;
    const PhiloxBlock noise = rounding_block(part.call.seed, group, part.call.step);
    const size_t end = std::min<size_t>(first + kRoundingGroup, part.range.end);
    for (size_t i = first; i < end; ++i) {
      const auto k = static_cast<unsigned>(i - first);
      uint16_t* const at = ps + i / t.columns * t.p_stride + i % t.columns;
      const float g = gradient_at(part, i) * s.clip;
      float p = from_half(*at);
      if (decays) p = p - p * s.decay;
      const float before = from_half(ms[i]);
      const float m = before + (g - before) * s.one_minus_beta1;
      const float v = from_half(vs[i]) * s.beta2 + (g * g) * s.one_minus_beta2;
      const float denominator = std::sqrt(v) / s.correction2 + s.epsilon;
      store_rounded(at, p - s.step_size * (m / denominator),
                    rounding_noise(noise, Rounded::kWeight, k));
      store_rounded(ms + i, m, rounding_noise(noise, Rounded::kFirstMoment, k));
      store_rounded(vs + i, v, rounding_noise(noise, Rounded::kSecondMoment, k));
    }
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
      if (tensor->is_half) {
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
