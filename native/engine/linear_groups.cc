#include "engine/linear_groups.h"

#include <string>

#include "engine/canonical_layout.h"
#include "engine/decoder_weights.h"
#include "engine/device.h"

namespace tunemesh {
namespace {

constexpr size_t kRowMultiple = 64;

// A frozen group's: every width of a row goes through the products of e4m3 numbers.
void make_fp8(TmGroupShape& shape) {
  size_t odd = shape.in % TM_FP8_MULTIPLE == 0 ? 0 : shape.in;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (shape.out[part] % TM_FP8_MULTIPLE != 0) odd = shape.out[part];
  }
  if (odd != 0) {
    throw EngineError("JOB_INVALID", "an fp8 base needs layers whose widths are multiples of " +
                                         std::to_string(TM_FP8_MULTIPLE) +
                                         "; this model has one of " + std::to_string(odd) +
                                         ". Train it in bf16.");
  }
  shape.is_fp8 = 1;
}

GroupPlan plan_with(const Device& device, const ModelConfig& config, const LoraSpec* lora) {
  GroupPlan plan;
  plan.is_used = true;
  const auto linears = linear_shapes(config);
  for (int group = 0; group < kNumGroups; ++group) {
    const GroupMembers& members = kGroupMembers[group];
    TmGroupShape& shape = plan.shapes[group];
    shape.in = linears[members.first].in;
    shape.num_parts = members.count;
    shape.rank = lora != nullptr ? lora->rank : 0;
    shape.has_bias = group == kQkvGroup && config.qkv_bias ? 1 : 0;
    for (size_t part = 0; part < members.count; ++part) {
      const LinearShape& linear = linears[members.first + part];
      shape.out[part] = linear.out;
      shape.is_adapted[part] = lora != nullptr && lora->targets(linear.module) ? 1 : 0;
    }
    plan.borders[group] = device.ops().group_border(&shape);
    if (device.has_fp8_base()) make_fp8(shape);
  }
  return plan;
}

bool same_shape(const TmGroupShape& a, const TmGroupShape& b) {
  if (a.in != b.in || a.num_parts != b.num_parts || a.rank != b.rank) return false;
  for (size_t part = 0; part < a.num_parts; ++part) {
    if (a.out[part] != b.out[part] || a.is_adapted[part] != b.is_adapted[part]) return false;
  }
  return a.has_bias == b.has_bias && a.is_fp8 == b.is_fp8;
}

}  // namespace

bool GroupPlan::operator==(const GroupPlan& other) const {
  if (is_used != other.is_used) return false;
  for (int group = 0; group < kNumGroups; ++group) {
    if (!same_shape(shapes[group], other.shapes[group])) return false;
  }
  return true;
}

size_t GroupPlan::out_width(Group group) const {
  size_t width = 0;
  for (size_t part = 0; part < shapes[group].num_parts; ++part) width += shapes[group].out[part];
  return width;
}

size_t GroupPlan::row_stride(size_t width, size_t border) const {
  if (border == 0) return width;
  return (width + border + kRowMultiple - 1) / kRowMultiple * kRowMultiple;
}

GroupPlan plan_frozen_groups(const Device& device, const ModelConfig& config,
                             const LoraSpec* lora) {
  if (device.has_groups()) return plan_with(device, config, lora);
  if (!device.has_fp8_base()) return {};
  throw EngineError("JOB_INVALID",
                    "an fp8 base needs a GPU; this device computes linears one by one.");
}

GroupPlan plan_trained_groups(const Device& device, const ModelConfig& config) {
  if (device.has_fp8_base()) {
    throw EngineError("JOB_INVALID",
                      "an fp8 base is frozen; full fine-tuning trains it. Use bf16, or LoRA.");
  }
  if (!device.has_groups() || device.ops().reads_rows(device.context())) return {};
  return plan_with(device, config, nullptr);
}

size_t packed_group_elements(const Device& device, const GroupPlan& plan, Group group) {
  return device.ops().group_packed_elements(&plan.shapes[group]);
}

void refresh_groups(const Device& device, const DecoderWeights& weights) {
  if (!weights.groups.is_used) return;
  for (const LayerWeights& layer : weights.layers) {
    for (int group = 0; group < kNumGroups; ++group) {
      TmGroupPack call = {};
      call.shape = &weights.groups.shapes[group];
      call.packed = layer.groups[group];
      bool is_trained = false;
      for (size_t part = 0; part < kGroupMembers[group].count; ++part) {
        const LinearWeights& linear = layer.linears[kGroupMembers[group].first + part];
        call.weight[part] = linear.weight.rows;
        call.bias[part] = linear.bias;
        call.lora_a[part] = linear.lora_a.rows;
        call.lora_b[part] = linear.lora_b.rows;
        is_trained = is_trained || linear.weight.rows != nullptr || linear.has_adapter() ||
                     linear.bias_grad != nullptr;
      }
      if (is_trained) TM_RUN(device, pack_group_trained, &call);
    }
  }
}

}  // namespace tunemesh
