// LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.
#pragma once
#include <string>

#include "engine/canonical_layout.h"
#include "engine/device.h"
#include "engine/trained_vector.h"

namespace tunemesh {

// The adapter's own description. Throws ADAPTER_INVALID for kinds of adapter that are not plain
// LoRA.
LoraSpec read_adapter_spec(const std::string& folder);

// Reads every tensor of `trained` from the folder; ADAPTER_INVALID where one is missing, left over
// or of another shape.
void read_adapter_weights(const Device& device, const std::string& folder,
                          const TrainedVector& trained);

struct AdapterOutput {
  std::string folder;
  std::string base_model_name;
  const LoraSpec& lora;
  const TrainedVector& trained;
};
void write_adapter_folder(const Device& device, const AdapterOutput& output);

}  // namespace tunemesh
