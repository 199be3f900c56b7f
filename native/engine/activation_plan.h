// What of a layer's forward is kept until its backward: the trade of memory for time, layer by
// layer. Every choice gives the same bits: what is computed again is computed by the same
// operations from the same inputs.
#pragma once
#include <cstddef>
#include <vector>

namespace tunemesh {

enum class Keep {
  kEverything,     // the inputs of all linears too: nothing is computed again
  kProducts,       // what products and attention gave; norms and SwiGLU are computed again
  kAttentionHalf,  // not gate and up: one product is computed again
  kInput,          // the layer's input: the whole layer is computed again (gradient checkpointing)
};

struct LayerPlan {
  Keep keep = Keep::kProducts;
  // kProducts only: what is kept moves to host memory while the layers above are computed, and
  // comes back before its backward.
  bool is_offloaded = false;
  bool operator==(const LayerPlan&) const = default;
};
using ActivationPlan = std::vector<LayerPlan>;  // by layer

// How many layers do what.
struct ActivationCounts {
  size_t everything = 0, products = 0, attention_half = 0, input = 0, offloaded = 0;
  size_t num_layers() const { return everything + products + attention_half + input + offloaded; }
};
ActivationCounts counts_of(const ActivationPlan& plan);
// Offloaded layers spread evenly, so that each has time to move; of the others those that keep
// least come first.
ActivationPlan plan_of(const ActivationCounts& counts);

// Bytes of one layer's parts, and of everything else where each layer keeps its input only.
struct ActivationBytes {
  size_t num_layers = 0;
  size_t rest = 0;            // with the places that layers share, which kInput needs
  size_t attention_half = 0;  // a layer's own, beside gate and up
  size_t gate_up = 0;
  size_t inputs = 0;  // what kEverything adds to kProducts
  size_t kept() const { return attention_half + gate_up; }
  size_t device_bytes(const ActivationCounts& counts) const;
  size_t host_bytes(const ActivationCounts& counts) const;
};

// Seconds that a choice costs, estimated: only their ratios matter.
struct ActivationTimes {
  double attention_half = 0, gate_up = 0;  // to compute again
  double norms = 0;                        // what kProducts costs over kEverything
  double move = 0;                         // of kept(), one way
  double forward = 0;                      // of all layers: what moving can hide behind
  double seconds(const ActivationCounts& counts) const;
};

// May a choice be made use of?
enum class Use { kAuto, kNever, kAlways };

struct ActivationLimits {
  size_t device_bytes = 0, host_bytes = 0;
  // kEverything saves little time: it may fill the device up to here only.
  size_t generous_bytes = 0;
  Use checkpointing = Use::kAuto, offloading = Use::kAuto;
};
// The fastest choice within the limits; where none fits, the one of the fewest device bytes.
ActivationCounts choose_activations(const ActivationBytes& bytes, const ActivationTimes& times,
                                    const ActivationLimits& limits);

}  // namespace tunemesh
