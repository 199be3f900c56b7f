// What the engine makes of a device that fails, as a GPU does: an operation goes wrong unnoticed,
// and whichever call waits first tells it, unless the context is checked. Memory that is short and
// a gradient that is not finite are named, from a device with memory of its own too.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "engine_case.h"
#include "host_exchange.h"
#include "host_groups.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

// The device's side of what these tests provoke. One context at a time.
struct Faults {
  int calls_to_failure = 0;  // of group_forward; 0: never
  bool is_checked = false;
  bool is_broken = false;   // sticky
  int calls_to_poison = 0;  // gradients of matrices
  size_t largest_allocation = std::numeric_limits<size_t>::max();
  const char* line = "";
  bool refuses_contexts = false;
  bool refuses_heads = false;
};
Faults faults;

TmStatus fail(TmStatus status, const char* line) {
  faults.line = line;
  return status;
}

void poison(float* gradient) {
  if (gradient != nullptr && faults.calls_to_poison > 0 && --faults.calls_to_poison == 0) {
    gradient[0] = NAN;
  }
}

// The host's groups behind memory that the engine may not touch.
const TmBackend* failing_backend() {
  static const TmBackend backend = [] {
    TmBackend device = *host_group_backend();
    device.name = "test device";
    device.last_error = [] { return faults.line; };
    device.create = [](const TmContextOptions* options, TmContext** out) {
      if (faults.refuses_contexts) return fail(TM_DEVICE_ERROR, "no device");
      return tm_cpu_backend()->create(options, out);
    };
    device.allocate = [](TmContext* context, size_t bytes, void** out) {
      if (bytes > faults.largest_allocation) {
        return fail(TM_OUT_OF_MEMORY, "no device memory: 1 of 2 bytes are free");
      }
      return tm_cpu_backend()->allocate(context, bytes, out);
    };
    device.allocate_host = tm_cpu_backend()->allocate;
    device.release_host = tm_cpu_backend()->release;
    device.set_checked = [](TmContext*, int is_checked) {
      faults.is_checked = is_checked != 0;
      return TM_OK;
    };
    device.group_forward = [](TmContext*, const TmGroupForward* args) {
      HostGroup(*args->shape).forward(*args);
      if (faults.calls_to_failure == 0 || --faults.calls_to_failure > 0) return TM_OK;
      faults.is_broken = true;
      return faults.is_checked ? fail(TM_DEVICE_ERROR, "product_kernel: illegal access") : TM_OK;
    };
    device.copy_out = [](TmContext* context, void* to, const void* from, size_t bytes) {
      if (faults.is_broken) return fail(TM_DEVICE_ERROR, "illegal access");
      return tm_cpu_backend()->copy_out(context, to, from, bytes);
    };
    device.attention_scratch_bytes = [](TmContext* context, const TmAttentionJob* job) {
      if (!faults.refuses_heads) return tm_cpu_backend()->attention_scratch_bytes(context, job);
      faults.line = "attention: head size 320 is above 256";
      return SIZE_MAX;
    };
    device.start_copy = [](TmContext* context, const TmSideCopy* copy) {
      return tm_cpu_backend()->copy_out(context, copy->to, copy->from, copy->num_bytes);
    };
    device.finish_copy = [](TmContext*, size_t) {
      return faults.is_broken ? fail(TM_DEVICE_ERROR, "illegal access") : TM_OK;
    };
    device.linear_weight_grad = [](TmContext* context, const TmLinearWeightGrad* args) {
      const TmStatus status = tm_cpu_backend()->linear_weight_grad(context, args);
      poison(static_cast<float*>(args->dw));
      return status;
    };
    device.group_adapter_grads = [](TmContext* context, const TmGroupAdapterGrads* args) {
      const TmStatus status = host_group_backend()->group_adapter_grads(context, args);
      for (size_t part = 0; part < args->shape->num_parts; ++part) {
        poison(args->lora_b[part]);
        poison(args->lora_a[part]);
      }
      return status;
    };
    return device;
  }();
  return &backend;
}

const std::vector<std::string> kModules = {"q_proj", "v_proj", "up_proj", "down_proj"};

// The same, which rounds and packs too.
const TmBackend* packing_backend() {
  static const TmBackend backend = [] {
    TmBackend device = *failing_backend();
    add_host_exchange(device);
    return device;
  }();
  return &backend;
}

std::unique_ptr<Engine> prepared_engine(const Case& made, const TmBackend* backend) {
  faults = {};
  auto engine = engine_of(made, {2, "auto", backend});
  engine->prepare(spec_of(made, kModules));
  engine->exchange()->clear_slot(0);
  return engine;
}

ContributionTarget checked_target() {
  ContributionTarget target(0);
  target.is_checked = true;
  return target;
}

struct Failure {
  std::string code = "nothing", message, subject;
};

template <class Act>
Failure failure_of(Act act) {
  try {
    act();
  } catch (const EngineError& error) {
    return {error.code(), error.what(), error.subject()};
  }
  return {};
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void test_late_failure(const TmBackend* backend) {
  const Case made = random_case(3);
  const auto engine = prepared_engine(made, backend);
  faults.calls_to_failure = 2;
  const Failure found = failure_of([&] { engine->micro_batch(made.batch(), 7, 0); });
  CHECK(found.code == "DEVICE_FAILED" && found.subject == "finish_copy",
        "an unchecked failure is told by the call that waits: " + found.code + found.message);
  CHECK(has(found.message, "earlier operation"), "nobody says that the call may be innocent");
  CHECK(engine->exchange()->is_poisoned(0), "the slot stays usable");
}

void test_checked_failure(const TmBackend* backend) {
  const Case made = random_case(3);
  const auto engine = prepared_engine(made, backend);
  faults.calls_to_failure = 2;
  const Failure found = failure_of([&] { engine->micro_batch(made.batch(), 7, checked_target()); });
  CHECK(found.code == "DEVICE_FAILED" && found.subject == "group_forward",
        "a checked failure is told by the operation itself: " + found.code + found.message);
  CHECK(has(found.message, "product_kernel") && !has(found.message, "earlier"),
        "the kernel is not named: " + found.message);
  CHECK(!faults.is_checked, "the device stays checked after a failure");
}

void test_checked_bits(const TmBackend* backend) {
  const Case made = random_case(4);
  const auto engine = prepared_engine(made, backend);
  engine->micro_batch(made.batch(), 7, 0);
  std::vector<uint64_t> free, checked;
  for (std::vector<uint64_t>* digests : {&free, &checked}) {
    engine->exchange()->clear_slot(0);
    const bool is_checked = digests == &checked;
    engine->micro_batch(made.batch(), 7, is_checked ? checked_target() : ContributionTarget(0));
    for (size_t slice = 0; slice < engine->exchange()->num_slices(); ++slice) {
      digests->push_back(engine->exchange()->measure_contribution(0, slice).digest);
    }
  }
  CHECK(!free.empty() && free == checked, "checking changes bits");
  CHECK(!faults.is_checked, "the device stays checked");
}

void test_refused_context() {
  const Case made = random_case(3);
  faults = {};
  faults.refuses_contexts = true;
  CHECK_THROWS(engine_of(made, {2, "auto", failing_backend()}), "ENGINE_FAILED", "no device");
}

// Before anything is taken.
void test_refused_heads() {
  const Case made = random_case(3);
  faults = {};
  const auto engine = engine_of(made, {2, "auto", failing_backend()});
  faults.refuses_heads = true;
  CHECK_THROWS(engine->plan(spec_of(made, {})), "MODEL_UNSUPPORTED", "head size 320 is above 256");
}

void test_short_memory() {
  const Case made = random_case(3);
  faults = {};
  const auto engine = engine_of(made, {2, "auto", failing_backend()});
  faults.largest_allocation = 1000;
  const Failure found = failure_of([&] { engine->prepare(spec_of(made, {})); });
  CHECK(found.code == "DEVICE_MEMORY_SHORT", "short memory is " + found.code);
  for (const char* part :
       {"1 of 2 bytes are free", "Planned: ", " MiB optimizer moments", "trained weights",
        "per_device_train_batch_size", "max_length", "bf16"}) {
    CHECK(has(found.message, part), std::string("no word of ") + part + ": " + found.message);
  }
}

// Of each adapter's matrix in turn: the tensor whose gradient has the NaN is the one that is named.
void test_poisoned_gradient(const TmBackend* backend) {
  const Case made = random_case(5);
  const auto engine = prepared_engine(made, backend);
  std::vector<std::string> named;
  for (int call = 1;; ++call) {
    faults.calls_to_poison = call;
    const auto gradients = engine->gradients(made.batch(), 7);
    if (faults.calls_to_poison != 0) break;
    const auto poisoned = std::find_if(gradients.begin(), gradients.end(), [](const auto& tensor) {
      return std::any_of(tensor.values.begin(), tensor.values.end(),
                         [](float value) { return std::isnan(value); });
    });
    if (poisoned == gradients.end()) continue;
    faults.calls_to_poison = call;
    engine->exchange()->clear_slot(0);
    const Failure found = failure_of([&] { engine->micro_batch(made.batch(), 7, 0); });
    CHECK(found.code == "NON_FINITE_GRADIENT" && found.subject == poisoned->name,
          poisoned->name + " is not named: " + found.code + " " + found.message);
    CHECK(has(found.message, "nan"), "the value is not named: " + found.message);
    named.push_back(found.subject);
  }
  std::sort(named.begin(), named.end());
  named.erase(std::unique(named.begin(), named.end()), named.end());
  CHECK(named.size() >= 2 * made.config.num_layers,
        "only " + std::to_string(named.size()) + " tensors were poisoned");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (const TmBackend* backend : {failing_backend(), packing_backend()}) {
    test_late_failure(backend);
    test_checked_failure(backend);
    test_checked_bits(backend);
    test_poisoned_gradient(backend);
  }
  test_refused_context();
  test_refused_heads();
  test_short_memory();
  return finish("device_failure_test");
}
