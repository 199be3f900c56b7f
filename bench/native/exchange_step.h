// The step of a mesh's worker on its own: a lease of one micro-batch whose gradient is rounded,
// packed and copied to the host slice by slice, on the device or as where that cannot, then the
// update with a sum that lies in host memory. What other workers would add, and the network, are
// left out.
#pragma once
#include <algorithm>
#include <string>

#include "bench/native/bench_model.h"
#include "engine/engine.h"

namespace tunemesh::bench {

enum class ExchangeMode { kOff, kDevice, kHost };

inline ExchangeMode exchange_mode(const std::string& name) {
  if (name == "off") return ExchangeMode::kOff;
  if (name == "device") return ExchangeMode::kDevice;
  if (name == "host") return ExchangeMode::kHost;
  throw EngineError("JOB_INVALID", "--exchange is " + name + "; use off, device or host.");
}

// Cut as proto/slices.ts does.
inline void plan_exchange(const Engine& engine, ExchangeMode mode, TrainSpec& spec) {
  constexpr size_t kSliceBlocks = 4096, kLeastSlices = 8, kMostSlices = 256;
  spec.is_local = mode == ExchangeMode::kOff;
  if (spec.is_local) return;
  spec.num_contribution_slots = 2;
  spec.chunk_blocks = 256;
  spec.slice_blocks = kSliceBlocks;
  spec.device_sums = mode == ExchangeMode::kDevice ? Use::kAlways : Use::kNever;
  const size_t num_blocks = engine.plan(spec).num_blocks;
  const size_t wanted = (num_blocks + kSliceBlocks - 1) / kSliceBlocks;
  const size_t num_slices = std::clamp(wanted, kLeastSlices, kMostSlices);
  spec.slice_blocks = (num_blocks + num_slices - 1) / num_slices;
}

// Until the host has every slice; answers the bytes that would travel.
inline size_t exchange_micro_batch(Engine& engine, const TokenBatch& batch) {
  size_t wire_bytes = 0;
  engine.exchange()->clear_slot(0);
  engine.micro_batch(batch, static_cast<double>(batch.num_tokens),
                     {0, [&wire_bytes](const ContributionSlice& slice) {
                        wire_bytes += slice.measure.packed_bytes;
                      }});
  return wire_bytes;
}

}  // namespace tunemesh::bench
