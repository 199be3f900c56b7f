// One decoder layer, forward and backward, on the buffers of a workspace.
//
//   x_mid = x + o_proj(attention(rope(q/k norm(qkv(norm(x))))))
//   x_out = x_mid + down_proj(silu(gate_proj(norm(x_mid))) * up_proj(norm(x_mid)))
#pragma once
#include <cstddef>

#include "engine/decoder_weights.h"
#include "engine/device.h"
#include "engine/workspace.h"

namespace tunemesh {

// What is common to all layers of one pass.
struct Pass {
  const Device& device;
  const ModelConfig& config;
  const DecoderWeights& weights;
  const Workspace& work;
  size_t n = 0;  // tokens of this pass
  size_t num_documents = 0;
  // Generation: this pass's keys and values go to rows cache_start.. of the cache. Where it is
  // above 0 the pass is one token that attends to all rows before it.
  size_t cache_start = 0;
  const int32_t* host_document_starts = nullptr;
  bool has_backward = false;  // follows: what layers keep is then looked after
};

void layer_forward(const Pass& pass, size_t layer);
// Computes again what backward needs of the layer and finds no more (LayerActivations).
void layer_again(const Pass& pass, size_t layer);

// How far the gradient must go below a layer: nothing below the lowest trained tensor is computed.
enum class BackwardDepth {
  kMlp,        // to the gate and up (or down) adapters only
  kOutput,     // through the MLP to o_proj's own gradient
  kAttention,  // through attention to q, k and v's own gradients
  kInput,      // to the layer's input
};

// Begins with layer_again(). work.dx holds d loss / d x_out and receives d loss / d x (with
// kInput).
void layer_backward(const Pass& pass, size_t layer, BackwardDepth depth);

}  // namespace tunemesh
