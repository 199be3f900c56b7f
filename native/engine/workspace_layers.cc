// The part of a workspace that is kept of each layer: in buffers of its own, in buffers that layers
// share, or in a place from which it moves to the host.
#include "engine/workspace.h"

namespace tunemesh {
namespace {

struct LayerSpace {
  const ModelConfig& config;
  const WorkspaceSpec& spec;
  const RowStrides& strides;
};

TmElement* beside(const Region& region, TmElement* first, size_t count) {
  return first == nullptr ? nullptr : region.device().at(first, count);
}

// Queries, keys and values, where the linears write them and where attention reads them.
void take_heads(Region& region, const LayerSpace& space, LayerActivations& layer) {
  const ModelConfig& config = space.config;
  const RowStrides& strides = space.strides;
  const size_t n = space.spec.tokens;
  const bool has_cache = space.spec.cache_tokens != 0;
  if (space.spec.groups.is_used && !has_cache) {
    TmElement* const row = region.take_elements(n * strides.value);
    layer.q_raw = layer.q = row;
    layer.k_raw = layer.k = beside(region, row, config.query_width());
    layer.v = beside(region, layer.k_raw, config.kv_width());
    if (!config.qk_norm) return;
    layer.q = region.take_elements(n * strides.query);
    layer.k = region.take_elements(n * strides.key);
  } else {
    layer.q = region.take_elements(n * strides.query);
    if (!has_cache) {
      layer.k = region.take_elements(n * strides.key);
      layer.v = region.take_elements(n * strides.value);
    }
    if (!config.qk_norm) return;
    layer.q_raw = region.take_elements(n * strides.raw_query);
    layer.k_raw = region.take_elements(n * strides.raw_key);
  }
  layer.q_rstd = region.take<float>(n * config.num_heads);
  layer.k_rstd = region.take<float>(n * config.num_kv_heads);
}

// A tail that backward reads when the rows it stood in are long overwritten.
void take_tail(Region& region, const LayerSpace& space, TmElement*& tail, Group group) {
  const GroupPlan& groups = space.spec.groups;
  if (!groups.is_used || !space.spec.has_backward) return;
  tail = region.take_elements(space.spec.tokens * groups.borders[group]);
}

void take_lora_u(Region& region, const LayerSpace& space, TmElement*& lora_u) {
  if (space.spec.groups.is_used) return;
  lora_u = region.take_elements(space.spec.tokens * space.spec.lora_rank);
}

// Up to the middle of the layer.
void take_attention_half(Region& region, const LayerSpace& space, LayerActivations& layer) {
  const size_t n = space.spec.tokens;
  layer.rstd1 = region.take<float>(n);
  take_heads(region, space, layer);
  layer.attention = region.take_elements(n * space.strides.attention);
  layer.lse = region.take<float>(n * space.config.num_heads);
  layer.x_mid = region.take_elements(n * space.config.hidden_size);
  for (int which = kQuery; which <= kOutput; ++which) {
    take_lora_u(region, space, layer.lora_u[which]);
  }
  if (!layer.keeps_inputs) take_tail(region, space, layer.tails[kQkvGroup], kQkvGroup);
}

void take_gate_up(Region& region, const LayerSpace& space, LayerActivations& layer) {
  const ModelConfig& config = space.config;
  const size_t n = space.spec.tokens;
  layer.rstd2 = region.take<float>(n);
  layer.gate = region.take_elements(n * space.strides.gate_up);
  if (space.spec.groups.is_used) {
    layer.up = beside(region, layer.gate, config.intermediate_size);
  } else {
    layer.up = region.take_elements(n * space.strides.gate_up);
  }
  for (const Linear which : {kGate, kUp}) take_lora_u(region, space, layer.lora_u[which]);
  if (!layer.keeps_inputs) take_tail(region, space, layer.tails[kGateUpGroup], kGateUpGroup);
}

// The layer's own in training: the product that gives it, down_proj's, is never computed again.
void take_down_input(Region& region, const LayerSpace& space, LayerActivations& layer) {
  take_lora_u(region, space, layer.lora_u[kDown]);
  if (!layer.keeps_inputs) take_tail(region, space, layer.tails[kDownGroup], kDownGroup);
}

void take_inputs(Region& region, const LayerSpace& space, LayerActivations& layer) {
  const size_t n = space.spec.tokens;
  layer.normed1 = region.take_elements(n * space.strides.normed);
  layer.normed2 = region.take_elements(n * space.strides.normed);
  layer.swiglu = region.take_elements(n * space.strides.swiglu);
}

void take_kept(Region& region, const LayerSpace& space, LayerActivations& layer) {
  take_attention_half(region, space, layer);
  take_gate_up(region, space, layer);
}

constexpr size_t kNumLanes = 2;  // places of offloaded layers
enum SharedPlace { kFirstLane = 0, kAttentionHalf = kNumLanes, kGateUp, kDownInput, kNumPlaces };

// The buffers that layers share: reserved once, where any layer needs them.
class SharedPlaces {
 public:
  SharedPlaces(const Device& device, const LayerSpace& space, Arena& arena)
      : device_(device), space_(space), arena_(arena) {}

  using Take = void (*)(Region&, const LayerSpace&, LayerActivations&);
  // In memory of the layer's own.
  void* take_own(Take take, LayerActivations& layer) {
    void* const base = arena_.take_bytes("activations", size_of(take, layer));
    take_at(base, take, layer);
    return base;
  }
  // In the place number `place`, for everyone who takes it there.
  void* take_shared(size_t place, Take take, LayerActivations& layer) {
    Place& found = places_[place];
    if (!found.is_taken) found = {true, take_own(take, layer)};
    take_at(found.base, take, layer);
    return found.base;
  }
  size_t size_of(Take take, LayerActivations layer) const {
    Region counted(device_, nullptr);
    take(counted, space_, layer);
    return counted.num_bytes();
  }

 private:
  struct Place {
    bool is_taken = false;
    void* base = nullptr;
  };
  void take_at(void* base, Take take, LayerActivations& layer) const {
    Region region(device_, base);
    take(region, space_, layer);
  }

  const Device& device_;
  const LayerSpace& space_;
  Arena& arena_;
  std::array<Place, kNumPlaces> places_;
};
// Which layers were the last ones, in forward, to write the places that layers share.
struct LastWriters {
  size_t attention = 0, gate_up = 0;
  std::vector<size_t> offloaded;  // ascending
  explicit LastWriters(const std::vector<LayerPlan>& plans) {
    for (size_t layer = 0; layer < plans.size(); ++layer) {
      if (plans[layer].keep == Keep::kInput) attention = layer;
      if (plans[layer].keep >= Keep::kAttentionHalf) gate_up = layer;
      if (plans[layer].is_offloaded) offloaded.push_back(layer);
    }
  }
};

// A layer that stays on the device.
void place_layer(SharedPlaces& places, Keep keep, LayerActivations& layer) {
  if (keep == Keep::kInput) {
    places.take_shared(kAttentionHalf, take_attention_half, layer);
  } else {
    places.take_own(take_attention_half, layer);
  }
  if (keep >= Keep::kAttentionHalf) {
    places.take_shared(kGateUp, take_gate_up, layer);
  } else {
    places.take_own(take_gate_up, layer);
  }
}

}  // namespace

void Workspace::reserve_layers(const ModelConfig& config, const Device& device,
                               const Arenas& arenas) {
  const LayerSpace space = {config, spec, strides};
  std::vector<LayerPlan> plans = spec.layers;
  if (plans.empty()) plans.assign(config.num_layers, {});
  if (!spec.has_backward) plans.assign(config.num_layers, {Keep::kInput});
  residual.clear();
  for (size_t i = 0; i <= config.num_layers; ++i) {
    const bool has_own = spec.has_backward || i < 2;
    const size_t count = spec.tokens * config.hidden_size;
    residual.push_back(has_own ? arenas.device.take_elements("activations", count)
                               : residual[i - 2]);
  }
  const LastWriters last(plans);
  SharedPlaces places(device, space, arenas.device);
  layers.assign(config.num_layers, {});
  for (size_t index = 0; index < config.num_layers; ++index) {
    const Keep keep = plans[index].keep;
    LayerActivations& layer = layers[index];
    layer.keeps_inputs = keep == Keep::kEverything;
    layer.normed1 = layer.normed2 = normed;
    layer.swiglu = swiglu;
    if (layer.keeps_inputs) places.take_own(take_inputs, layer);
    if (spec.has_backward) {
      places.take_own(take_down_input, layer);
    } else {
      places.take_shared(kDownInput, take_down_input, layer);
    }
    if (!plans[index].is_offloaded) place_layer(places, keep, layer);
    if (!spec.has_backward) continue;
    layer.recomputes_attention = keep == Keep::kInput && index != last.attention;
    layer.recomputes_gate_up = keep >= Keep::kAttentionHalf && index != last.gate_up;
  }
  transfers.assign(last.offloaded.empty() ? 0 : config.num_layers, {});
  for (size_t turn = 0; turn < last.offloaded.size(); ++turn) {
    LayerActivations& layer = layers[last.offloaded[turn]];
    LayerTransfer& transfer = transfers[last.offloaded[turn]];
    const size_t lane = turn % kNumLanes;
    transfer.lane = static_cast<int>(lane);
    transfer.num_bytes = places.size_of(take_kept, layer);
    transfer.device = places.take_shared(kFirstLane + lane, take_kept, layer);
    transfer.is_moved = turn + kNumLanes < last.offloaded.size();
    if (turn >= kNumLanes) transfer.below = static_cast<int>(last.offloaded[turn - kNumLanes]);
    if (!transfer.is_moved) continue;
    transfer.host = arenas.host->take_bytes("offloaded activations", transfer.num_bytes);
  }
  if (spec.cache_tokens != 0) reserve_cache(config, arenas.device);
}

void Workspace::reserve_cache(const ModelConfig& config, Arena& arena) {
  decode_score_stride = (spec.cache_tokens + 15) / 16 * 16;
  decode_scores = arena.take<float>("key/value cache", config.num_heads * decode_score_stride);
  for (LayerActivations& layer : layers) {
    for (TmElement** rows : {&layer.k, &layer.v}) {
      *rows = arena.take_elements("key/value cache", spec.cache_tokens * config.kv_width());
    }
  }
}

}  // namespace tunemesh
