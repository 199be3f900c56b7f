// One device of a backend: owns its context and turns status codes into
// EngineError.
#pragma once
#include <string>

#include "engine/error.h"
#include "kernels/backend.h"

namespace tunemesh {

class Device {
 public:
  Device(const TmBackend* ops, int num_threads, const std::string& instruction_path) : ops_(ops) {
    TmContextOptions options = {};
    options.size = sizeof options;
    options.num_threads = num_threads;
    options.instruction_path = instruction_path.c_str();
    check(ops_->create(&options, &context_), "create");
  }
  ~Device() {
    if (context_ != nullptr) ops_->destroy(context_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const TmBackend& ops() const { return *ops_; }
  TmContext* context() const { return context_; }

  void check(TmStatus status, const char* operation) const {
    if (status == TM_OK) return;
    const char* detail = ops_->last_error != nullptr ? ops_->last_error() : nullptr;
    const std::string message = std::string(ops_->name) + " " + operation +
                                " failed: " + (detail != nullptr ? detail : "no detail") + ".";
    throw EngineError(status == TM_OUT_OF_MEMORY ? "DEVICE_MEMORY_SHORT" : "ENGINE_FAILED",
                      message);
  }

 private:
  const TmBackend* ops_;
  TmContext* context_ = nullptr;
};

// TM_RUN(device, linear_forward, &args): one backend operation, checked.
#define TM_RUN(device, operation, ...) \
  (device).check((device).ops().operation((device).context(), __VA_ARGS__), #operation)

}  // namespace tunemesh
