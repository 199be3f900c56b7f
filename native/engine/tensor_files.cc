#include "engine/tensor_files.h"

#include <utility>

namespace tunemesh {
namespace {
constexpr const char* kStateCode = "BLOB_CORRUPT";
}  // namespace

void add_entries(const Device& device, const StateEntries& states, SafetensorsContent& content) {
  const TrainedVector& trained = states.trained;
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = trained.layout->tensors[i];
    auto write = [&device, &trained, i, kind = states.kind](const ByteSink& sink) {
      stream_state(device, {trained, i, kind}, sink);
    };
    const bool is_half = is_half_state({trained, i, states.kind});
    content.entries.push_back({states.prefix + tensor.name, tensor.shape, write, is_half});
  }
}

void read_tensors(const Device& device, const StateRead& read) {
  std::vector<float> values;
  for (size_t i = 0; i < read.trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = read.trained.layout->tensors[i];
    const std::string name = read.prefix + tensor.name;
    if (read.file.tensor(name).shape != tensor.shape) {
      read.file.fail("tensor " + name + " has another shape than the job's " + tensor.name +
                     " of " + std::to_string(tensor.num_elements) + " elements.");
    }
    values.resize(tensor.num_elements);
    read.file.read(name, 0, tensor.num_elements, values.data());
    set_state(device, {read.trained, i, read.kind}, values);
  }
}

namespace {

constexpr std::pair<StateKind, const char*> kStateParts[] = {{StateKind::kWeight, "weight."},
                                                             {StateKind::kFirstMoment, "m."},
                                                             {StateKind::kSecondMoment, "v."}};

void check_types(const SafetensorsFile& file, const TrainedVector& trained) {
  for (const auto& [kind, prefix] : kStateParts) {
    for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
      const std::string name = prefix + trained.layout->tensors[i].name;
      const std::string wanted = is_half_state({trained, i, kind}) ? "BF16" : "F32";
      const std::string& found = file.tensor(name).dtype;
      if (found == wanted) continue;
      file.fail("tensor " + name + " is of dtype " + found + ", the job's state of " + wanted +
                ". Resume it with the fp32_master that it began with.");
    }
  }
}

}  // namespace

void write_state_file(const Device& device, const TrainedVector& trained, const StateFile& state) {
  SafetensorsContent content;
  content.metadata = {{"step", std::to_string(state.step)}};
  for (const auto& [kind, prefix] : kStateParts) {
    add_entries(device, {trained, kind, prefix}, content);
  }
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
  check_types(file, trained);
  for (const auto& [kind, prefix] : kStateParts) {
    read_tensors(device, {file, trained, kind, prefix});
  }
  return std::stoul(step->second);
}

}  // namespace tunemesh
