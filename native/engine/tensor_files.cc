#include "engine/tensor_files.h"

#include "engine/stream_out.h"
#include "engine/trained_vector.h"

namespace tunemesh {
namespace {
constexpr const char* kStateCode = "BLOB_CORRUPT";
}  // namespace

void add_entries(const Device& device, const VectorEntries& vector, SafetensorsContent& content) {
  for (const TrainedTensor& tensor : vector.layout.tensors) {
    const float* values = vector.values + tensor.offset();
    const size_t count = tensor.num_elements;
    auto write = [&device, values, count](const std::function<void(const float*, size_t)>& sink) {
      stream_out(device, {values, count}, sink);
    };
    content.entries.push_back({vector.prefix + tensor.name, tensor.shape, write});
  }
}

void read_tensors(const Device& device, const VectorRead& read) {
  std::vector<float> values;
  for (const TrainedTensor& tensor : read.layout.tensors) {
    const std::string name = read.prefix + tensor.name;
    if (read.file.tensor(name).shape != tensor.shape) {
      read.file.fail("tensor " + name + " has another shape than the job's " + tensor.name +
                     " of " + std::to_string(tensor.num_elements) + " elements.");
    }
    values.resize(tensor.num_elements);
    read.file.read(name, 0, tensor.num_elements, values.data());
    TM_RUN(device, copy_in, read.values + tensor.offset(), values.data(),
           values.size() * sizeof(float));
  }
}

void write_state_file(const Device& device, const TrainedVector& trained, const StateFile& state) {
  SafetensorsContent content;
  content.metadata = {{"step", std::to_string(state.step)}};
  add_entries(device, {*trained.layout, "weight.", trained.weights}, content);
  add_entries(device, {*trained.layout, "m.", trained.m}, content);
  add_entries(device, {*trained.layout, "v.", trained.v}, content);
  write_safetensors(state.path, content);
}

size_t read_state_file(const Device& device, const TrainedVector& trained,
                       const std::string& path) {
  const SafetensorsFile file(path, kStateCode);
  const auto step = file.metadata().find("step");
  const bool is_number = step != file.metadata().end() && !step->second.empty() &&
                         step->second.size() < 16 &&
                         step->second.find_first_not_of("0123456789") == std::string::npos;
  if (!is_number) file.fail("has no metadata \"step\"; it is not a training state.");
  if (file.tensors().size() != 3 * trained.layout->tensors.size()) {
    file.fail("has " + std::to_string(file.tensors().size()) + " tensors, the job's state has " +
              std::to_string(3 * trained.layout->tensors.size()) + ".");
  }
  read_tensors(device, {file, *trained.layout, "weight.", trained.weights});
  read_tensors(device, {file, *trained.layout, "m.", trained.m});
  read_tensors(device, {file, *trained.layout, "v.", trained.v});
  return std::stoul(step->second);
}

}  // namespace tunemesh
