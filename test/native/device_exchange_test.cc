// The exchange of a device that rounds and packs: frames and sums have the bits of the host's,
// leases that interrupt each other lose nothing, and a sum that travels ahead of its update changes
// none.
//
//   device_exchange_test [tunemesh_cuda.so]; the plugin is otherwise sought in build/native
#include <algorithm>
#include <cstring>

#include "cuda_device.h"
#include "device_like_backend.h"
#include "engine_case.h"
#include "test_check.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

bool same_bits(const std::vector<TensorValues>& a, const std::vector<TensorValues>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.values.size() == y.values.size() &&
           std::memcmp(x.values.data(), y.values.data(), x.values.size() * sizeof(float)) == 0;
  });
}

std::vector<std::vector<uint8_t>> frames_of_slot(ExchangeBuffers& exchange, int slot) {
  std::vector<std::vector<uint8_t>> frames;
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    for (size_t chunk = 0; chunk < exchange.num_chunks(slice); ++chunk) {
      FrameHeader header;
      header.slice = static_cast<uint16_t>(slice);
      header.chunk = static_cast<uint16_t>(chunk);
      const size_t bytes = exchange.pack_contribution(slot, header, 0);
      frames.emplace_back(exchange.frames().begin(),
                          exchange.frames().begin() + static_cast<std::ptrdiff_t>(bytes));
    }
  }
  return frames;
}

struct Finished {
  std::vector<uint64_t> sums, published;
  std::vector<double> squares;
  std::vector<float> values;
  bool operator==(const Finished&) const = default;
};

// Two own contributions and one that arrives as frames; or the first alone, read where it lies.
Finished finish_all(ExchangeBuffers& exchange, const std::vector<std::vector<uint8_t>>& arrived) {
  Finished finished;
  size_t next = 0;
  for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
    exchange.clear_sum(slice);
    exchange.add_own_contribution(0, slice);
    if (!arrived.empty()) {
      std::vector<std::span<const uint8_t>> frames;
      for (size_t i = 0; i < exchange.num_chunks(slice); ++i) frames.emplace_back(arrived[next++]);
      exchange.add_contribution_frames(frames);
      exchange.add_own_contribution(1, slice);
    }
    const FinishedSlice result = exchange.finish_slice(4, slice);
    finished.sums.push_back(result.sum_digest);
    finished.published.push_back(result.published_digest);
    finished.squares.push_back(result.sum_squares);
  }
  const float* const values = exchange.published(4);
  finished.values.assign(values, values + exchange.options().num_blocks * kBlockElements);
  return finished;
}

// Where the host rounds, and where the device packs.
struct Sides {
  Choice host, device;
};

// What leaves and what the owner makes of it: the bytes of frames, and the sums' bits.
void test_exchange_of_device(const Sides& sides, const Case& made, TrainSpec spec) {
  const std::string what = "exchange of a device that packs, " +
                           std::to_string(spec.significant_bits) + " bits" +
                           (spec.is_full ? ", full" : "");
  spec.num_contribution_slots = 2;
  std::vector<std::vector<uint8_t>> frames[2];
  Finished alone[2], together[2];
  for (const int which : {0, 1}) {
    const auto engine = engine_of(made, which == 0 ? sides.host : sides.device);
    spec.device_sums = which == 0 ? Use::kNever : Use::kAlways;
    engine->prepare(spec);
    ExchangeBuffers& exchange = *engine->exchange();
    // The lease of slot 0 is interrupted by that of slot 1, which is over before it goes on.
    ContributionTarget first(0);
    first.more_follows = true;
    exchange.clear_slot(0);
    engine->micro_batch(made.batch(), 3, first);
    exchange.clear_slot(1);
    engine->micro_batch(made.batch(), 5, 1);
    engine->micro_batch(made.batch(), 7, 0);
    CHECK(exchange.options().is_packed == (which == 1), what + ": planned otherwise");
    frames[which] = frames_of_slot(exchange, 0);
    alone[which] = finish_all(exchange, {});
    together[which] = finish_all(exchange, frames[which]);
    // A slot that is used again keeps its part of the sums.
    exchange.clear_sum(0);
    const uint64_t added = exchange.add_own_contribution(0, 0);
    exchange.clear_slot(0);
    CHECK(exchange.finish_slice(5, 0).sum_digest == added, what + ": a sum is lost");
  }
  CHECK(frames[0] == frames[1], what + ": other frames");
  CHECK(alone[0] == alone[1], what + ": another sum of one contribution");
  CHECK(together[0] == together[1], what + ": another sum of three contributions");
}

void test_exchanges(const Sides& sides) {
  for (uint64_t seed = 5; seed < 9; ++seed) {
    const Case made = random_case(seed);
    TrainSpec spec = spec_of(made, seed == 5 ? std::vector<std::string>() : kAllModules);
    spec.significant_bits = seed == 7 ? 8 : 24;
    test_exchange_of_device(sides, made, spec);
  }
}

AdamWNumbers some_update() {
  AdamWNumbers numbers = {};
  numbers.learning_rate = 0.01f;
  numbers.clip_factor = 0.9f;
  numbers.bias_correction1 = 0.1f;
  numbers.bias_correction2_sqrt = 0.03f;
  return numbers;
}

// Slices of a sum that travel ahead of the update, of which some are written again or forgotten by
// a micro-batch that comes between: the same weights as from a sum that is read as a whole.
void test_fetched_sums(const Choice& choice) {
  const Case made = random_case(6);
  TrainSpec spec = spec_of(made, kAllModules);
  std::vector<std::vector<TensorValues>> weights;
  for (const int fetches : {0, 1, 2, 3}) {
    const auto engine = engine_of(made, choice);
    engine->prepare(spec);
    ExchangeBuffers& exchange = *engine->exchange();
    engine->micro_batch(made.batch(), 3, 0);
    for (size_t slice = 0; slice < exchange.num_slices(); ++slice) {
      exchange.clear_sum(slice);
      exchange.add_own_contribution(0, slice);
      if (fetches == 3) {  // of the last try, which is not the sum
        std::fill_n(exchange.published(1) + exchange.slice_first_block(slice) * kBlockElements,
                    exchange.slice_num_blocks(slice) * kBlockElements, 0.25f);
        engine->fetch_sum(1, slice);
      }
      exchange.finish_slice(1, slice);
      if (fetches == 0 || (fetches == 1 && slice % 3 == 1)) continue;
      engine->fetch_sum(1, slice);
    }
    if (fetches == 2) engine->micro_batch(made.batch(), 5, 0);
    engine->apply_update(1, some_update());
    weights.push_back(engine->weights());
    CHECK_THROWS(engine->fetch_sum(2, exchange.num_slices()), "ENGINE_FAILED", "does not exist");
  }
  for (size_t i = 1; i < weights.size(); ++i) {
    CHECK(same_bits(weights[0], weights[i]), "fetched sums give other weights");
  }
}

void test_cuda(const std::string& plugin) {
  const TmBackend* const backend = cuda_backend_or_skip(plugin);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    Choice choice;
    choice.backend = backend;
    choice.precision = precision;
    test_exchanges({choice, choice});
    test_fetched_sums(choice);
  }
}

void test_unpacked_slots() {
  const Case made = random_case(3);
  const auto engine = engine_of(made, {2, "auto", device_like_backend()});
  TrainSpec spec = spec_of(made, kAllModules);
  spec.num_contribution_slots = 2;
  engine->prepare(spec);
  ContributionTarget target(0);
  target.more_follows = true;
  engine->micro_batch(made.batch(), 3, target);
  CHECK_THROWS(engine->exchange()->measure_contribution(0, 0), "STATE_CONFLICT", "not packed");
  engine->micro_batch(made.batch(), 3, 0);
  engine->micro_batch(made.batch(), 3, 1);  // takes the device's place of a slot that is packed
  CHECK_THROWS(engine->micro_batch(made.batch(), 3, 0), "STATE_CONFLICT", "slot 0");
  engine->micro_batch(made.batch(), 3, 1);  // slot 1 stands as it was
  // Without room for the sums the host rounds, and the plan says so.
  spec.device_memory_bytes = 1;
  const MemoryPlan planned = engine->plan(spec);
  CHECK(std::none_of(planned.uses.begin(), planned.uses.end(),
                     [](const MemoryUse& use) { return use.purpose == "fixed-point gradient"; }),
        "sums are planned where there is no room");
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  test_exchanges({{2, "auto", host_group_backend()}, {2, "auto", device_like_backend()}});
  test_unpacked_slots();
  test_fetched_sums({2, "auto", device_like_backend()});
  test_cuda(options_of(argc, argv).plugin);
  return finish("device_exchange_test");
}
