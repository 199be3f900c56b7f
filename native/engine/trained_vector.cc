#include "engine/trained_vector.h"

#include <cmath>

#include "engine/philox.h"
#include "engine/sha256.h"
#include "engine/stream_out.h"

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

}  // namespace

void TrainedVector::reserve(const Device& device, Arena& arena) {
  const size_t count = layout->num_floats();
  reserve_weights(device, arena);
  gradient = arena.take<float>("gradient", count);
  m = arena.take<float>("optimizer moments", count);
  v = arena.take<float>("optimizer moments", count);
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

void refresh_packed(const Device& device, const TrainedVector& trained) {
  for (size_t i = 0; i < trained.packed.size(); ++i) {
    if (trained.packed[i] == nullptr) continue;
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
  const AdamWNumbers& numbers = args.numbers;
  for (const TrainedTensor& tensor : args.trained.layout->tensors) {
    const size_t offset = tensor.offset();
    TmAdamW call = {};
    call.p = args.trained.weights + offset;
    call.m = args.trained.m + offset;
    call.v = args.trained.v + offset;
    call.gradient = args.gradient + offset;
    call.n = tensor.num_elements;
    call.learning_rate = numbers.learning_rate;
    call.clip_factor = numbers.clip_factor;
    call.bias_correction1 = numbers.bias_correction1;
    call.bias_correction2_sqrt = numbers.bias_correction2_sqrt;
    call.beta1 = numbers.beta1;
    call.beta2 = numbers.beta2;
    call.epsilon = numbers.epsilon;
    call.weight_decay = tensor.shape.size() >= 2 ? numbers.weight_decay : 0.0f;
    TM_RUN(device, adamw, &call);
  }
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
