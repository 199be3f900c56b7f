#include "engine/trained_vector.h"

namespace tunemesh {
namespace {

constexpr const char* kWeightsUse = "trained weights";
constexpr const char* kCopiesUse = "working copies";
constexpr const char* kMomentsUse = "optimizer moments";

// Pointers into the trained vector by tensor name.
struct Lookup {
  const TrainedVector& trained;

  size_t index(const std::string& name) const {
    const TrainedTensor* found = trained.layout->find(name);
    if (found == nullptr) throw EngineError("INTERNAL", "no trained tensor named " + name + ".");
    return static_cast<size_t>(found - trained.layout->tensors.data());
  }
  const float* weight(const std::string& name) const { return trained.rows(index(name)); }
  TmWeight matrix(const std::string& name) const {
    const size_t tensor = index(name);
    const std::vector<size_t>& shape = trained.layout->tensors[tensor].shape;
    return {trained.rows(tensor), trained.packed[tensor], shape[0], shape[1]};
  }
  void* grad(const std::string& name) const { return trained.gradient_of(index(name)); }
  // Of tensors that never have half gradients.
  float* float_grad(const std::string& name) const { return static_cast<float*>(grad(name)); }
  NormWeights norm(const std::string& name) const { return {weight(name), float_grad(name)}; }
};

// What an update knows of each tensor before the weights' places are known.
std::vector<TmTrainedTensor> describe(const TrainedVector& trained) {
  const HalfStates& half = trained.half;
  std::vector<TmTrainedTensor> all;
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = trained.layout->tensors[i];
    const size_t offset = tensor.offset();
    TmTrainedTensor entry = {};
    entry.n = tensor.num_elements;
    entry.columns = entry.p_stride = tensor.shape.back();
    entry.first_block = tensor.first_block;
    entry.gradient_offset = offset;
    entry.decays = trained.is_vector(i) ? 0 : 1;
    if (!trained.is_half) {
      entry.p = trained.weights + offset;
      if (trained.m != nullptr) {  // null for inference
        entry.m = trained.m + offset;
        entry.v = trained.v + offset;
      }
    } else if (trained.is_vector(i)) {
      const size_t at = half.vector_offsets[i];
      entry.p = half.vectors + at;
      entry.m = half.vector_m + at;
      entry.v = half.vector_v + at;
      if (trained.has_half_gradient) entry.gradient_offset = at;
    } else {
      entry.p = half.p == nullptr ? nullptr : half.p + offset;
      if (trained.has_byte_moments) {
        entry.m = half.m_codes + offset;
        entry.v = half.v_codes + offset;
        entry.m_exponents = half.m_exponents + tensor.first_block;
        entry.v_exponents = half.v_exponents + tensor.first_block;
      } else {
        entry.m = half.m + offset;
        entry.v = half.v + offset;
      }
      entry.is_half = 1;
      entry.is_half_gradient = trained.has_half_gradient ? 1 : 0;
    }
    all.push_back(entry);
  }
  return all;
}

}  // namespace

bool reads_half_weights(const Device& device) {
  return device.element_bytes() == sizeof(uint16_t) &&
         device.ops().packs_row_major(device.context()) != 0;
}

void TrainedVector::reserve(const Device& device, Arena& arena) {
  if (is_half) {
    reserve_half(device, arena);
  } else {
    const size_t count = layout->num_floats();
    reserve_weights(device, arena);
    gradient = arena.take<float>("gradient", count);
    m = arena.take<float>(kMomentsUse, count);
    v = arena.take<float>(kMomentsUse, count);
  }
  table = arena.take<TmTrainedTensor>("optimizer table", layout->tensors.size());
  if (table != nullptr) tensors = describe(*this);
}

void TrainedVector::reserve_weights(const Device& device, Arena& arena) {
  weights = arena.take<float>(kWeightsUse, layout->num_floats());
  reserve_packed(device, arena, kCopiesUse);
  if (weights != nullptr) tensors = describe(*this);
}

void TrainedVector::reserve_half(const Device& device, Arena& arena) {
  const size_t count = layout->num_floats();
  half.vector_offsets.assign(layout->tensors.size(), 0);
  half.num_vector_floats = 0;
  for (size_t i = 0; i < layout->tensors.size(); ++i) {
    if (!is_vector(i)) continue;
    half.vector_offsets[i] = half.num_vector_floats;
    const size_t blocks = (layout->tensors[i].num_elements + kBlockElements - 1) / kBlockElements;
    half.num_vector_floats += blocks * kBlockElements;
  }
  if (reads_half_weights(device)) {
    reserve_packed(device, arena, kWeightsUse);
  } else {
    half.p = arena.take<uint16_t>(kWeightsUse, count);
    weights = arena.take<float>(kCopiesUse, count);
    reserve_packed(device, arena, kCopiesUse);
  }
  half.vectors = arena.take<float>(kWeightsUse, half.num_vector_floats);
  reserve_half_moments(arena);
  if (has_half_gradient) {
    half.gradient = arena.take<uint16_t>("gradient", count);
    half.vector_gradient = arena.take<float>("gradient", half.num_vector_floats);
  } else {
    gradient = arena.take<float>("gradient", count);
  }
}

void TrainedVector::reserve_half_moments(Arena& arena) {
  const size_t count = layout->num_floats();
  if (has_byte_moments) {
    half.m_codes = arena.take<uint8_t>(kMomentsUse, count);
    half.v_codes = arena.take<uint8_t>(kMomentsUse, count);
    half.m_exponents = arena.take<uint8_t>(kMomentsUse, layout->num_blocks);
    half.v_exponents = arena.take<uint8_t>(kMomentsUse, layout->num_blocks);
  } else {
    half.m = arena.take<uint16_t>(kMomentsUse, count);
    half.v = arena.take<uint16_t>(kMomentsUse, count);
  }
  half.vector_m = arena.take<float>(kMomentsUse, half.num_vector_floats);
  half.vector_v = arena.take<float>(kMomentsUse, half.num_vector_floats);
}

void TrainedVector::reserve_packed(const Device& device, Arena& arena, const char* purpose) {
  packed.assign(layout->tensors.size(), nullptr);
  packed_groups.assign(num_full_layers, {});
  for (auto& layer : packed_groups) {
    for (int group = 0; group < kNumGroups; ++group) {
      const size_t count = packed_group_elements(device, groups, static_cast<Group>(group));
      layer[group] = arena.take_elements(purpose, count);
    }
  }
  if (device.ops().reads_rows(device.context())) return;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::vector<size_t>& shape = layout->tensors[i].shape;
    if (shape.size() != 2) continue;
    if (groups.is_used && layout->tensors[i].name.find(".layers.") != std::string::npos) continue;
    packed[i] =
        arena.take_elements(purpose, device.ops().packed_weight_elements(shape[0], shape[1]));
  }
}

float* TrainedVector::rows(size_t tensor) const {
  if (is_half && is_vector(tensor)) return half.vectors + half.vector_offsets[tensor];
  return weights == nullptr ? nullptr : weights + layout->tensors[tensor].offset();
}

void* TrainedVector::gradient_of(size_t tensor) const {
  const size_t offset = layout->tensors[tensor].offset();
  if (!has_half_gradient) return gradient == nullptr ? nullptr : gradient + offset;
  if (is_vector(tensor)) return half.vector_gradient + half.vector_offsets[tensor];
  return half.gradient + offset;
}

std::vector<MemoryRange> TrainedVector::gradient_ranges() const {
  if (!has_half_gradient) return {{gradient, layout->num_floats() * sizeof(float)}};
  return {{half.gradient, layout->num_floats() * sizeof(uint16_t)},
          {half.vector_gradient, half.num_vector_floats * sizeof(float)}};
}

// Products overwrite the gradients of matrices. A tied table's first receives the head's.
std::vector<MemoryRange> TrainedVector::added_ranges() const {
  if (adds_gradient) return gradient_ranges();
  if (layout->find("model.embed_tokens.weight") == nullptr) return {};  // adapters
  if (!has_half_gradient) return gradient_ranges();
  std::vector<MemoryRange> ranges = {
      {half.vector_gradient, half.num_vector_floats * sizeof(float)}};
  const bool is_tied = layout->find("lm_head.weight") == nullptr;
  const TrainedTensor& table = *layout->find("model.embed_tokens.weight");
  if (is_tied) return ranges;
  ranges.push_back({half.gradient + table.offset(), table.num_elements * sizeof(uint16_t)});
  return ranges;
}

namespace {

// Says where a tensor, by name, is read.
struct Placing {
  TrainedVector& trained;

  void set(const std::string& name, const TmPlace& place) const {
    const TrainedTensor* tensor = trained.layout->find(name);
    if (tensor == nullptr || place.at == nullptr) return;
    TmTrainedTensor& entry = trained.tensors[tensor - trained.layout->tensors.data()];
    if (entry.is_half) {
      entry.p = place.at;
      entry.p_stride = place.stride;
    } else {
      entry.copy = place.at;
      entry.copy_stride = place.stride;
    }
  }
};

void place_groups(const Device& device, const PlacedModel& model, TrainedVector& trained) {
  const Placing placing = {trained};
  const auto shapes = linear_shapes(model.config);
  for (size_t index = 0; index < model.weights.layers.size(); ++index) {
    for (int group = 0; group < kNumGroups; ++group) {
      TmGroupPlaces places = {};
      TM_RUN(device, group_places, &model.weights.groups.shapes[group],
             model.weights.layers[index].groups[group], &places);
      for (size_t part = 0; part < kGroupMembers[group].count; ++part) {
        const LinearShape& shape = shapes[kGroupMembers[group].first + part];
        placing.set(layer_name(index, shape.path) + ".weight", places.weight[part]);
        placing.set(layer_name(index, shape.path) + ".bias", places.bias[part]);
        placing.set(adapter_tensor_name(index, shape, 'A'), places.lora_a[part]);
        placing.set(adapter_tensor_name(index, shape, 'B'), places.lora_b[part]);
      }
    }
  }
}

}  // namespace

void place_weights(const Device& device, const PlacedModel& model, TrainedVector& trained) {
  const bool is_decoded = trained.is_half && !reads_half_weights(device);
  for (size_t i = 0; i < trained.packed.size(); ++i) {
    TmTrainedTensor& entry = trained.tensors[i];
    TmElement* copy = trained.packed[i];
    if (is_decoded) {  // elements are floats here
      copy = trained.is_vector(i) ? nullptr : reinterpret_cast<TmElement*>(trained.rows(i));
    } else if (!device.ops().packs_row_major(device.context())) {
      copy = nullptr;
    }
    if (copy == nullptr) continue;
    if (entry.is_half && !is_decoded) {
      entry.p = copy;
    } else {
      entry.copy = copy;
      entry.copy_stride = entry.columns;
    }
  }
  if (model.weights.groups.is_used && !is_decoded) place_groups(device, model, trained);
  TM_RUN(device, copy_in, trained.table, trained.tensors.data(),
         trained.tensors.size() * sizeof(TmTrainedTensor));
}

void refresh_packed(const Device& device, const TrainedVector& trained, Copies which) {
  for (size_t i = 0; i < trained.packed.size(); ++i) {
    if (trained.packed[i] == nullptr || trained.rows(i) == nullptr) continue;
    if (which == Copies::kNotPlaced && trained.tensors[i].copy != nullptr) continue;
    const TrainedTensor& tensor = trained.layout->tensors[i];
    TM_RUN(device, pack_trained_weight, trained.rows(i), tensor.shape[0], tensor.shape[1],
           trained.packed[i]);
  }
}

DecoderWeights full_view(const ModelConfig& config, const TrainedVector& trained) {
  const Lookup at{trained};
  DecoderWeights view;
  view.embedding = at.matrix("model.embed_tokens.weight");
  view.embedding_grad = at.grad("model.embed_tokens.weight");
  view.final_norm = at.norm("model.norm.weight");
  const char* head = config.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  view.head.weight = at.matrix(head);
  view.head.weight_grad = at.grad(head);
  view.has_element_grads = view.head.has_element_grad = trained.has_half_gradient;
  view.head.adds_grads = trained.adds_gradient;
  view.groups = trained.groups;
  const auto shapes = linear_shapes(config);
  for (size_t index = 0; index < config.num_layers; ++index) {
    LayerWeights layer;
    if (trained.groups.is_used) layer.groups = trained.packed_groups[index];
    layer.input_norm = at.norm(layer_name(index, "input_layernorm.weight"));
    layer.post_norm = at.norm(layer_name(index, "post_attention_layernorm.weight"));
    if (config.qk_norm) {
      layer.q_norm = at.norm(layer_name(index, "self_attn.q_norm.weight"));
      layer.k_norm = at.norm(layer_name(index, "self_attn.k_norm.weight"));
    }
    for (int which = 0; which < kNumLinears; ++which) {
      const LinearShape& shape = shapes[which];
      LinearWeights& linear = layer.linears[which];
      const std::string name = layer_name(index, shape.path);
      linear.weight = at.matrix(name + ".weight");
      linear.weight_grad = at.grad(name + ".weight");
      linear.has_element_grad = trained.has_half_gradient;
      linear.adds_grads = trained.adds_gradient;
      if (!config.qkv_bias || which > kValue) continue;
      linear.bias = at.weight(name + ".bias");
      linear.bias_grad = at.float_grad(name + ".bias");
    }
    view.layers.push_back(layer);
  }
  return view;
}

void attach_adapter(const AdapterView& adapter, DecoderWeights& weights) {
  const Lookup at{adapter.trained};
  const auto shapes = linear_shapes(adapter.config);
  weights.lora_rank = adapter.lora.rank;
  weights.lora_scale = adapter.lora.scale();
  for (size_t index = 0; index < weights.layers.size(); ++index) {
    for (int which = 0; which < kNumLinears; ++which) {
      if (!adapter.lora.targets(shapes[which].module)) continue;
      LinearWeights& linear = weights.layers[index].linears[which];
      const std::string a = adapter_tensor_name(index, shapes[which], 'A');
      const std::string b = adapter_tensor_name(index, shapes[which], 'B');
      linear.lora_a = at.matrix(a);
      linear.lora_b = at.matrix(b);
      linear.adds_grads = adapter.trained.adds_gradient;
      linear.lora_a_grad = at.float_grad(a);
      linear.lora_b_grad = at.float_grad(b);
    }
  }
}

void apply_adamw(const Device& device, const UpdateArgs& args) {
  const TrainedVector& trained = args.trained;
  const AdamWNumbers& numbers = args.numbers;
  TmAdamW call = {};
  call.tensors = trained.table;
  call.host_tensors = trained.tensors.data();
  call.num_tensors = trained.tensors.size();
  call.num_blocks = trained.layout->num_blocks;
  call.gradient = trained.has_half_gradient ? trained.half.vector_gradient : args.gradient;
  call.half_gradient = trained.half.gradient;
  call.learning_rate = numbers.learning_rate;
  call.clip_factor = numbers.clip_factor;
  call.bias_correction1 = numbers.bias_correction1;
  call.bias_correction2_sqrt = numbers.bias_correction2_sqrt;
  call.beta1 = numbers.beta1;
  call.beta2 = numbers.beta2;
  call.epsilon = numbers.epsilon;
  call.weight_decay = numbers.weight_decay;
  call.seed = numbers.seed;
  call.step = numbers.step;
  TM_RUN(device, adamw, &call);
}

}  // namespace tunemesh
