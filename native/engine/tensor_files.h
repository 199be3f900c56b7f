// Trained states to and from safetensors files.
#pragma once
#include <string>

#include "engine/safetensors.h"
#include "engine/trained_states.h"

namespace tunemesh {

struct StateEntries {
  const TrainedVector& trained;
  StateKind kind;
  std::string prefix;  // of the names in the file
};
// Entries that stream the tensors, as they are stored, from the device when the file is written.
void add_entries(const Device& device, const StateEntries& states, SafetensorsContent& content);

struct StateRead {
  const SafetensorsFile& file;
  const TrainedVector& trained;
  StateKind kind;
  std::string prefix;
};
// Throws the file's error where a tensor is missing or has another shape.
void read_tensors(const Device& device, const StateRead& read);

// Trained weights and both moments: weight.<name>, m.<name>, v.<name>, of moments of bytes
// m_exponents.<name> and v_exponents.<name>; metadata step. Reading refuses a file of other types
// than the job's states: a resume is exact.
struct StateFile {
  std::string path;
  size_t step;
};
void write_state_file(const Device& device, const TrainedVector& trained, const StateFile& state);
size_t read_state_file(const Device& device, const TrainedVector& trained, const std::string& path);

}  // namespace tunemesh
