// Canonical vectors to and from safetensors files.
#pragma once
#include <string>

#include "engine/canonical_layout.h"
#include "engine/device.h"
#include "engine/safetensors.h"

namespace tunemesh {

struct VectorEntries {
  const CanonicalLayout& layout;
  std::string prefix;  // of the names in the file
  const float* values;
};
// Entries that stream the vector's tensors from the device when the file is written.
void add_entries(const Device& device, const VectorEntries& vector, SafetensorsContent& content);

struct VectorRead {
  const SafetensorsFile& file;
  const CanonicalLayout& layout;
  std::string prefix;
  float* values;
};
// Throws the file's error where a tensor is missing or has another shape.
void read_tensors(const Device& device, const VectorRead& read);

// Trained weights and both moments: weight.<name>, m.<name>, v.<name>, metadata step.
struct TrainedVector;
struct StateFile {
  std::string path;
  size_t step;
};
void write_state_file(const Device& device, const TrainedVector& trained, const StateFile& state);
size_t read_state_file(const Device& device, const TrainedVector& trained, const std::string& path);

}  // namespace tunemesh
