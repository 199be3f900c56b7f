#include "engine/workspace.h"

#include <algorithm>

#include "engine/rotary.h"

namespace tunemesh {
namespace {

// What lies `count` elements further in the same rows; null while counting.
TmElement* beside(const Device& device, TmElement* first, size_t count) {
  return first == nullptr ? nullptr : device.at(first, count);
}

struct LayerSpace {
  const ModelConfig& config;
  const WorkspaceSpec& spec;
  const RowStrides& strides;
  Arena& arena;

  float* floats(size_t count) const { return arena.take<float>("activations", count); }
  TmElement* elements(size_t count) const { return arena.take_elements("activations", count); }
};

// Queries, keys and values, where the linears write them and where attention reads them.
void reserve_heads(const Device& device, const LayerSpace& space, LayerActivations& layer) {
  const ModelConfig& config = space.config;
  const RowStrides& strides = space.strides;
  const size_t n = space.spec.tokens;
  const bool has_cache = space.spec.cache_tokens != 0;
  if (space.spec.groups.is_used && !has_cache) {
    TmElement* const row = space.elements(n * strides.value);
    layer.q_raw = layer.q = row;
    layer.k_raw = layer.k = beside(device, row, config.query_width());
    layer.v = beside(device, layer.k_raw, config.kv_width());
    if (!config.qk_norm) return;
    layer.q = space.elements(n * strides.query);
    layer.k = space.elements(n * strides.key);
  } else {
    layer.q = space.elements(n * strides.query);
    if (!has_cache) {
      layer.k = space.elements(n * strides.key);
      layer.v = space.elements(n * strides.value);
    }
    if (!config.qk_norm) return;
    layer.q_raw = space.elements(n * strides.raw_query);
    layer.k_raw = space.elements(n * strides.raw_key);
  }
  layer.q_rstd = space.floats(n * config.num_heads);
  layer.k_rstd = space.floats(n * config.num_kv_heads);
}

void reserve_layer(const Device& device, const LayerSpace& space, LayerActivations& layer) {
  const ModelConfig& config = space.config;
  const WorkspaceSpec& spec = space.spec;
  const size_t n = spec.tokens;
  layer.rstd1 = space.floats(n);
  reserve_heads(device, space, layer);
  layer.attention = space.elements(n * space.strides.attention);
  layer.lse = space.floats(n * config.num_heads);
  layer.x_mid = space.elements(n * config.hidden_size);
  layer.rstd2 = space.floats(n);
  if (!spec.groups.is_used) {
    layer.gate = space.elements(n * config.intermediate_size);
    layer.up = space.elements(n * config.intermediate_size);
    for (TmElement*& u : layer.lora_u) u = space.elements(n * spec.lora_rank);
    return;
  }
  layer.gate = space.elements(n * space.strides.gate_up);
  layer.up = beside(device, layer.gate, config.intermediate_size);
  if (!spec.has_backward) return;
  for (const Group group : {kQkvGroup, kGateUpGroup, kDownGroup}) {
    layer.tails[group] = space.elements(n * spec.groups.borders[group]);
  }
}

}  // namespace

RowStrides row_strides(const ModelConfig& config, const WorkspaceSpec& spec) {
  const size_t query = config.query_width();
  const size_t kv = config.kv_width();
  const size_t hidden = config.hidden_size;
  const size_t feed_forward = config.intermediate_size;
  const GroupPlan& groups = spec.groups;
  if (!groups.is_used) {
    return {query,        kv,           kv,    query, kv, query, hidden,
            feed_forward, feed_forward, query, kv,    kv, hidden};
  }
  const auto& borders = groups.borders;
  const size_t qkv = groups.row_stride(query + 2 * kv, borders[kQkvGroup]);
  const bool has_cache = spec.cache_tokens != 0;
  RowStrides strides = {};
  strides.raw_query = has_cache ? query : qkv;
  strides.raw_key = strides.value = has_cache ? kv : qkv;
  strides.query = config.qk_norm ? query : strides.raw_query;
  strides.key = config.qk_norm ? kv : strides.raw_key;
  strides.attention = groups.row_stride(query, borders[kOutputGroup]);
  strides.normed = groups.row_stride(hidden, std::max(borders[kQkvGroup], borders[kGateUpGroup]));
  strides.gate_up = groups.row_stride(2 * feed_forward, borders[kGateUpGroup]);
  strides.swiglu = groups.row_stride(feed_forward, borders[kDownGroup]);
  strides.query_grad = strides.key_grad = strides.value_grad = qkv;
  strides.dx = groups.row_stride(hidden, std::max(borders[kOutputGroup], borders[kDownGroup]));
  return strides;
}

void Workspace::reserve(const ModelConfig& config, const Device& device, Arena& arena) {
  const size_t n = spec.tokens;
  const size_t hidden = config.hidden_size;
  strides = row_strides(config, spec);
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
  for (LayerActivations& layer : layers) {
    reserve_layer(device, {config, spec, strides, arena}, layer);
  }
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

  normed = arena.take_elements("scratch", n * strides.normed);
  swiglu = arena.take_elements("scratch", n * strides.swiglu);
  const TmAttentionJob job = {n,
                              std::min(spec.longest_document, n),
                              config.num_heads,
                              config.num_kv_heads,
                              config.head_size,
                              spec.has_backward};
  attention_scratch_bytes = device.ops().attention_scratch_bytes(device.context(), &job);
  attention_scratch = arena.take_bytes("attention scratch", attention_scratch_bytes);

  const size_t rows = spec.loss_rows;
  loss_x = arena.take_elements("loss chunk", rows * hidden);
  loss_normed = arena.take_elements("loss chunk", rows * hidden);
  loss_rstd = arena.take<float>("loss chunk", rows);
  logits = arena.take_elements("loss chunk", rows * config.vocab_size);
  row_losses = arena.take<double>("loss chunk", rows);

  if (spec.has_backward) reserve_backward(config, device, arena);
}

void Workspace::reserve_backward(const ModelConfig& config, const Device& device, Arena& arena) {
  const size_t n = spec.tokens;
  loss_dx = arena.take_elements("loss chunk", spec.loss_rows * config.hidden_size);
  dx = arena.take_elements("scratch", n * strides.dx);
  dnormed = arena.take_elements("scratch", n * config.hidden_size);
  dq = arena.take_elements("scratch", n * strides.query_grad);
  if (spec.groups.is_used) {
    dk = beside(device, dq, config.query_width());
    dv = beside(device, dk, config.kv_width());
  } else {
    dk = arena.take_elements("scratch", n * strides.key_grad);
    dv = arena.take_elements("scratch", n * strides.value_grad);
  }
  dattention = arena.take_elements("scratch", n * config.query_width());
  if (!spec.groups.is_used) {
    dswiglu = arena.take_elements("scratch", n * strides.swiglu);
    lora_du = arena.take_elements("scratch", n * spec.lora_rank);
    return;
  }
  dswiglu = swiglu;
  size_t largest = 0;
  for (const Group group : {kQkvGroup, kGateUpGroup}) {
    largest = std::max(largest, spec.groups.borders[group] * config.hidden_size);
  }
  adapter_grads = arena.take<float>("scratch", largest);
}

void Workspace::fill_rotary(const ModelConfig& config, const Device& device) const {
  const RotaryTable table = rotary_table(config, spec.longest_document);
  TM_RUN(device, copy_in, rotary_cos, table.cos.data(), table.cos.size() * sizeof(float));
  TM_RUN(device, copy_in, rotary_sin, table.sin.data(), table.sin.size() * sizeof(float));
}

}  // namespace tunemesh
