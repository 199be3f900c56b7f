// Pointers to everything the decoder reads and writes per tensor. Frozen, fully trained and LoRA
// models differ only in which of them are null.
#pragma once
#include <array>
#include <vector>

#include "engine/linear_groups.h"
#include "engine/model_config.h"
#include "kernels/backend.h"

namespace tunemesh {

struct LinearWeights {
  TmWeight weight = {};
  const float* bias = nullptr;
  void* weight_grad = nullptr;  // floats, or elements where has_element_grad; null: frozen
  bool has_element_grad = false;
  bool adds_grads = false;  // to what is there, as biases always do
  float* bias_grad = nullptr;
  // y += (scale x A^T) B^T; A [r, in], B [out, r]; rows null: no adapter here
  TmWeight lora_a = {};
  TmWeight lora_b = {};
  float* lora_a_grad = nullptr;
  float* lora_b_grad = nullptr;

  bool has_adapter() const { return lora_a.rows != nullptr; }
  bool is_trained() const { return weight_grad != nullptr || lora_a_grad != nullptr; }
};

struct NormWeights {
  const float* gain = nullptr;
  float* gain_grad = nullptr;
};

struct LayerWeights {
  NormWeights input_norm, post_norm, q_norm, k_norm;
  // Where groups are used, their linears have no `packed`, and frozen ones no data of their own.
  std::array<LinearWeights, kNumLinears> linears;
  std::array<TmElement*, kNumGroups> groups = {};  // packed
};

struct DecoderWeights {
  TmWeight embedding = {};
  void* embedding_grad = nullptr;  // floats, or elements; tied: also the head's gradient
  bool has_element_grads = false;
  std::vector<LayerWeights> layers;
  NormWeights final_norm;
  LinearWeights head;
  GroupPlan groups;
  size_t lora_rank = 0;
  float lora_scale = 0;
};

}  // namespace tunemesh
