// The trained weights with their gradient and both AdamW moments. Each is one canonical vector of
// float32, or of bfloat16 for the matrices of a full fine-tuning in bf16.
#pragma once
#include <string>
#include <vector>

#include "engine/arena.h"
#include "engine/canonical_layout.h"
#include "engine/decoder_weights.h"

namespace tunemesh {

struct MemoryRange {
  void* at;
  size_t bytes;
};

// Of a full fine-tuning in bf16 (TrainSpec::has_half_states): matrices keep weight and moments in
// bfloat16, rounded stochastically at each update, and no float32 master. Vectors (norm gains,
// biases) keep floats.
struct HalfStates {
  // Canonical vectors. `p` is null where the products read the half weights themselves: those then
  // lie in the packed copies.
  uint16_t *p = nullptr, *m = nullptr, *v = nullptr;
  // Instead of m and v where has_byte_moments (kernels/byte_moments.h); exponents by block.
  uint8_t *m_codes = nullptr, *v_codes = nullptr, *m_exponents = nullptr, *v_exponents = nullptr;
  uint16_t* gradient = nullptr;  // local mode where elements are bfloat16, else null
  // The vectors' floats, each filled to whole blocks. `vector_gradient` where there is `gradient`.
  float *vectors = nullptr, *vector_m = nullptr, *vector_v = nullptr, *vector_gradient = nullptr;
  std::vector<size_t> vector_offsets;  // by tensor; of vectors
  size_t num_vector_floats = 0;
};

struct TrainedVector {
  const CanonicalLayout* layout = nullptr;
  GroupPlan groups;            // of the layers that are trained, or that the adapters belong to
  size_t num_full_layers = 0;  // whose groups are packed here; 0: adapters, packed with their base
  bool is_half = false, has_half_gradient = false;
  bool has_byte_moments = false;  // of half states: the matrices' moments in 8 bits
  bool adds_gradient = false;     // a step's micro-batches sum theirs in `gradient`
  HalfStates half;
  // With half states: the matrices decoded, where products read rows of floats; else null.
  float* weights = nullptr;
  // Of one micro-batch, overwritten by the next unless adds_gradient; null with half gradients.
  float* gradient = nullptr;
  float* m = nullptr;  // null with half states, as v
  float* v = nullptr;
  // By tensor: the copy that the matrix products read; null where they read `weights`. With half
  // states on a device of bfloat16 elements it is the weight itself.
  std::vector<TmElement*> packed;
  std::vector<std::array<TmElement*, kNumGroups>> packed_groups;  // by layer
  // By tensor: what an update reads and writes. `table` is the same in the device's memory.
  std::vector<TmTrainedTensor> tensors;
  TmTrainedTensor* table = nullptr;

  void reserve(const Device& device, Arena& arena);
  void reserve_weights(const Device& device, Arena& arena);  // for inference only

  bool is_vector(size_t tensor) const { return layout->tensors[tensor].shape.size() < 2; }
  // Floats of a weight; null where there are only half ones.
  float* rows(size_t tensor) const;
  // Floats, or bfloat16 of a matrix where has_half_gradient; null without gradient.
  void* gradient_of(size_t tensor) const;
  // Of the gradient, all that a micro-batch may write, and what it adds into.
  std::vector<MemoryRange> gradient_ranges() const;
  std::vector<MemoryRange> added_ranges() const;

 private:
  void reserve_packed(const Device& device, Arena& arena, const char* purpose);
  void reserve_half(const Device& device, Arena& arena);
  void reserve_half_moments(Arena& arena);
};

// Do the products read half weights where they lie?
bool reads_half_weights(const Device& device);

// Tells the update where the products read each weight (packed copies, parts of linear groups):
// half weights lie there, of others it writes a copy there. Puts the table on the device. After the
// weights' view stands, before they are read.
struct PlacedModel {
  const ModelConfig& config;
  const DecoderWeights& weights;
};
void place_weights(const Device& device, const PlacedModel& model, TrainedVector& trained);

// Makes the packed copies of single tensors anew from the weights: all of them after they were read
// or initialised, after an update those that it could not write.
enum class Copies { kAll, kNotPlaced };
void refresh_packed(const Device& device, const TrainedVector& trained, Copies which);

// Weights of a model whose every tensor is trained; gradients where there are any.
DecoderWeights full_view(const ModelConfig& config, const TrainedVector& trained);
// Adds the adapter's pointers to a frozen model's.
struct AdapterView {
  const ModelConfig& config;
  const LoraSpec& lora;
  const TrainedVector& trained;
};
void attach_adapter(const AdapterView& adapter, DecoderWeights& weights);

struct AdamWNumbers {
  float learning_rate, clip_factor, bias_correction1, bias_correction2_sqrt;
  double beta1, beta2;
  float epsilon, weight_decay;
  uint64_t seed;  // of the job, and the number of its step: for rounding
  uint32_t step;
};
// Decay acts on tensors of two and more dimensions only.
struct UpdateArgs {
  const TrainedVector& trained;
  const float* gradient;  // canonical; not read where the trained vector has a half gradient
  AdamWNumbers numbers;
};
void apply_adamw(const Device& device, const UpdateArgs& args);

}  // namespace tunemesh
