// Linears of a layer that read the same input, as one product where the backend has them
// (kernels/backend.h, TmGroupShape): with the adapters in the weight's border, the residual in the
// product, and no pass over a matrix but the products' own.
#pragma once
#include <array>

#include "engine/model_config.h"
#include "kernels/backend.h"

namespace tunemesh {

class Device;
struct DecoderWeights;
struct LoraSpec;

enum Group { kQkvGroup, kOutputGroup, kGateUpGroup, kDownGroup, kNumGroups };

// Members of a group follow each other in `Linear`.
struct GroupMembers {
  Linear first;
  size_t count;
};
constexpr std::array<GroupMembers, kNumGroups> kGroupMembers = {
    {{kQuery, 3}, {kOutput, 1}, {kGate, 2}, {kDown, 1}}};

// Which groups a model's layers run as; the same in every layer.
struct GroupPlan {
  bool is_used = false;  // false: linears run one by one, borders are 0
  std::array<TmGroupShape, kNumGroups> shapes = {};
  std::array<size_t, kNumGroups> borders = {};
  bool operator==(const GroupPlan& other) const;

  size_t out_width(Group group) const;
  // Elements of a row of `width` with room for the groups' tails. A tail starts where the width
  // ends; rows with a tail are multiples of 64 elements.
  size_t row_stride(size_t width, size_t border) const;
};

// `lora` null: no adapters. Of a device with an fp8 base the frozen groups are fp8; JOB_INVALID
// where the model or the device has no place for one. Fully trained weights are groups where the
// products can't read their rows anyway (reads_rows).
GroupPlan plan_frozen_groups(const Device& device, const ModelConfig& config, const LoraSpec* lora);
GroupPlan plan_trained_groups(const Device& device, const ModelConfig& config);

// Elements of a group's packed weight, on any device with groups.
size_t packed_group_elements(const Device& device, const GroupPlan& plan, Group group);

// Packs what is trained into the groups' weights: after it was read, initialised or updated.
void refresh_groups(const Device& device, const DecoderWeights& weights);

}  // namespace tunemesh
