#include "engine/workspace.h"

#include <algorithm>

#include "engine/rotary.h"

namespace tunemesh {
namespace {

// What lies `count` elements further in the same rows; null while counting.
TmElement* beside(const Device& device, TmElement* first, size_t count) {
  return first == nullptr ? nullptr : device.at(first, count);
}

// Rows of two groups as e4m3 numbers, in the same memory: one of them runs at a time.
struct QuantisedRows {
  const WorkspaceSpec& spec;
  Group groups[2];

  // The widest input or output; 0: the groups are not fp8.
  size_t width() const {
    size_t widest = 0;
    for (const Group group : groups) {
      const TmGroupShape& shape = spec.groups.shapes[group];
      if (!spec.groups.is_used || !shape.is_fp8) continue;
      widest = std::max({widest, shape.in, spec.groups.out_width(group)});
    }
    return widest;
  }
  size_t num_bytes() const {
    return scales_at() + (width() == 0 ? 0 : spec.tokens * sizeof(float));
  }
  void place(void* memory, std::array<TmQuantised, kNumGroups>& quantised) const {
    if (memory == nullptr || width() == 0) return;
    auto* const q = static_cast<uint8_t*>(memory);
    for (const Group group : groups) {
      quantised[group] = {q, reinterpret_cast<float*>(q + scales_at())};
    }
  }

 private:
  size_t scales_at() const { return (spec.tokens * width() + 63) / 64 * 64; }
};

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

void Workspace::reserve(const ModelConfig& config, const Device& device, const Arenas& arenas) {
  Arena& arena = arenas.device;
  const size_t n = spec.tokens;
  strides = row_strides(config, spec);
  tokens = arena.take<int32_t>("batch", n);
  positions = arena.take<int32_t>("batch", n);
  document_starts = arena.take<int32_t>("batch", n + 1);
  loss_rows = arena.take<int32_t>("batch", n);
  loss_targets = arena.take<int32_t>("batch", n);
  row_losses = arena.take<double>("batch", n);
  const size_t table = spec.longest_document * config.head_size / 2;
  rotary_cos = arena.take<float>("rotary table", table);
  rotary_sin = arena.take<float>("rotary table", table);
  reserve_scratch(config, device, arena);
  reserve_layers(config, device, arenas);
}

void Workspace::reserve_scratch(const ModelConfig& config, const Device& device, Arena& arena) {
  const size_t n = spec.tokens;
  normed = arena.take_elements("scratch", n * strides.normed);
  const auto take_shared = [&](void* base) {
    Region attention(device, base), mlp(device, base), loss(device, base);
    take_attention_scratch(config, attention);
    take_mlp_scratch(mlp);
    take_loss_scratch(config, loss);
    return std::max({attention.num_bytes(), mlp.num_bytes(), loss.num_bytes()});
  };
  take_shared(arena.take_bytes("scratch", take_shared(nullptr)));
  if (!spec.has_backward) return;
  dx = arena.take_elements("scratch", n * strides.dx);
  dnormed = arena.take_elements("scratch", n * config.hidden_size);
  if (!spec.groups.is_used) lora_du = arena.take_elements("scratch", n * spec.lora_rank);
}

void Workspace::take_attention_scratch(const ModelConfig& config, Region& region) {
  const size_t n = spec.tokens;
  const Device& device = region.device();
  const TmAttentionJob job = {n,
                              std::min(spec.longest_document, n),
                              config.num_heads,
                              config.num_kv_heads,
                              config.head_size,
                              spec.has_backward};
  attention_scratch_bytes = device.ops().attention_scratch_bytes(device.context(), &job);
  if (attention_scratch_bytes == SIZE_MAX) {
    throw EngineError("MODEL_UNSUPPORTED",
                      std::string(device.ops().name) + ": " + device.ops().last_error() + ".");
  }
  const QuantisedRows rows = {spec, {kQkvGroup, kOutputGroup}};
  attention_scratch = region.take_bytes(std::max(attention_scratch_bytes, rows.num_bytes()));
  rows.place(attention_scratch, quantised);
  if (!spec.has_backward) return;
  dq = region.take_elements(n * strides.query_grad);
  if (spec.groups.is_used) {
    dk = beside(device, dq, config.query_width());
    dv = beside(device, dk, config.kv_width());
  } else {
    dk = region.take_elements(n * strides.key_grad);
    dv = region.take_elements(n * strides.value_grad);
  }
  dattention = region.take_elements(n * config.query_width());
}

void Workspace::take_mlp_scratch(Region& region) {
  swiglu = dswiglu = region.take_elements(spec.tokens * strides.swiglu);
  if (spec.has_backward && !spec.groups.is_used) {
    dswiglu = region.take_elements(spec.tokens * strides.swiglu);
  }
  const QuantisedRows rows = {spec, {kGateUpGroup, kDownGroup}};
  rows.place(region.take_bytes(rows.num_bytes()), quantised);
}

void Workspace::take_loss_scratch(const ModelConfig& config, Region& region) {
  const size_t rows = spec.loss_rows;
  loss_x = region.take_elements(rows * config.hidden_size);
  loss_normed = region.take_elements(rows * config.hidden_size);
  loss_rstd = region.take<float>(rows);
  logits = region.take_elements(rows * config.vocab_size);
  if (spec.has_backward) loss_dx = region.take_elements(rows * config.hidden_size);
}

void Workspace::fill_rotary(const ModelConfig& config, const Device& device) const {
  const RotaryTable table = rotary_table(config, spec.longest_document);
  TM_RUN(device, copy_in, rotary_cos, table.cos.data(), table.cos.size() * sizeof(float));
  TM_RUN(device, copy_in, rotary_sin, table.sin.data(), table.sin.size() * sizeof(float));
}

}  // namespace tunemesh
