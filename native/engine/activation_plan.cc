#include "engine/activation_plan.h"

#include <algorithm>
#include <cstdint>

namespace tunemesh {
namespace {

constexpr size_t kPlaces = 2;  // of offloaded layers on the device

// Of a copy that is hidden: memory traffic beside the products, and a tie's decision.
constexpr double kHiddenCopyCost = 0.02;

struct Found {
  ActivationCounts counts;
  size_t device_bytes = SIZE_MAX;
  double seconds = 0;
  bool is_fit = false;

  bool is_better_than(const Found& other) const {
    if (is_fit != other.is_fit) return is_fit;
    if (!is_fit) return device_bytes < other.device_bytes;
    if (seconds != other.seconds) return seconds < other.seconds;
    return device_bytes < other.device_bytes;
  }
};

}  // namespace

ActivationCounts counts_of(const ActivationPlan& plan) {
  ActivationCounts counts;
  for (const LayerPlan& layer : plan) {
    if (layer.is_offloaded) {
      ++counts.offloaded;
    } else if (layer.keep == Keep::kEverything) {
      ++counts.everything;
    } else if (layer.keep == Keep::kProducts) {
      ++counts.products;
    } else {
      ++(layer.keep == Keep::kAttentionHalf ? counts.attention_half : counts.input);
    }
  }
  return counts;
}

ActivationPlan plan_of(const ActivationCounts& counts) {
  ActivationPlan plan(counts.num_layers());
  for (size_t i = 0; i < counts.offloaded; ++i) {
    plan[i * plan.size() / counts.offloaded].is_offloaded = true;
  }
  size_t done = 0;
  for (LayerPlan& layer : plan) {
    if (layer.is_offloaded) continue;
    if (done < counts.input) {
      layer.keep = Keep::kInput;
    } else if (done < counts.input + counts.attention_half) {
      layer.keep = Keep::kAttentionHalf;
    } else if (done < counts.input + counts.attention_half + counts.products) {
      layer.keep = Keep::kProducts;
    } else {
      layer.keep = Keep::kEverything;
    }
    ++done;
  }
  return plan;
}

size_t ActivationBytes::device_bytes(const ActivationCounts& counts) const {
  size_t bytes = rest;
  if (counts.input == 0) bytes -= attention_half;
  if (counts.input + counts.attention_half == 0) bytes -= gate_up;
  const size_t whole = counts.products + counts.everything + std::min(counts.offloaded, kPlaces);
  return bytes + counts.attention_half * attention_half + whole * kept() +
         counts.everything * inputs;
}

size_t ActivationBytes::host_bytes(const ActivationCounts& counts) const {
  return counts.offloaded > kPlaces ? (counts.offloaded - kPlaces) * kept() : 0;
}

// The last layer of each kind finds its values where it left them.
double ActivationTimes::seconds(const ActivationCounts& counts) const {
  const auto again = [](size_t layers) { return layers > 0 ? static_cast<double>(layers - 1) : 0; };
  const double moved =
      counts.offloaded > kPlaces ? static_cast<double>(counts.offloaded - kPlaces) * move : 0;
  const double exposed = std::max(0.0, moved - forward);
  return again(counts.input) * attention_half +
         again(counts.input + counts.attention_half) * gate_up +
         static_cast<double>(counts.num_layers() - counts.everything) * norms +
         2 * (exposed + kHiddenCopyCost * moved);
}

ActivationCounts choose_activations(const ActivationBytes& bytes, const ActivationTimes& times,
                                    const ActivationLimits& limits) {
  const size_t layers = bytes.num_layers;
  if (limits.checkpointing == Use::kAlways) return {.input = layers};
  if (limits.offloading == Use::kAlways) return {.offloaded = layers};
  Found best;
  const auto consider = [&](const ActivationCounts& counts) {
    Found found = {counts, bytes.device_bytes(counts), times.seconds(counts)};
    const size_t limit = counts.everything > 0 ? limits.generous_bytes : limits.device_bytes;
    found.is_fit = found.device_bytes <= std::min(limit, limits.device_bytes) &&
                   bytes.host_bytes(counts) <= limits.host_bytes;
    if (found.is_better_than(best)) best = found;
  };
  const size_t most_again = limits.checkpointing == Use::kNever ? 0 : layers;
  const size_t most_moved = limits.offloading == Use::kNever ? 0 : layers;
  for (size_t moved = 0; moved <= most_moved; ++moved) {
    if (bytes.host_bytes({.offloaded = moved}) > limits.host_bytes) break;
    for (size_t input = 0; input <= std::min(most_again, layers - moved); ++input) {
      const size_t left = layers - moved - input;
      for (size_t half = 0; half <= (most_again == 0 ? 0 : left); ++half) {
        consider({0, left - half, half, input, moved});
      }
      // Whoever has room to keep everything of some layers computes none again.
      for (size_t all = 1; input == 0 && moved == 0 && all <= left; ++all) {
        consider({all, left - all, 0, 0, 0});
      }
    }
  }
  return best.counts;
}

}  // namespace tunemesh
