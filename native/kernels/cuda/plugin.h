// What the CUDA plugin (tunemesh_cuda.so) exports. A flat C ABI: loaded by dlopen, found by name.
#pragma once
#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

// The table of operations. All data pointers in their arguments are device memory, but two of
// round_and_add: bad_block is the host's, and accumulator may be. Indices are checked on the
// device: a bad one is told by the next synchronize or copy_out as TM_BAD_ARGUMENT, and its row is
// left out.
const TmBackend* tm_cuda_backend(void);

// Cards that the driver shows; 0 where there is no driver or none that is new enough. `reason`
// (may be null) then has one line that lives until the thread's next call.
int tm_cuda_num_devices(const char** reason);

typedef struct TmCudaFinding {
  const char* name;  // "driver", "cuBLASLt", "cuDNN"
  int is_good;
  const char* text;  // what was seen and, where that is not good, what to do
} TmCudaFinding;

// What there is of driver and libraries, searched in `folder` (may be null) first, and whether they
// go together; no device is needed. Answers how many findings there are; they live until the
// thread's next call.
size_t tm_cuda_libraries(const char* folder, const TmCudaFinding** findings);

// Free memory of a card as the driver tells it, 0 where it does not; gives the process a context.
size_t tm_cuda_free_bytes(int device);

typedef struct TmCudaOverhead {
  size_t total_bytes;      // context, modules and what opening took: nothing that an engine plans
  size_t workspace_bytes;  // of it, the buffers that products and the exchange work in
} TmCudaOverhead;
TmCudaOverhead tm_cuda_overhead(TmContext* context);

// Marks the place that the context's stream has reached, under a number; an earlier mark of that
// number is forgotten. Answers 0, or 1 where it failed. One context of a process at a time.
int tm_cuda_mark(TmContext* context, size_t number);
// Milliseconds of the device between two marks that it has passed; negative where that is unknown.
double tm_cuda_marked_ms(TmContext* context, size_t from, size_t to);

#ifdef __cplusplus
}
#endif
