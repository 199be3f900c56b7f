// How far training has moved each weight, for the report at delivery.
#pragma once
#include <string>
#include <vector>

#include "engine/trained_vector.h"
#include "engine/weight_source.h"

namespace tunemesh {

struct WeightChange {
  std::string name;
  double mean_abs_change;
};

// Mean |w - w0| of each tensor; w0 is read again from the model.
std::vector<WeightChange> full_weight_change(const Device& device, const WeightSource& source,
                                             const TrainedVector& trained);

// Mean |scale (B A - B0 A0)| of each adapted module. start_folder: the adapter that training began
// with; empty: B0 = 0.
struct AdapterChange {
  const ModelConfig& config;
  const LoraSpec& lora;
  const TrainedVector& trained;
  std::string start_folder;
};
std::vector<WeightChange> adapter_weight_change(const Device& device, const AdapterChange& change);

}  // namespace tunemesh
