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

  void reserve(const Device& device, Arena& arena);
  void reserve_weights(const Device& device, Arena& arena);  // for inference only
};

// Makes the packed copies of single tensors anew from the weights: after they were read,
// initialised or updated.
void refresh_packed(const Device& device, const TrainedVector& trained);

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
