#include "engine/trained_vector.h"

#include <cmath>

#include "engine/sha256.h"
#include "engine/stream_out.h"
#include "kernels/philox.h"

namespace tunemesh {
namespace {

// Pointers into the canonical vectors by tensor name.
struct Lookup {
  const TrainedVector& trained;

  const TrainedTensor& tensor(const std::string& name) const {
    const TrainedTensor* found = trained.layout->find(name);
    if (found == nullptr) throw EngineError("INTERNAL", "no trained tensor named " + name + ".");
    return *found;
  }
  const float* weight(const std::string& name) const {
    return trained.weights + tensor(name).offset();
  }
  TmWeight matrix(const std::string& name) const {
    const TrainedTensor& found = tensor(name);
    const size_t index = static_cast<size_t>(&found - trained.layout->tensors.data());
    return {trained.weights + found.offset(), trained.packed[index], found.shape[0],
            found.shape[1]};
  }
  float* grad(const std::string& name) const {
    return trained.gradient == nullptr ? nullptr : trained.gradient + tensor(name).offset();
  }
  NormWeights norm(const std::string& name) const { return {weight(name), grad(name)}; }
};

bool is_matrix(const TrainedTensor& tensor) { return tensor.shape.size() >= 2; }

// Tensors of floats in canonical vectors, without copies yet.
std::vector<TmTrainedTensor> describe(const TrainedVector& trained) {
  std::vector<TmTrainedTensor> all;
  for (const TrainedTensor& tensor : trained.layout->tensors) {
    TmTrainedTensor entry = {};
    entry.p = trained.weights + tensor.offset();
    entry.m = trained.m + tensor.offset();
    entry.v = trained.v + tensor.offset();
    entry.n = tensor.num_elements;
    entry.columns = entry.p_stride = tensor.shape.back();
    entry.first_block = tensor.first_block;
    entry.gradient_offset = tensor.offset();
    entry.decays = is_matrix(tensor) ? 1 : 0;
    all.push_back(entry);
  }
  return all;
}

}  // namespace

void TrainedVector::reserve(const Device& device, Arena& arena) {
  const size_t count = layout->num_floats();
  reserve_weights(device, arena);
  gradient = arena.take<float>("gradient", count);
  m = arena.take<float>("optimizer moments", count);
  v = arena.take<float>("optimizer moments", count);
  table = arena.take<TmTrainedTensor>("optimizer table", layout->tensors.size());
  if (weights != nullptr) tensors = describe(*this);
}

void TrainedVector::reserve_weights(const Device& device, Arena& arena) {
  weights = arena.take<float>("trained weights", layout->num_floats());
  packed.assign(layout->tensors.size(), nullptr);
  packed_groups.assign(num_full_layers, {});
  for (auto& layer : packed_groups) {
    for (int group = 0; group < kNumGroups; ++group) {
      const size_t count = packed_group_elements(device, groups, static_cast<Group>(group));
      layer[group] = arena.take_elements("working copies", count);
    }
  }
  if (device.ops().reads_rows(device.context())) return;
  for (size_t i = 0; i < packed.size(); ++i) {
    const std::vector<size_t>& shape = layout->tensors[i].shape;
    if (shape.size() != 2) continue;
    if (groups.is_used && layout->tensors[i].name.find(".layers.") != std::string::npos) continue;
    packed[i] = arena.take_elements("working copies",
                                    device.ops().packed_weight_elements(shape[0], shape[1]));
  }
}

namespace {

// Sets the copies of one layer's groups.
struct GroupCopies {
  const Device& device;
  const DecoderWeights& weights;
  TrainedVector& trained;

  void set(const float* rows, const TmPlace& place) const {
    if (rows == nullptr || place.at == nullptr) return;
    const CanonicalLayout& layout = *trained.layout;
    const size_t offset = static_cast<size_t>(rows - trained.weights);
    const TrainedTensor& tensor = layout.tensor_of_block(offset / kBlockElements);
    TmTrainedTensor& entry = trained.tensors[&tensor - layout.tensors.data()];
    entry.copy = place.at;
    entry.copy_stride = place.stride;
  }
  void set_layer(const LayerWeights& layer) const {
    for (int group = 0; group < kNumGroups; ++group) {
      TmGroupPlaces places = {};
      TM_RUN(device, group_places, &weights.groups.shapes[group], layer.groups[group], &places);
      for (size_t part = 0; part < kGroupMembers[group].count; ++part) {
        const LinearWeights& linear = layer.linears[kGroupMembers[group].first + part];
        if (linear.weight_grad != nullptr) set(linear.weight.rows, places.weight[part]);
        if (linear.bias_grad != nullptr) set(linear.bias, places.bias[part]);
        set(linear.lora_a.rows, places.lora_a[part]);
        set(linear.lora_b.rows, places.lora_b[part]);
      }
    }
  }
};

}  // namespace

void place_copies(const Device& device, const DecoderWeights& weights, TrainedVector& trained) {
  for (size_t i = 0; i < trained.packed.size(); ++i) {
    if (trained.packed[i] == nullptr || !device.ops().packs_row_major(device.context())) continue;
    trained.tensors[i].copy = trained.packed[i];
    trained.tensors[i].copy_stride = trained.tensors[i].columns;
  }
  if (weights.groups.is_used) {
    const GroupCopies copies = {device, weights, trained};
    for (const LayerWeights& layer : weights.layers) copies.set_layer(layer);
  }
  TM_RUN(device, copy_in, trained.table, trained.tensors.data(),
         trained.tensors.size() * sizeof(TmTrainedTensor));
}

void refresh_packed(const Device& device, const TrainedVector& trained, Copies which) {
  for (size_t i = 0; i < trained.packed.size(); ++i) {
    if (trained.packed[i] == nullptr) continue;
    if (which == Copies::kNotPlaced && trained.tensors[i].copy != nullptr) continue;
    const TrainedTensor& tensor = trained.layout->tensors[i];
    TM_RUN(device, pack_trained_weight, trained.weights + tensor.offset(), tensor.shape[0],
           tensor.shape[1], trained.packed[i]);
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
      if (!config.qkv_bias || which > kValue) continue;
      linear.bias = at.weight(name + ".bias");
      linear.bias_grad = at.grad(name + ".bias");
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
      linear.lora_a_grad = at.grad(a);
      linear.lora_b_grad = at.grad(b);
    }
  }
}

void initialise_adapter(const Device& device, const TrainedVector& trained, uint64_t seed) {
  std::vector<float> values;
  for (const TrainedTensor& tensor : trained.layout->tensors) {
    values.assign(tensor.num_elements, 0.0f);
    if (tensor.name.ends_with(".lora_A.weight")) {
      const float bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(tensor.shape[1])));
      for (size_t i = 0; i < values.size(); ++i) {
        const float unit = philox_uniform(seed, PhiloxStream::kAdapterInit, tensor.first_index + i);
        values[i] = (2.0f * unit - 1.0f) * bound;
      }
    }
    TM_RUN(device, copy_in, trained.weights + tensor.offset(), values.data(),
           values.size() * sizeof(float));
  }
}

void read_full_weights(const Device& device, const WeightSource& source,
                       const TrainedVector& trained) {
  std::vector<float> values;
  for (const TrainedTensor& tensor : trained.layout->tensors) {
    values.resize(tensor.num_elements);
    source.read(tensor.name, 0, tensor.num_elements, values.data());
    TM_RUN(device, copy_in, trained.weights + tensor.offset(), values.data(),
           values.size() * sizeof(float));
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
  call.gradient = args.gradient;
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
  refresh_packed(device, trained, Copies::kNotPlaced);
}

std::string weights_digest(const Device& device, const TrainedVector& trained) {
  Sha256 hash;
  for (const TrainedTensor& tensor : trained.layout->tensors) {
    stream_out(device, {trained.weights + tensor.offset(), tensor.num_elements},
               [&](const float* part, size_t size) { hash.update(part, size * sizeof(float)); });
  }
  return hash.hex_digest();
}

}  // namespace tunemesh
