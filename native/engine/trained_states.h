// Trained weights, moments and gradients as the host sees them: values, bytes, files' digests,
// whatever type and layout they have on the device.
#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/trained_vector.h"
#include "engine/weight_source.h"

namespace tunemesh {

enum class StateKind {
  kWeight,
  kFirstMoment,
  kSecondMoment,
  kGradient,
  kFirstExponents,  // of moments of bytes, one a block
  kSecondExponents,
};
struct TensorState {
  const TrainedVector& trained;
  size_t tensor;
  StateKind kind;
};

enum class StateType { kFloat, kHalf, kByte };  // float32, bfloat16, codes or exponents
StateType state_type(const TensorState& state);
bool has_state(const TensorState& state);  // only moments of bytes have exponents
std::vector<size_t> state_shape(const TensorState& state);
// As it is stored, without gaps, ascending, a part at a time.
using ByteSink = std::function<void(const void* bytes, size_t size)>;
void stream_state(const Device& device, const TensorState& state, const ByteSink& sink);
// Elements [first, first + count): whole rows, or any where the rows have no gaps.
struct ElementRange {
  size_t first, count;
};
std::vector<float> state_values(const Device& device, const TensorState& state, ElementRange range);
std::vector<float> state_values(const Device& device, const TensorState& state);  // all
// All of a tensor; rounded to nearest even where it is half. Neither is for bytes.
void set_state(const Device& device, const TensorState& state, std::span<const float> values);

void set_state_bytes(const Device& device, const TensorState& state,
                     const std::vector<uint8_t>& bytes);

// B zero, A uniform in +-1/sqrt(in) (PEFT's kaiming-uniform with a = sqrt 5), from Philox keyed by
// (seed, canonical index).
void initialise_adapter(const Device& device, const TrainedVector& trained, uint64_t seed);
void read_full_weights(const Device& device, const WeightSource& source,
                       const TrainedVector& trained);

// SHA-256 of the weights' bytes as they are stored (float32, or bfloat16 of half matrices), in
// canonical order, without fill.
std::string weights_digest(const Device& device, const TrainedVector& trained);

}  // namespace tunemesh
