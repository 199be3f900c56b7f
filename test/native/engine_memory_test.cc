// What layers keep, compute again or move to the host changes memory and time, and not a bit: loss
// and gradients of every trained tensor, for LoRA and full fine-tuning, on packed documents. The
// memory that a choice takes is what was reckoned, and the choice fits what there is.
//
//   engine_memory_test [tunemesh_cuda.so]   where there is a card, on it too
#include <cstdio>
#include <filesystem>

#include "cuda_device.h"
#include "device_like_backend.h"
#include "engine/engine.h"
#include "engine/memory_choice.h"
#include "engine_case.h"
#include "own_path.h"
#include "recording_backend.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

constexpr LayerPlan kEverything = {Keep::kEverything};
constexpr LayerPlan kProducts = {Keep::kProducts};
constexpr LayerPlan kHalf = {Keep::kAttentionHalf};
constexpr LayerPlan kInput = {Keep::kInput};
constexpr LayerPlan kMoved = {Keep::kProducts, true};

// More layers than random_case has, so that two places are taken by several.
Case deep_case(uint64_t seed, size_t num_layers) {
  Case made = random_case(seed);
  ModelConfig& config = made.config;
  const size_t from = config.num_layers;
  config.num_layers = num_layers;
  Random random(seed + 100);
  for (const TensorShape& tensor : model_tensors(config)) {
    if (made.source.tensors.count(tensor.name) != 0) continue;
    std::vector<float> values(tensor.num_elements());
    const bool is_norm = tensor.name.find("norm") != std::string::npos;
    for (float& value : values) {
      value = static_cast<float>(is_norm ? 1 + random.symmetric(0.3) : random.symmetric(0.3));
    }
    made.source.tensors[tensor.name] = {tensor.shape, std::move(values)};
  }
  CHECK(num_layers >= from, "the case has more layers than that");
  return made;
}

std::vector<ActivationPlan> plans_for(size_t num_layers) {
  std::vector<ActivationPlan> plans;
  for (const LayerPlan& layer : {kEverything, kHalf, kInput, kMoved}) {
    plans.emplace_back(num_layers, layer);
  }
  const std::vector<LayerPlan> mixed = {kMoved, kInput, kMoved,      kHalf,    kMoved,
                                        kInput, kMoved, kEverything, kProducts};
  for (size_t first = 0; first < 4; ++first) {
    ActivationPlan plan;
    for (size_t i = 0; i < num_layers; ++i) plan.push_back(mixed[(first + 2 * i) % mixed.size()]);
    plans.push_back(plan);
    plan.assign(mixed.begin() + static_cast<std::ptrdiff_t>(first), mixed.end());
    plan.resize(num_layers, kHalf);
    plans.push_back(plan);
  }
  return plans;
}

bool same_bits(const std::vector<TensorValues>& a, const std::vector<TensorValues>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const size_t bytes = a[i].values.size() * sizeof(float);
    if (std::memcmp(a[i].values.data(), b[i].values.data(), bytes) != 0) return false;
  }
  return a.size() == b.size();
}

std::string name_of(const ActivationPlan& plan) {
  std::string name;
  for (const LayerPlan& layer : plan) {
    name += layer.is_offloaded ? 'm' : "ephi"[static_cast<int>(layer.keep)];
  }
  return name;
}

struct Where {
  std::string name;
  Choice choice;
  bool embeds_from_host = false;
};

void test_same_bits(const Where& where, uint64_t seed, const Modules& modules) {
  const Case made = deep_case(seed, 8);
  const double divisor = static_cast<double>(made.num_targets());
  TrainSpec spec = spec_of(made, modules);
  const std::string what =
      where.name + ", seed " + std::to_string(seed) + ", modules " + std::to_string(modules.size());
  spec.host_embedding = Use::kNever;
  spec.layers.assign(8, kProducts);
  const auto plain = engine_of(made, where.choice);
  plain->prepare(spec);
  move_adapter(*plain, made, spec.is_full ? 0.01f : 0.1f);
  const std::string state = own_path("engine_memory_test.safetensors");
  plain->write_state(state, 1);
  const auto wanted = plain->gradients(made.batch(), divisor);
  const double loss = plain->evaluate(made.batch()).loss_sum;
  for (int round = 0; round < 3; ++round) plain->micro_batch(made.batch(), divisor, 0);
  for (const ActivationPlan& layers : plans_for(8)) {
    const std::string which = what + ", " + name_of(layers);
    spec.layers = layers;
    spec.host_embedding = where.embeds_from_host ? Use::kAlways : Use::kNever;
    const auto engine = engine_of(made, where.choice);
    const MemoryPlan planned = engine->plan(spec);
    const MemoryPlan reserved = engine->prepare(spec);
    CHECK(planned.total_bytes == reserved.total_bytes, which + ": plan() was not reserved");
    const bool embeds =
        where.embeds_from_host && can_embed_from_host(engine->device(), made.config, spec);
    CHECK(reserved.embedding_on_host == embeds, which + ": the embedding is elsewhere");
    engine->read_state(state);
    // Buffers then hold the last pass's values, and calls are launched as they were recorded.
    for (int round = 0; round < 3; ++round) {
      CHECK(engine->evaluate(made.batch()).loss_sum == loss, which + ": another loss");
      CHECK(same_bits(engine->gradients(made.batch(), divisor), wanted),
            which + ": other gradients");
      engine->micro_batch(made.batch(), divisor, 0);
    }
    CHECK(same_contribution(*engine, *plain), which + ": another contribution");
  }
  std::remove(state.c_str());
}

// A batch without targets ends after its forward, which has awaited its copies.
void test_untrained_batch() {
  const Case made = deep_case(3, 6);
  TrainSpec spec = spec_of(made, kAllModules);
  spec.layers.assign(6, kMoved);
  const auto engine = engine_of(made, {2, "auto", device_like_backend()});
  engine->prepare(spec);
  TokenBatch batch = made.batch();
  const std::vector<int32_t> untrained(batch.num_tokens, kUntrained);
  batch.targets = untrained.data();
  late_copies.num_started = 0;
  engine->gradients(batch, 1);
  CHECK(late_copies.num_started == 4, "four of six layers move to the host");
  CHECK(late_copies.waiting.empty(), "a copy is under way after the step");
  engine->evaluate(made.batch());
  CHECK(late_copies.num_started == 4, "an evaluation moves layers");
}

void test_choice_fits(const Modules& modules) {
  const Case made = deep_case(1, 8);
  const auto engine = engine_of(made, {2, "auto", device_like_backend()});
  const auto device = std::make_shared<Device>(device_like_backend(), DeviceOptions{});
  TrainSpec spec = spec_of(made, modules);
  const auto total_with = [&](const LayerPlan& layer, Use host_embedding) {
    TrainSpec fixed = spec;
    fixed.layers.assign(8, layer);
    fixed.host_embedding = host_embedding;
    return engine->plan(fixed).total_bytes;
  };
  const size_t most = total_with(kEverything, Use::kNever);
  const size_t products = total_with(kProducts, Use::kNever);
  const size_t least = total_with(kInput, Use::kAlways);
  spec.activation_offloading = Use::kNever;
  size_t last = 0;
  for (size_t limit = least; limit <= most; limit += (most - least) / 50 + 1) {
    spec.device_memory_bytes = limit;
    const MemoryPlan plan = engine->plan(spec);
    CHECK(plan.total_bytes <= limit, "the choice is larger than its limit");
    CHECK(plan.total_bytes >= last, "more room, and less of it used");
    last = plan.total_bytes;
  }
  spec.device_memory_bytes = products;
  CHECK(engine->plan(spec).activations.products == 8, "all products fit and are not kept");
  spec.device_memory_bytes = most;
  CHECK(engine->plan(spec).activations.everything == 8, "everything fits and is not kept");
  // Without room for the sums the host rounds.
  spec.device_memory_bytes = least - 1;
  CHECK(engine->plan(spec).total_bytes < least, "the sums stay where they do not fit");
  spec.device_sums = Use::kAlways;
  CHECK(engine->plan(spec).total_bytes == least, "the sums go where they were asked to stay");
  spec.device_sums = Use::kNever;
  spec.device_memory_bytes = 0;
  const size_t smallest = total_with(kInput, Use::kAlways);
  // Without room for any choice: the smallest, which the allocation then refuses.
  spec.device_sums = Use::kAuto;
  spec.device_memory_bytes = smallest - 1;
  CHECK(engine->plan(spec).total_bytes == smallest, "nothing fits: not the smallest");
  spec.gradient_checkpointing = Use::kNever;
  CHECK(engine->plan(spec).activations.input == 0, "recomputed although it must not");
  spec.device_memory_bytes = most;
  spec.gradient_checkpointing = Use::kAlways;
  CHECK(engine->plan(spec).activations.input == 8, "not recomputed although it must be");
  spec.gradient_checkpointing = Use::kNever;
  spec.activation_offloading = Use::kAlways;
  CHECK(engine->plan(spec).activations.offloaded == 8, "not moved although it must be");
}

// What choose_activations reckons is what counting finds.
void test_bytes() {
  const Case made = deep_case(1, 8);
  const auto device = std::make_shared<Device>(device_like_backend(), DeviceOptions{});
  const TrainSpec spec = spec_of(made, kAllModules);
  const TrainingState state(device, made.config, spec);
  const ActivationBytes bytes = activation_bytes(state, 1000);
  for (const ActivationPlan& plan : plans_for(8)) {
    const ActivationCounts counts = counts_of(plan);
    const MemoryPlan counted = state.plan(plan);
    CHECK(bytes.device_bytes(counts) == counted.total_bytes + 1000,
          "other bytes than counted: " + name_of(plan));
    size_t moved = 0;
    for (const MemoryUse& use : counted.uses) {
      if (use.purpose == "offloaded activations") moved = use.size_bytes;
    }
    CHECK(bytes.host_bytes(counts) == moved, "other bytes on the host: " + name_of(plan));
    const ActivationCounts again = counts_of(plan_of(counts));
    CHECK(again.offloaded == counts.offloaded && again.input == counts.input &&
              again.products == counts.products && again.everything == counts.everything &&
              again.attention_half == counts.attention_half,
          "plan_of() makes other counts: " + name_of(plan));
  }
}

// 10 GiB, 2 of them taken by others, and a process that has 600 MiB there beside what it asks for.
void test_room() {
  constexpr size_t kMib = size_t{1} << 20;
  static TmBackend card = *device_like_backend();
  card.memory_bytes = [](TmContext*) { return 10240 * kMib; };
  card.free_bytes = [](TmContext*) { return 7656 * kMib; };
  card.overhead_bytes = [](TmContext*, size_t* late) {
    *late = 64 * kMib;
    return 600 * kMib;
  };
  const Device device(&card, DeviceOptions{});
  TrainSpec spec;
  const auto room = [&](size_t held, bool is_now) {
    return memory_room(device, spec, held, is_now).device_bytes / kMib;
  };
  CHECK(room(0, false) == 10240 - 600 - 256, "a job to come: the card less overhead and reserve");
  CHECK(room(100 * kMib, true) == 100 + 7656 - 64 - 256, "now: what is free less what comes late");
  card.free_bytes = [](TmContext*) { return 10240 * kMib; };
  CHECK(room(0, true) == room(0, false), "now: more than the card has for it");
  card.free_bytes = [](TmContext*) { return 100 * kMib; };
  CHECK(room(0, true) == 0, "less free than the reserve: not nothing");
  spec.device_memory_bytes = 5 * kMib;
  CHECK(room(0, true) == 5, "a limit by hand is not what counts");
}

void test_backend(const Where& where) {
  // Biases, q/k norm, windows, tied and untied heads by the seed (random_case).
  for (uint64_t seed = 1; seed <= 3; ++seed) test_same_bits(where, seed, kAllModules);
  test_same_bits(where, 4, {});
  test_same_bits(where, 5, {"v_proj", "down_proj"});
}

void test_cuda(const std::string& path) {
  const TmBackend* const backend = cuda_backend_or_skip(path);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    const std::string name = precision == TM_BF16 ? "cuda bf16" : "cuda fp32";
    test_same_bits({name, {0, "auto", backend, precision}, true}, 1, kAllModules);
    test_same_bits({name, {0, "auto", backend, precision}, true}, 3, {});
    test_same_bits({name, {0, "auto", backend, precision}, true}, 5, {"v_proj", "down_proj"});
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  test_backend({"cpu", {2, "auto"}});
  test_backend({"groups", {2, "auto", host_group_backend()}});
  test_backend({"device", {2, "auto", device_like_backend()}, true});
  test_backend({"recorded", {2, "auto", recording_backend(device_like_backend())}, true});
  test_untrained_batch();
  test_choice_fits(kAllModules);
  test_choice_fits({});
  test_bytes();
  test_room();
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  test_cuda(argc > 1 ? argv[1] : here.parent_path() / "native" / "tunemesh_cuda.so");
  return finish("engine_memory_test");
}
