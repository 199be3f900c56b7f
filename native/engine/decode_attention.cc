#include "engine/decode_attention.h"

#include <algorithm>
#include <cmath>

namespace tunemesh {
namespace {

// Eight chains, so that the compiler can use vectors without changing an order of its own.
float dot(const float* a, const float* b, size_t count) {
  float lanes[8] = {};
  size_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (size_t lane = 0; lane < 8; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < count; ++i) lanes[i % 8] += a[i] * b[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace

void decode_attention(const Pass& pass, const LayerActivations& saved) {
  const ModelConfig& config = pass.config;
  const size_t head_size = config.head_size;
  const size_t stride = config.kv_width();
  const size_t last = pass.cache_start;
  const size_t window = config.sliding_window;
  const size_t first = window > 0 && last + 1 > window ? last + 1 - window : 0;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_size)));
  float* const scores = pass.work.decode_scores;
  for (size_t head = 0; head < config.num_heads; ++head) {
    const size_t kv_head = head / (config.num_heads / config.num_kv_heads);
    const float* q = saved.q + head * head_size;
    float* out = saved.attention + head * head_size;
    float largest = -INFINITY;
    for (size_t j = first; j <= last; ++j) {
      scores[j] = dot(q, saved.k + j * stride + kv_head * head_size, head_size) * scale;
      largest = std::max(largest, scores[j]);
    }
    float total = 0;
    std::fill(out, out + head_size, 0.0f);
    for (size_t j = first; j <= last; ++j) {
      const float weight = std::exp(scores[j] - largest);
      const float* v = saved.v + j * stride + kv_head * head_size;
      total += weight;
      for (size_t i = 0; i < head_size; ++i) out[i] += weight * v[i];
    }
    for (size_t i = 0; i < head_size; ++i) out[i] /= total;
  }
}

}  // namespace tunemesh
