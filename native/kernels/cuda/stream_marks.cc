// For benchmarks: what the device's own clock says between two places of a stream, and what a
// context holds beside the engine's plan (plugin.h).
#include <deque>

#include "kernels/cuda/context.h"
#include "kernels/cuda/guard.h"
#include "kernels/cuda/plugin.h"

namespace tunemesh::cuda {
namespace {

class TimedEvent {
 public:
  TimedEvent() { CUDA_CHECK(cudaEventCreate(&event_)); }
  ~TimedEvent() { cudaEventDestroy(event_); }
  TimedEvent(const TimedEvent&) = delete;
  TimedEvent& operator=(const TimedEvent&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Kept until the process ends: destroying them after the driver has gone would fail.
std::deque<TimedEvent>& marks() {
  static auto& all = *new std::deque<TimedEvent>;
  return all;
}

}  // namespace
}  // namespace tunemesh::cuda

#define TM_EXPORT extern "C" __attribute__((visibility("default")))

TM_EXPORT TmCudaOverhead tm_cuda_overhead(TmContext* context) {
  return {context->overhead_bytes(), context->workspace_bytes()};
}

TM_EXPORT int tm_cuda_mark(TmContext* context, size_t number) {
  using namespace tunemesh::cuda;
  return guarded(context,
                 [&] {
                   while (marks().size() <= number) marks().emplace_back();
                   CUDA_CHECK(cudaEventRecord(marks()[number].get(), context->stream()));
                 }) == TM_OK
             ? 0
             : 1;
}

TM_EXPORT double tm_cuda_marked_ms(TmContext* context, size_t from, size_t to) {
  using namespace tunemesh::cuda;
  float ms = -1;
  guarded(context, [&] {
    if (from >= marks().size() || to >= marks().size()) return;
    CUDA_CHECK(cudaEventElapsedTime(&ms, marks()[from].get(), marks()[to].get()));
  });
  return ms;
}
