// Slices of a contribution, told while backward goes on: the bits and measures of a contribution
// that is rounded and measured as a whole afterwards; nothing is told of a gradient that fails.
#include <algorithm>
#include <cmath>
#include <optional>

#include "device_like_backend.h"
#include "engine/contribution_writer.h"
#include "engine_case.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

size_t layer_of(const std::string& name) {
  const size_t at = name.find(".layers.");
  return at == std::string::npos ? 0 : std::stoul(name.substr(at + 8));
}

std::vector<int64_t> slice_values(Engine& engine, size_t slice) {
  ExchangeBuffers& exchange = *engine.exchange();
  const size_t num_blocks = exchange.slice_num_blocks(slice);
  if (exchange.options().is_packed) {
    std::vector<int64_t> values(num_blocks * kBlockElements);
    unpack(exchange.packed_slice(0, slice).all(), num_blocks, values.data());
    return values;
  }
  const int64_t* from =
      exchange.contribution(0) + exchange.slice_first_block(slice) * kBlockElements;
  return {from, from + num_blocks * kBlockElements};
}

struct Told {
  ContributionSlice slice;
  std::vector<int64_t> values;  // what stood in the slot when it was told
};

// Two micro-batches into one slot; in the last one somebody listens.
std::vector<Told> told_of(Engine& engine, const Case& made, bool last_is_empty) {
  std::vector<Told> told;
  engine.exchange()->clear_slot(0);
  engine.micro_batch(made.batch(), 3, 0);
  const TokenBatch last = last_is_empty ? TokenBatch{} : made.batch();
  engine.micro_batch(last, 7, {0, [&](const ContributionSlice& slice) {
                                 told.push_back({slice, slice_values(engine, slice.slice)});
                               }});
  return told;
}

size_t lowest_layer(Engine& engine, size_t slice) {
  const size_t block = engine.exchange()->slice_first_block(slice);
  return layer_of(engine.layout().tensor_of_block(block).name);
}

void test_same_contribution(uint64_t seed, const std::vector<std::string>& modules) {
  const Case made = random_case(seed);
  const auto engine = engine_of(made), whole = engine_of(made);
  for (Engine* each : {engine.get(), whole.get()}) each->prepare(spec_of(made, modules));
  const std::string what = "seed " + std::to_string(seed) + (modules.empty() ? " full" : " lora");
  for (const bool last_is_empty : {false, true}) {
    whole->exchange()->clear_slot(0);
    whole->micro_batch(made.batch(), 3, 0);
    if (!last_is_empty) whole->micro_batch(made.batch(), 7, 0);
    const auto told = told_of(*engine, made, last_is_empty);
    const size_t num_slices = engine->exchange()->num_slices();
    CHECK(num_slices > 2 && told.size() == num_slices, what + ": not every slice is told once");
    std::vector<bool> seen(num_slices, false);
    for (const auto& [slice, values] : told) {
      CHECK(!seen[slice.slice], what + ": a slice is told twice");
      seen[slice.slice] = true;
      const SliceMeasure wanted = whole->exchange()->measure_contribution(0, slice.slice);
      CHECK(slice.measure.digest == wanted.digest, what + ": another digest");
      CHECK(slice.measure.packed_bytes == wanted.packed_bytes, what + ": other packed bytes");
      CHECK(values == slice_values(*whole, slice.slice), what + ": told before it stands");
    }
    // An adapter's tensors lie layer by layer, and backward ends the last layer first.
    const bool in_order = std::is_sorted(told.begin(), told.end(), [&](auto& a, auto& b) {
      return lowest_layer(*engine, a.slice.slice) > lowest_layer(*engine, b.slice.slice);
    });
    CHECK(modules.empty() || in_order, what + ": slices out of backward's order");
  }
}

// A device's gradient arrives by late copies, as packed slices or in pieces of a staging buffer
// that holds half the vector: the same slot, slice by slice, as from memory of the host.
void test_contribution_of_device(uint64_t seed, const std::vector<std::string>& modules,
                                 Use device_sums) {
  const Case made = random_case(seed);
  const bool is_packed = device_sums == Use::kAuto;
  const std::string what = std::string("device that ") + (is_packed ? "packs" : "does not pack") +
                           ", seed " + std::to_string(seed) + (modules.empty() ? " full" : "");
  const auto host = engine_of(made, {2, "auto", host_group_backend()});
  const auto device = engine_of(made, {2, "auto", device_like_backend()});
  TrainSpec spec = spec_of(made, modules);
  spec.device_sums = device_sums;
  for (Engine* each : {host.get(), device.get()}) each->prepare(spec);
  CHECK(device->exchange()->options().is_packed == is_packed, what + ": planned otherwise");
  const size_t started = late_copies.num_started;
  for (const bool last_is_empty : {false, true}) {
    const auto wanted = told_of(*host, made, last_is_empty);
    const auto told = told_of(*device, made, last_is_empty);
    CHECK(told.size() == wanted.size(), what + ": not every slice is told");
    for (size_t i = 0; i < wanted.size() && i < told.size(); ++i) {
      CHECK(told[i].slice.slice == wanted[i].slice.slice, what + ": another order");
      CHECK(told[i].slice.measure.digest == wanted[i].slice.measure.digest &&
                told[i].slice.measure.packed_bytes == wanted[i].slice.measure.packed_bytes,
            what + ": another measure");
      CHECK(told[i].values == wanted[i].values, what + ": other sums");
    }
  }
  const size_t least =
      is_packed ? 3 * device->exchange()->num_slices() : 3 * made.config.num_layers;
  CHECK(late_copies.num_started >= started + least, what + ": the gradient comes in one piece");
  CHECK(late_copies.waiting.empty(), what + ": copies are under way after a step");
}

// A step that fails half-way leaves no copy under way, and the next one is right.
void test_failed_step_of_device(Use device_sums) {
  const Case made = random_case(2);
  const auto device = engine_of(made, {2, "auto", device_like_backend()});
  TrainSpec spec = spec_of(made, {});
  spec.device_sums = device_sums;
  device->prepare(spec);
  CHECK_THROWS(device->micro_batch(made.batch(), 1e-12, 0), "GRADIENT_OUT_OF_RANGE", "32768");
  CHECK(late_copies.waiting.empty(), "copies are under way after a failed step");
  device->exchange()->clear_slot(0);
  device->micro_batch(made.batch(), 3, 0);
  CHECK(!device->exchange()->is_poisoned(0), "the step after a failed one fails");
}

// The largest magnitude of each layer's adapters, and the first tensor that reaches `limit`.
std::vector<float> largest_of_layers(Engine& engine, const Case& made) {
  std::vector<float> largest(made.config.num_layers, 0);
  for (const TensorValues& tensor : engine.gradients(made.batch(), 1)) {
    float& most = largest[layer_of(tensor.name)];
    for (const float value : tensor.values) most = std::max(most, std::abs(value));
  }
  return largest;
}

std::string first_beyond(Engine& engine, const Case& made, double divisor) {
  for (const TensorValues& tensor : engine.gradients(made.batch(), divisor)) {
    for (const float value : tensor.values) {
      if (std::abs(value) >= 32768) return tensor.name;
    }
  }
  return "";
}

// The last layer's gradient passes, the first one's does not: some slices have been told by then.
void test_failure_after_told_slices(const TmBackend* backend) {
  for (uint64_t seed = 1; seed < 40; ++seed) {
    const Case made = random_case(seed);
    const auto engine = engine_of(made, {2, "auto", backend});
    engine->prepare(spec_of(made, kAllModules));
    move_adapter(*engine, made);
    const std::vector<float> largest = largest_of_layers(*engine, made);
    if (largest.front() < 1.5f * largest.back()) continue;
    const double divisor = largest.front() / 40000.0;
    std::vector<size_t> told;
    std::optional<EngineError> failure;
    engine->exchange()->clear_slot(0);
    try {
      engine->micro_batch(made.batch(), divisor, {0, [&](const ContributionSlice& slice) {
                                                    told.push_back(slice.slice);
                                                  }});
    } catch (const EngineError& error) {
      failure = error;
    }
    CHECK(failure && failure->code() == "GRADIENT_OUT_OF_RANGE", "the gradient passes");
    CHECK(failure && failure->subject() == first_beyond(*engine, made, divisor),
          "another tensor is named than the first one that fails");
    // A device tells a few parts later, when the failure may be known.
    const bool is_packed = engine->exchange()->options().is_packed;
    CHECK((is_packed || !told.empty()) && told.size() < engine->exchange()->num_slices(),
          "slices are told of a gradient that fails, or none before it does");
    CHECK(engine->exchange()->is_poisoned(0), "the slot stays usable");
    CHECK_THROWS(engine->exchange()->measure_contribution(0, 0), "NON_FINITE_GRADIENT", "slot 0");
    return;
  }
  CHECK(false, "no seed has a first layer with much the larger gradient");
}

void test_parts() {
  for (const uint64_t seed : {2u, 3u}) {  // tied, untied
    const ModelConfig config = random_case(seed).config;
    const CanonicalLayout layout = full_layout(config);
    std::vector<int> times(layout.num_blocks, 0);
    const auto parts = gradient_parts(layout, config.num_layers);
    CHECK(parts.size() == config.num_layers + 2, "a part is missing");
    for (const auto& part : parts) {
      for (const BlockRange& range : part) {
        for (size_t i = 0; i < range.num_blocks; ++i) ++times[range.first_block + i];
      }
    }
    CHECK(std::count(times.begin(), times.end(), 1) == static_cast<long>(times.size()),
          "a block is in no part, or in two");
    const size_t embedding = layout.find("model.embed_tokens.weight")->first_block;
    CHECK(parts.back().at(0).first_block == embedding, "the embedding is not the last part");
    CHECK(parts[1].size() == 1, "a layer's tensors do not lie together");
  }
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  test_parts();
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    test_same_contribution(seed, {});
    test_same_contribution(seed, kAllModules);
  }
  test_failure_after_told_slices(tm_cpu_backend());
  test_failure_after_told_slices(device_like_backend());
  for (const tunemesh::Use device_sums : {tunemesh::Use::kAuto, tunemesh::Use::kNever}) {
    for (uint64_t seed = 1; seed <= 4; ++seed) {
      test_contribution_of_device(seed, {}, device_sums);
      test_contribution_of_device(seed, kAllModules, device_sums);
    }
    test_failed_step_of_device(device_sums);
  }
  return finish("contribution_test");
}
