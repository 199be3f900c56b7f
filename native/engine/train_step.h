// The main path: one micro-batch forward and backward.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/decoder_layer.h"
#include "engine/trained_vector.h"

namespace tunemesh {

constexpr int32_t kUntrained = -100;

// A stream of tokens with its documents; not owned.
struct TokenBatch {
  const int32_t* tokens = nullptr;
  const int32_t* targets = nullptr;  // what position i must predict, or kUntrained
  size_t num_tokens = 0;
  const int32_t* document_starts = nullptr;  // ascending from 0, last = num_tokens
  size_t num_documents = 0;
};

// Throws DATA_INVALID where a batch does not fit the model or the workspace.
struct BatchLimits {
  const ModelConfig& config;
  const WorkspaceSpec& spec;
};
void check_batch(const TokenBatch& batch, const BatchLimits& limits);

struct LossResult {
  double loss_sum = 0;
  size_t num_target_tokens = 0;
};

struct StepModel {
  const Device& device;
  const ModelConfig& config;
  const DecoderWeights& weights;
  const Workspace& work;
};

// Gradient of loss_sum / loss_divisor into the weights' gradient pointers, overwriting them.
// What is added into (norms, biases, embeddings) is cleared first; where no row is trained all is.
struct GradientVector {
  std::vector<MemoryRange> added, all;
  // Told of each part (gradient_parts) as soon as nothing of the step writes to it any more, in
  // order; of none where no row is trained: the gradient is zero then.
  std::function<void(size_t part)> on_final_part = {};
};
LossResult train_step(const StepModel& model, const TokenBatch& batch,
                      std::pair<GradientVector, double> gradient_and_divisor);

// Loss only.
LossResult evaluate_step(const StepModel& model, const TokenBatch& batch);

// Logits of every position, row-major [n, V], to the host.
std::vector<float> logits_step(const StepModel& model, const TokenBatch& batch);

// Embedding and all layers: fills work.residual.back(). Used by the steps above and by generation.
Pass begin_pass(const StepModel& model, const TokenBatch& batch, size_t cache_start);
void forward_layers(const Pass& pass);
// Final norm and head of `num_rows` rows of work.loss_x: fills work.logits.
void head_forward(const Pass& pass, size_t num_rows);

}  // namespace tunemesh
