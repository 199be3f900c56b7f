// One device of a backend: owns its context and turns status codes into
// EngineError.
#pragma once
#include <string>
#include <vector>

#include "engine/error.h"
#include "kernels/backend.h"

namespace tunemesh {

struct DeviceOptions {
  int num_threads = 0;  // CPU: 0 = all the process may use
  std::string instruction_path = "auto";
  int device_index = 0;             // GPU
  TmPrecision precision = TM_FP32;  // TM_FP8: bf16, with frozen linears in fp8
  std::string library_folder;       // GPU: where its libraries are looked for first
  bool records_calls = true;        // GPU: parts of a step as one launch (recorded_calls.h)
  bool is_deterministic = true;     // else sums in whatever order is fastest (backend.h, is_free)
};

class Device {
 public:
  Device(const TmBackend* ops, const DeviceOptions& from)
      : ops_(ops),
        records_calls_(from.records_calls && ops->calls_begin != nullptr),
        is_deterministic_(from.is_deterministic),
        has_fp8_base_(from.precision == TM_FP8) {
    TmContextOptions options = {};
    options.size = sizeof options;
    options.num_threads = from.num_threads;
    options.instruction_path = from.instruction_path.c_str();
    options.device_index = from.device_index;
    options.precision = from.precision;
    options.library_folder = from.library_folder.empty() ? nullptr : from.library_folder.c_str();
    options.is_free = from.is_deterministic ? 0 : 1;
    check(ops_->create(&options, &context_), "create");
    element_bytes_ = ops_->element_bytes(context_);
  }
  ~Device() {
    if (context_ != nullptr) ops_->destroy(context_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const TmBackend& ops() const { return *ops_; }
  TmContext* context() const { return context_; }
  size_t element_bytes() const { return element_bytes_; }
  // Does the device's memory lie in the host's, so that the engine may read and write it?
  bool is_host() const { return ops_->allocate_host == nullptr; }
  // Do linears that read the same input run as one product?
  bool has_groups() const { return ops_->group_forward != nullptr; }
  // Are parts of a step that repeat launched as one? It changes no bit.
  bool records_calls() const { return records_calls_; }
  // Do the same calls give the same bits? If not, nothing may compare what was computed twice.
  bool is_deterministic() const { return is_deterministic_; }
  // Are the groups of a frozen model's linears fp8?
  bool has_fp8_base() const { return has_fp8_base_; }
  // The element `count` after `first`.
  TmElement* at(TmElement* first, size_t count) const {
    return reinterpret_cast<TmElement*>(reinterpret_cast<char*>(first) + count * element_bytes_);
  }

  // Does it wait for each operation, so that a failure is told by the one that caused it? Nothing
  // is recorded then, and no bit changes.
  bool is_checked() const { return is_checked_; }

  // What a person should hear of once (backend.h), since the last call.
  std::vector<std::string> take_notes() const {
    std::vector<std::string> notes;
    if (ops_->take_note == nullptr) return notes;
    while (const char* note = ops_->take_note(context_)) notes.emplace_back(note);
    return notes;
  }

  void check(TmStatus status, const char* operation) const {
    if (status == TM_OK) return;
    const char* detail = ops_->last_error != nullptr ? ops_->last_error() : nullptr;
    std::string message = std::string(ops_->name) + " " + operation +
                          " failed: " + (detail != nullptr ? detail : "no detail") + ".";
    if (status == TM_OUT_OF_MEMORY) throw EngineError("DEVICE_MEMORY_SHORT", message);
    // A context that could not even be made leaves the device as it was.
    if (status != TM_DEVICE_ERROR || context_ == nullptr) {
      throw EngineError("ENGINE_FAILED", message);
    }
    if (!is_checked_) message += " A device tells errors late: an earlier operation may have it.";
    throw EngineError("DEVICE_FAILED", message, operation);
  }

 private:
  friend class CheckedOperations;

  void set_checked(bool is_checked) {
    if (ops_->set_checked == nullptr) return;
    ops_->set_checked(context_, is_checked ? 1 : 0);
    is_checked_ = is_checked;
  }

  const TmBackend* ops_;
  const bool records_calls_;
  const bool is_deterministic_;
  const bool has_fp8_base_;
  TmContext* context_ = nullptr;
  size_t element_bytes_ = 0;
  bool is_checked_ = false;
};

// While it lives the device waits for each operation, where that was asked for.
class CheckedOperations {
 public:
  CheckedOperations(Device& device, bool is_wanted) : device_(device) {
    device_.set_checked(is_wanted);
  }
  ~CheckedOperations() { device_.set_checked(false); }
  CheckedOperations(const CheckedOperations&) = delete;
  CheckedOperations& operator=(const CheckedOperations&) = delete;

 private:
  Device& device_;
};

// TM_RUN(device, linear_forward, &args): one backend operation, checked.
#define TM_RUN(device, operation, ...) \
  (device).check((device).ops().operation((device).context(), __VA_ARGS__), #operation)

}  // namespace tunemesh
