// Activations and scratch of a pass over at most N tokens: reserved once, written anew by every
// pass.
//
//   legend  N tokens, C hidden, V vocabulary, H query heads, G key/value heads, F head size,
//           D feed-forward, R rows of a loss chunk, r LoRA rank
//
// Where linears run in groups, their outputs lie side by side in one row and rows end with room for
// the border (RowStrides); else every matrix has rows of its own width.
#pragma once
#include <array>
#include <vector>

#include "engine/activation_plan.h"
#include "engine/arena.h"
#include "engine/linear_groups.h"
#include "engine/model_config.h"
#include "engine/region.h"

namespace tunemesh {

struct WorkspaceSpec {
  size_t tokens = 0;
  size_t longest_document = 0;  // positions, and attention's scratch
  size_t loss_rows = 0;         // R
  size_t lora_rank = 0;
  bool has_backward = false;
  size_t cache_tokens = 0;  // rows of the key/value cache; 0: none
  GroupPlan groups;
  // With backward: one of each layer; empty: kProducts.
  std::vector<LayerPlan> layers = {};
};

// Elements from row to row.
struct RowStrides {
  size_t raw_query, raw_key, value;  // as the linears give them
  size_t query, key;                 // with q/k norm other matrices, else the same
  size_t attention, normed, gate_up, swiglu;
  size_t query_grad, key_grad, value_grad;
  size_t dx;
};
RowStrides row_strides(const ModelConfig& config, const WorkspaceSpec& spec);

// What backward needs of a layer, kept from forward as the layer's plan says. Without backward all
// layers share one set. With a cache, k and v are the layer's cache [cache_tokens, G*F].
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
  // Inputs of q, k and v [N, C], gate and up [N, C], down [N, D]: the layer's own where it keeps
  // them, else the pass's scratch.
  TmElement *normed1 = nullptr, *normed2 = nullptr, *swiglu = nullptr;
  bool keeps_inputs = false;
  // What is above lies in buffers that layers share, and another layer has written there since:
  // backward computes it again first.
  bool recomputes_attention = false, recomputes_gate_up = false;
  std::array<TmElement*, kNumLinears> lora_u = {};  // scale x A^T [N, r]; without groups
  // The tail of a group's input [N, border]; null where it stays in the input's own rows.
  std::array<TmElement*, kNumGroups> tails = {};
};

// An offloaded layer's buffers: one of two places on the device, which such layers take in turn.
// The last two stay there until their backward.
struct LayerTransfer {
  int lane = -1;  // of the copies; -1: the layer is not offloaded
  void* device = nullptr;
  void* host = nullptr;
  size_t num_bytes = 0;
  bool is_moved = false;
  int below = -1;  // the layer that had the place before: comes back when this one's backward ends
};

struct Workspace {
  WorkspaceSpec spec;
  uint64_t recording_id = 0;  // a job's: its passes may be recorded (recorded_calls.h)
  RowStrides strides = {};
  int32_t *tokens = nullptr, *positions = nullptr;        // [N]
  int32_t* document_starts = nullptr;                     // [N + 1], padded with empty documents
  int32_t *loss_rows = nullptr, *loss_targets = nullptr;  // [N]
  double* row_losses = nullptr;                           // [N]
  float *rotary_cos = nullptr, *rotary_sin = nullptr;     // [longest_document, F/2]
  std::vector<TmElement*> residual;  // x before layer l, and after the last one: [N, C]
  std::vector<LayerActivations> layers;
  std::vector<LayerTransfer> transfers;  // by layer; empty: none is offloaded
  TmElement* normed = nullptr;           // [N, C]
  // From here on attention, MLP and loss share their memory: no two of them run at once.
  TmElement* swiglu = nullptr;  // [N, D]
  void* attention_scratch = nullptr;
  size_t attention_scratch_bytes = 0;
  // What each group's product reads as e4m3 numbers (fp8): forward its inputs, backward its output
  // gradients. Those of attention take turns with attention_scratch.
  std::array<TmQuantised, kNumGroups> quantised = {};
  float* decode_scores = nullptr;                         // [H, decode_score_stride]
  size_t decode_score_stride = 0;                         // cache_tokens rounded up to a vector
                                                          // loss
  TmElement *loss_x = nullptr, *loss_normed = nullptr;    // [R, C]
  float* loss_rstd = nullptr;                             // [R]
  TmElement* logits = nullptr;                            // [R, V]
  TmElement* loss_dx = nullptr;                           // [R, C]; backward, as what follows
  TmElement *dq = nullptr, *dk = nullptr, *dv = nullptr;  // as q, k, v
  TmElement* dattention = nullptr;                        // [N, H*F]
  TmElement* dswiglu = nullptr;                           // [N, D]; with groups it is swiglu
  // Not shared again:
  TmElement *dx = nullptr, *dnormed = nullptr;  // [N, C]
  TmElement* lora_du = nullptr;                 // [N, r]; without groups

  // Do dx's rows have room for a border behind the hidden size?
  bool has_dx_border() const {
    return spec.groups.borders[kOutputGroup] + spec.groups.borders[kDownGroup] > 0;
  }

  // Call on the counting arenas and again on the real ones. `host` is for what is offloaded.
  struct Arenas {
    Arenas(Arena& of_device, Arena* of_host = nullptr) : device(of_device), host(of_host) {}
    Arena& device;
    Arena* host;
  };
  void reserve(const ModelConfig& config, const Device& device, const Arenas& arenas);
  // Fills the rotary table; once, after the real reserve().
  void fill_rotary(const ModelConfig& config, const Device& device) const;

 private:
  void reserve_layers(const ModelConfig& config, const Device& device, const Arenas& arenas);
  void reserve_cache(const ModelConfig& config, Arena& arena);
  void reserve_scratch(const ModelConfig& config, const Device& device, Arena& arena);
  void take_attention_scratch(const ModelConfig& config, Region& region);
  void take_mlp_scratch(Region& region);
  void take_loss_scratch(const ModelConfig& config, Region& region);
};

}  // namespace tunemesh
