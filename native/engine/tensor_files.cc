#include "engine/tensor_files.h"

#include <utility>

namespace tunemesh {
namespace {
constexpr const char* kStateCode = "BLOB_CORRUPT";

const char* dtype_of(const TensorState& state) {
  switch (state_type(state)) {
    case StateType::kHalf:
      return "BF16";
    case StateType::kByte:
      return "U8";
    default:
      return "F32";
  }
}
}  // namespace

void add_entries(const Device& device, const StateEntries& states, SafetensorsContent& content) {
  const TrainedVector& trained = states.trained;
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    const TensorState state = {trained, i, states.kind};
    if (!has_state(state)) continue;
    auto write = [&device, &trained, i, kind = states.kind](const ByteSink& sink) {
      stream_state(device, {trained, i, kind}, sink);
    };
    content.entries.push_back({states.prefix + trained.layout->tensors[i].name, state_shape(state),
                               write, dtype_of(state)});
  }
}

void read_tensors(const Device& device, const StateRead& read) {
  std::vector<float> values;
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < read.trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = read.trained.layout->tensors[i];
    const TensorState state = {read.trained, i, read.kind};
    if (!has_state(state)) continue;
    const std::string name = read.prefix + tensor.name;
    if (read.file.tensor(name).shape != state_shape(state)) {
      read.file.fail("tensor " + name + " has another shape than the job's " + tensor.name +
                     " of " + std::to_string(tensor.num_elements) + " elements.");
    }
    if (state_type(state) == StateType::kByte) {
      read.file.read_bytes(name, bytes);
      set_state_bytes(device, state, bytes);
      continue;
    }
    values.resize(tensor.num_elements);
    read.file.read(name, 0, tensor.num_elements, values.data());
    set_state(device, state, values);
  }
}

namespace {

constexpr std::pair<StateKind, const char*> kStateParts[] = {
    {StateKind::kWeight, "weight."},
    {StateKind::kFirstMoment, "m."},
    {StateKind::kSecondMoment, "v."},
    {StateKind::kFirstExponents, "m_exponents."},
    {StateKind::kSecondExponents, "v_exponents."}};

// And how many tensors there must be.
size_t check_types(const SafetensorsFile& file, const TrainedVector& trained) {
  size_t num_tensors = 0;
  for (const auto& [kind, prefix] : kStateParts) {
    for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
      const TensorState state = {trained, i, kind};
      if (!has_state(state)) continue;
      ++num_tensors;
      const std::string name = prefix + trained.layout->tensors[i].name;
      const std::string wanted = dtype_of(state);
      const std::string& found = file.tensor(name).dtype;
      if (found == wanted) continue;
      file.fail("tensor " + name + " is of dtype " + found + ", the job's state of " + wanted +
                ". Resume it with the optim and fp32_master that it began with.");
    }
  }
  return num_tensors;
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
  const size_t num_tensors = check_types(file, trained);
  if (file.tensors().size() != num_tensors) {
    file.fail("has " + std::to_string(file.tensors().size()) + " tensors, the job's state has " +
              std::to_string(num_tensors) + ".");
  }
  for (const auto& [kind, prefix] : kStateParts) {
    read_tensors(device, {file, trained, kind, prefix});
  }
  return std::stoul(step->second);
}

}  // namespace tunemesh
