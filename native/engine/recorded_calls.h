// Parts of a training step that are the same calls in every micro-batch of one key: recorded by the
// backend and launched at once where it can (calls_begin of kernels/backend.h), issued one by one
// elsewhere, with the same bits.
//
// What may vary between two runs of a key lies in device memory: tokens, positions, padded document
// starts, weights. Everything else is in the key, or fixed as long as a job's buffers are.
#pragma once
#include <cstdint>
#include <functional>

#include "engine/decoder_layer.h"

namespace tunemesh {

enum class StepPart : uint64_t { kForward, kBackward };

// A number of its own for each set of buffers that recorded calls may use; never 0.
uint64_t new_recording_id();

// Issues `calls`, or launches what they recorded before. They may be issued twice: nothing has run
// the first time then. Without an id (inference's buffers) they are never recorded.
struct RecordedPart {
  uint64_t recording_id;
  StepPart part;
  uint64_t layer = 0;
  uint64_t num_tokens = 0;
  const Pass* pass = nullptr;  // whose documents shape attention's calls; null: none does
};
void run_recorded(const Device& device, const RecordedPart& part,
                  const std::function<void()>& calls);

}  // namespace tunemesh
