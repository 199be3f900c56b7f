// The trained weights with their gradient and both AdamW moments, each one canonical vector of
// float32.
#pragma once
#include <string>
#include <vector>

#include "engine/arena.h"
#include "engine/canonical_layout.h"
#include "engine/decoder_weights.h"
#include "engine/weight_source.h"

namespace tunemesh {

struct TrainedVector {
  const CanonicalLayout* layout = nullptr;
  GroupPlan groups;            // of the layers that are trained, or that the adapters belong to
  size_t num_full_layers = 0;  // whose groups are packed here; 0: adapters, packed with their base
  float* weights = nullptr;
  float* gradient = nullptr;  // of one micro-batch, overwritten by the next
  float* m = nullptr;
  float* v = nullptr;
  // By tensor: the copy that the matrix products read; null where they read `weights`.
  std::vector<TmElement*> packed;
  std::vector<std::array<TmElement*, kNumGroups>> packed_groups;  // by layer
  // By tensor: what an update reads and writes. `table` is the same in the device's memory.
  std::vector<TmTrainedTensor> tensors;
  TmTrainedTensor* table = nullptr;

  void reserve(const Device& device, Arena& arena);
  void reserve_weights(const Device& device, Arena& arena);  // for inference only
};

// Tells the update where the products read each weight (packed copies, parts of linear groups), so
// that it writes them there too, and puts the table on the device. After the weights' view stands.
void place_copies(const Device& device, const DecoderWeights& weights, TrainedVector& trained);

// Makes the packed copies of single tensors anew from the weights: all of them after they were read
// or initialised, after an update those that it could not write.
enum class Copies { kAll, kNotPlaced };
void refresh_packed(const Device& device, const TrainedVector& trained, Copies which);

// Weights of a model whose every tensor is trained; gradients where `trained.gradient` is set.
DecoderWeights full_view(const ModelConfig& config, const TrainedVector& trained);
// Adds the adapter's pointers to a frozen model's.
struct AdapterView {
  const ModelConfig& config;
  const LoraSpec& lora;
  const TrainedVector& trained;
};
void attach_adapter(const AdapterView& adapter, DecoderWeights& weights);

// B zero, A uniform in +-1/sqrt(in) (PEFT's kaiming-uniform with a = sqrt 5), from Philox keyed by
// (seed, canonical index).
void initialise_adapter(const Device& device, const TrainedVector& trained, uint64_t seed);
void read_full_weights(const Device& device, const WeightSource& source,
                       const TrainedVector& trained);

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
  const float* gradient;  // published, canonical
  AdamWNumbers numbers;
};
void apply_adamw(const Device& device, const UpdateArgs& args);

// SHA-256 of the tensors' float32 bytes in canonical order, without fill.
std::string weights_digest(const Device& device, const TrainedVector& trained);

}  // namespace tunemesh
