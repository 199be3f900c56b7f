// Text generation with a key/value cache.
#pragma once
#include <atomic>
#include <functional>
#include <vector>

#include "engine/decoder_weights.h"
#include "engine/device.h"
#include "engine/model_config.h"

namespace tunemesh {

struct GenerateOptions {
  std::vector<int32_t> prompt;
  size_t max_new_tokens = 0;
  float temperature = 0;  // 0: greedy
  float top_p = 1;
  uint64_t seed = 0;  // token i of the answer draws random number i
  std::vector<int32_t> stop_ids;
};

struct GenerateHooks {
  std::function<void(int32_t)> on_token;
  const std::atomic<bool>* is_aborted;
};

struct GenerateResult {
  std::vector<int32_t> ids;   // without the stop token
  const char* finish_reason;  // "stop", "length", "aborted"
};

struct GenerateModel {
  const Device& device;
  const ModelConfig& config;
  const DecoderWeights& weights;
};

// Reserves its own cache and buffers and gives them back at the end.
GenerateResult generate(const GenerateModel& model, const GenerateOptions& options,
                        const GenerateHooks& hooks);

// The next token from a row of logits. Greedy takes the lowest id among equals.
int32_t sample_token(const std::vector<float>& logits, const GenerateOptions& options,
                     size_t token_index);

}  // namespace tunemesh
