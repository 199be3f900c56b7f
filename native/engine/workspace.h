// Activations and scratch of a pass over at most N tokens: reserved once, written anew by every
// pass.
//
//   legend  N tokens, C hidden, V vocabulary, H query heads, G key/value heads, F head size,
//           D feed-forward, R rows of a loss chunk, r LoRA rank
#pragma once
#include <array>
#include <vector>

#include "engine/arena.h"
#include "engine/model_config.h"

namespace tunemesh {

struct WorkspaceSpec {
  size_t tokens = 0;
  size_t longest_document = 0;  // positions, and attention's scratch
  size_t loss_rows = 0;         // R
  size_t lora_rank = 0;
  bool has_backward = false;
  size_t cache_tokens = 0;  // rows of the key/value cache; 0: none
};

// What backward needs of a layer, kept from forward. Without backward all layers share one set.
// With a cache, k and v are the layer's cache [cache_tokens, G*F].
struct LayerActivations {
  float* rstd1 = nullptr;                              // [N]
  TmElement *q = nullptr, *k = nullptr, *v = nullptr;  // [N, H*F], [N, G*F] twice; rotated
  TmElement *q_raw = nullptr, *k_raw = nullptr;        // before q/k norm; null without it
  float *q_rstd = nullptr, *k_rstd = nullptr;          // [N*H], [N*G]
  TmElement* attention = nullptr;                      // [N, H*F]
  float* lse = nullptr;                                // [N, H]
  TmElement* x_mid = nullptr;                          // [N, C], after attention's residual
  float* rstd2 = nullptr;                              // [N]
  // [N, D]; backward writes their gradients over them
  TmElement *gate = nullptr, *up = nullptr;
  std::array<TmElement*, kNumLinears> lora_u = {};  // scale x A^T [N, r]
};

struct Workspace {
  WorkspaceSpec spec;
  int32_t *tokens = nullptr, *positions = nullptr, *document_starts = nullptr;
  float *rotary_cos = nullptr, *rotary_sin = nullptr;  // [longest_document, F/2]
  std::vector<TmElement*> residual;  // x before layer l, and after the last one: [N, C]
  std::vector<LayerActivations> layers;
  TmElement* normed = nullptr;  // [N, C]
  TmElement* swiglu = nullptr;  // [N, D]
  void* attention_scratch = nullptr;
  size_t attention_scratch_bytes = 0;
  float* decode_scores = nullptr;  // [H, decode_score_stride]
  size_t decode_score_stride = 0;  // cache_tokens rounded up to a vector
  // loss
  int32_t *loss_rows = nullptr, *loss_targets = nullptr;  // [N]
  TmElement *loss_x = nullptr, *loss_normed = nullptr;    // [R, C]
  float* loss_rstd = nullptr;                             // [R]
  TmElement* logits = nullptr;                            // [R, V]
  double* row_losses = nullptr;                           // [R]
  // backward
  TmElement *dx = nullptr, *dnormed = nullptr;            // [N, C]
  TmElement *dq = nullptr, *dk = nullptr, *dv = nullptr;  // as q, k, v
  TmElement* dattention = nullptr;                        // [N, H*F]
  TmElement* dswiglu = nullptr;                           // [N, D]
  TmElement* lora_du = nullptr;                           // [N, r]
  TmElement* loss_dx = nullptr;                           // [R, C]

  // Call on the counting arena and again on the real one.
  void reserve(const ModelConfig& config, const Device& device, Arena& arena);
  // Fills the rotary table; once, after the real reserve().
  void fill_rotary(const ModelConfig& config, const Device& device) const;
};

}  // namespace tunemesh
