#include "engine/trained_states.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "engine/half_floats.h"
#include "engine/sha256.h"
#include "engine/stream_out.h"
#include "engine/weight_reader.h"
#include "kernels/parallel_parts.h"
#include "kernels/philox.h"

namespace tunemesh {
namespace {

constexpr size_t kSetElements = size_t{8} << 20;

// Where a tensor lies on the device.
struct Located {
  char* at;
  size_t element_bytes;
  size_t rows, columns, stride;  // elements
  bool has_gaps() const { return stride != columns && rows > 1; }
  size_t span() const { return rows == 0 ? 0 : (rows - 1) * stride + columns; }
};

size_t bytes_of(StateType type) {
  return type == StateType::kFloat  ? sizeof(float)
         : type == StateType::kHalf ? sizeof(uint16_t)
                                    : 1;
}

bool are_exponents(const TensorState& state) {
  return state.kind == StateKind::kFirstExponents || state.kind == StateKind::kSecondExponents;
}

Located locate(const TensorState& state) {
  const TmTrainedTensor& entry = state.trained.tensors[state.tensor];
  Located found = {nullptr, bytes_of(state_type(state)), entry.n / entry.columns, entry.columns,
                   entry.columns};
  if (are_exponents(state)) {
    found.rows = 1;
    found.columns = found.stride = state_shape(state).front();
  }
  switch (state.kind) {
    case StateKind::kWeight:
      found.at = static_cast<char*>(entry.p);
      found.stride = entry.p_stride;
      break;
    case StateKind::kFirstMoment:
      found.at = static_cast<char*>(entry.m);
      break;
    case StateKind::kSecondMoment:
      found.at = static_cast<char*>(entry.v);
      break;
    case StateKind::kGradient:
      found.at = static_cast<char*>(state.trained.gradient_of(state.tensor));
      break;
    case StateKind::kFirstExponents:
      found.at = reinterpret_cast<char*>(entry.m_exponents);
      break;
    case StateKind::kSecondExponents:
      found.at = reinterpret_cast<char*>(entry.v_exponents);
      break;
  }
  return found;
}

// Rows [first, first + count) without gaps, in host memory.
void copy_rows_out(const Device& device, const Located& from, ElementRange rows,
                   std::vector<char>& to) {
  const size_t row_bytes = from.columns * from.element_bytes;
  const size_t stride_bytes = from.stride * from.element_bytes;
  const size_t span = rows.count == 0 ? 0 : (rows.count - 1) * stride_bytes + row_bytes;
  to.resize(span);
  TM_RUN(device, copy_out, to.data(), from.at + rows.first * stride_bytes, span);
  for (size_t row = 1; row < rows.count && stride_bytes != row_bytes; ++row) {
    std::memmove(to.data() + row * row_bytes, to.data() + row * stride_bytes, row_bytes);
  }
  to.resize(rows.count * row_bytes);
}

// To nearest, ties to even.
uint16_t nearest_bfloat16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace

StateType state_type(const TensorState& state) {
  const TmTrainedTensor& entry = state.trained.tensors[state.tensor];
  if (state.kind == StateKind::kGradient) {
    return entry.is_half_gradient ? StateType::kHalf : StateType::kFloat;
  }
  if (state.kind != StateKind::kWeight && entry.m_exponents != nullptr) return StateType::kByte;
  return entry.is_half ? StateType::kHalf : StateType::kFloat;
}

bool has_state(const TensorState& state) {
  return !are_exponents(state) || state.trained.tensors[state.tensor].m_exponents != nullptr;
}

std::vector<size_t> state_shape(const TensorState& state) {
  const TrainedTensor& tensor = state.trained.layout->tensors[state.tensor];
  if (!are_exponents(state)) return tensor.shape;
  return {(tensor.num_elements + kBlockElements - 1) / kBlockElements};
}

void stream_state(const Device& device, const TensorState& state, const ByteSink& sink) {
  Located from = locate(state);
  if (!from.has_gaps()) {  // one long row, cut anywhere
    const size_t bytes = from.rows * from.columns * from.element_bytes;
    std::vector<char> part(std::min(bytes, kStreamFloats * sizeof(float)));
    for (size_t first = 0; first < bytes; first += part.size()) {
      const size_t size = std::min(part.size(), bytes - first);
      TM_RUN(device, copy_out, part.data(), from.at + first, size);
      sink(part.data(), size);
    }
    return;
  }
  std::vector<char> part;
  const size_t step = std::max<size_t>(1, kStreamFloats / from.stride);
  for (size_t row = 0; row < from.rows; row += step) {
    copy_rows_out(device, from, {row, std::min(step, from.rows - row)}, part);
    sink(part.data(), part.size());
  }
}

std::vector<float> state_values(const Device& device, const TensorState& state,
                                ElementRange range) {
  Located from = locate(state);
  if (!from.has_gaps()) {
    from.rows = from.rows * from.columns;
    from.columns = from.stride = 1;
  }
  std::vector<char> bytes;
  copy_rows_out(device, from, {range.first / from.columns, range.count / from.columns}, bytes);
  std::vector<float> values(range.count);
  if (state_type(state) == StateType::kFloat) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, bytes.data() + i * sizeof half, sizeof half);
    values[i] = float_from_bfloat16(half);
  }
  return values;
}

std::vector<float> state_values(const Device& device, const TensorState& state) {
  return state_values(device, state, {0, state.trained.tensors[state.tensor].n});
}

void set_state(const Device& device, const TensorState& state, std::span<const float> values) {
  const Located to = locate(state);
  if (state_type(state) == StateType::kFloat) {
    TM_RUN(device, copy_in, to.at, values.data(), values.size_bytes());
    return;
  }
  const size_t step = std::min(to.rows, std::max<size_t>(1, kSetElements / to.stride));
  std::vector<uint16_t> halves(step * to.stride);  // what lies between the rows is zero
  for (size_t row = 0; row < to.rows; row += step) {
    const size_t count = std::min(step, to.rows - row);
    in_parallel_parts(count, to.columns, [&](size_t first, size_t size) {
      for (size_t r = first; r < first + size; ++r) {
        const float* const from = values.data() + (row + r) * to.columns;
        uint16_t* const out = halves.data() + r * to.stride;
        for (size_t i = 0; i < to.columns; ++i) out[i] = nearest_bfloat16(from[i]);
      }
    });
    const size_t span = (count - 1) * to.stride + to.columns;
    TM_RUN(device, copy_in, to.at + row * to.stride * sizeof(uint16_t), halves.data(),
           span * sizeof(uint16_t));
  }
  float* const decoded = state.trained.rows(state.tensor);
  if (state.kind != StateKind::kWeight || decoded == nullptr) return;
  const std::vector<float> rounded = state_values(device, state);
  TM_RUN(device, copy_in, decoded, rounded.data(), rounded.size() * sizeof(float));
}

void set_state_bytes(const Device& device, const TensorState& state,
                     const std::vector<uint8_t>& bytes) {
  TM_RUN(device, copy_in, locate(state).at, bytes.data(), bytes.size());
}

void initialise_adapter(const Device& device, const TrainedVector& trained, uint64_t seed) {
  std::vector<float> values;
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = trained.layout->tensors[i];
    values.assign(tensor.num_elements, 0.0f);
    if (tensor.name.ends_with(".lora_A.weight")) {
      const float bound = static_cast<float>(1.0 / std::sqrt(static_cast<double>(tensor.shape[1])));
      for (size_t k = 0; k < values.size(); ++k) {
        const float unit = philox_uniform(seed, PhiloxStream::kAdapterInit, tensor.first_index + k);
        values[k] = (2.0f * unit - 1.0f) * bound;
      }
    }
    set_state(device, {trained, i, StateKind::kWeight}, values);
  }
}

void read_full_weights(const Device& device, const WeightSource& source,
                       const TrainedVector& trained) {
  WeightReader reader(source);
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    const TrainedTensor& tensor = trained.layout->tensors[i];
    set_state(device, {trained, i, StateKind::kWeight}, reader.read(tensor.name, tensor.shape));
  }
}

std::string weights_digest(const Device& device, const TrainedVector& trained) {
  Sha256 hash;
  for (size_t i = 0; i < trained.layout->tensors.size(); ++i) {
    stream_state(device, {trained, i, StateKind::kWeight},
                 [&](const void* bytes, size_t size) { hash.update(bytes, size); });
  }
  return hash.hex_digest();
}

}  // namespace tunemesh
