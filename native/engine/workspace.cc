#include "engine/workspace.h"

#include <algorithm>

#include "engine/rotary.h"

namespace tunemesh {
namespace {

void reserve_layer(const ModelConfig& config, const WorkspaceSpec& spec,
                   std::pair<Arena&, LayerActivations&> target) {
  auto& [arena, layer] = target;
  const size_t n = spec.tokens;
  auto take = [&](size_t count) { return arena.take<float>("activations", count); };
  auto elements = [&](size_t count) { return arena.take_elements("activations", count); };
  layer.rstd1 = take(n);
  layer.q = elements(n * config.query_width());
  if (spec.cache_tokens == 0) {
    layer.k = elements(n * config.kv_width());
    layer.v = elements(n * config.kv_width());
  }
  if (config.qk_norm) {
    layer.q_raw = elements(n * config.query_width());
    layer.k_raw = elements(n * config.kv_width());
    layer.q_rstd = take(n * config.num_heads);
    layer.k_rstd = take(n * config.num_kv_heads);
  }
  layer.attention = elements(n * config.query_width());
  layer.lse = take(n * config.num_heads);
  layer.x_mid = elements(n * config.hidden_size);
  layer.rstd2 = take(n);
  layer.gate = elements(n * config.intermediate_size);
  layer.up = elements(n * config.intermediate_size);
  for (TmElement*& u : layer.lora_u) u = elements(n * spec.lora_rank);
}

}  // namespace

void Workspace::reserve(const ModelConfig& config, const Device& device, Arena& arena) {
  const size_t n = spec.tokens;
  const size_t hidden = config.hidden_size;
  tokens = arena.take<int32_t>("batch", n);
  positions = arena.take<int32_t>("batch", n);
  document_starts = arena.take<int32_t>("batch", n + 1);
  loss_rows = arena.take<int32_t>("batch", n);
  loss_targets = arena.take<int32_t>("batch", n);
  const size_t table = spec.longest_document * config.head_size / 2;
  rotary_cos = arena.take<float>("rotary table", table);
  rotary_sin = arena.take<float>("rotary table", table);

  const size_t num_saved = spec.has_backward ? config.num_layers : 1;
  residual.clear();
  for (size_t i = 0; i < num_saved + 1; ++i) {
    residual.push_back(arena.take_elements("activations", n * hidden));
  }
  layers.assign(num_saved, {});
  for (LayerActivations& layer : layers) reserve_layer(config, spec, {arena, layer});
  if (!spec.has_backward) {
    layers.assign(config.num_layers, layers[0]);
    residual.resize(config.num_layers + 1);
    for (size_t i = 2; i < residual.size(); ++i) residual[i] = residual[i - 2];
  }
  if (spec.cache_tokens != 0) {
    decode_score_stride = (spec.cache_tokens + 15) / 16 * 16;
    decode_scores = arena.take<float>("key/value cache", config.num_heads * decode_score_stride);
    for (LayerActivations& layer : layers) {
      layer.k = arena.take_elements("key/value cache", spec.cache_tokens * config.kv_width());
      layer.v = arena.take_elements("key/value cache", spec.cache_tokens * config.kv_width());
    }
  }

  normed = arena.take_elements("scratch", n * hidden);
  swiglu = arena.take_elements("scratch", n * config.intermediate_size);
  attention_scratch_bytes =
      device.ops().attention_scratch_bytes(device.context(), std::min(spec.longest_document, n),
                                           config.num_heads, config.num_kv_heads, config.head_size);
  attention_scratch = arena.take_bytes("attention scratch", attention_scratch_bytes);

  const size_t rows = spec.loss_rows;
  loss_x = arena.take_elements("loss chunk", rows * hidden);
  loss_normed = arena.take_elements("loss chunk", rows * hidden);
  loss_rstd = arena.take<float>("loss chunk", rows);
  logits = arena.take_elements("loss chunk", rows * config.vocab_size);
  row_losses = arena.take<double>("loss chunk", rows);

  if (!spec.has_backward) return;
  loss_dx = arena.take_elements("loss chunk", rows * hidden);
  dx = arena.take_elements("scratch", n * hidden);
  dnormed = arena.take_elements("scratch", n * hidden);
  dq = arena.take_elements("scratch", n * config.query_width());
  dk = arena.take_elements("scratch", n * config.kv_width());
  dv = arena.take_elements("scratch", n * config.kv_width());
  dattention = arena.take_elements("scratch", n * config.query_width());
  dswiglu = arena.take_elements("scratch", n * config.intermediate_size);
  lora_du = arena.take_elements("scratch", n * spec.lora_rank);
}

void Workspace::fill_rotary(const ModelConfig& config, const Device& device) const {
  const RotaryTable table = rotary_table(config, spec.longest_document);
  TM_RUN(device, copy_in, rotary_cos, table.cos.data(), table.cos.size() * sizeof(float));
  TM_RUN(device, copy_in, rotary_sin, table.sin.data(), table.sin.size() * sizeof(float));
}

}  // namespace tunemesh
