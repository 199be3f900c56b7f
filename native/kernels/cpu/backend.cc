// The CPU backend's table, contexts and memory.
#include "kernels/backend.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <new>
#include <system_error>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/gemm.h"

namespace tunemesh {
namespace {

constexpr size_t kAlignment = 64;
constexpr int kMaxThreads = 256;

void* aligned(size_t bytes) {
  if (bytes > SIZE_MAX - kAlignment) return nullptr;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return aligned_alloc(kAlignment, rounded == 0 ? kAlignment : rounded);
}

void destroy(TmContext* context) {
  if (!context) return;
  free(context->gemm_scratch);
  delete context;
}

TmStatus create(const TmContextOptions* options, TmContext** out) {
  *out = nullptr;
  if (options->size < sizeof(TmContextOptions)) {
    return fail(TM_BAD_ARGUMENT, "context options of %zu bytes; this backend expects %zu",
                options->size, sizeof(TmContextOptions));
  }
  if (options->precision != TM_FP32) {
    return fail(TM_BAD_ARGUMENT, "the CPU computes in fp32 only; bf16 and fp8 need a GPU");
  }
  if (options->num_threads < 0 || options->num_threads > kMaxThreads) {
    return fail(TM_BAD_ARGUMENT, "num_threads is %d; use 0 for all, or 1 to %d",
                options->num_threads, kMaxThreads);
  }
  InstructionPath path;
  if (TmStatus status = choose_path(options->instruction_path, &path)) return status;
  TmContext* context = nullptr;
  try {
    context = new TmContext(path, options->num_threads);
    const int threads = context->pool.num_threads();
    context->description = "cpu: " + std::to_string(threads) + " thread" +
                           (threads == 1 ? "" : "s") + ", " + name_of(path);
  } catch (const std::bad_alloc&) {
    destroy(context);
    return fail(TM_OUT_OF_MEMORY, "no memory for a context");
  } catch (const std::system_error& error) {
    destroy(context);
    return fail(TM_DEVICE_ERROR, "cannot start the threads of a context: %s", error.what());
  }
  const size_t threads = static_cast<size_t>(context->pool.num_threads());
  const size_t scratch_bytes = threads * kGemmScratchFloats * sizeof(float);
  context->gemm_scratch = static_cast<float*>(aligned(scratch_bytes));
  if (!context->gemm_scratch) {
    destroy(context);
    return fail(TM_OUT_OF_MEMORY, "no memory for %zu bytes of scratch", scratch_bytes);
  }
  *out = context;
  return TM_OK;
}

const char* describe(TmContext* context) { return context->description.c_str(); }
const char* instruction_path(TmContext* context) { return name_of(context->path); }
int num_threads(TmContext* context) { return context->pool.num_threads(); }

int num_devices() { return 1; }
size_t element_bytes(TmContext*) { return sizeof(float); }
int reads_rows(TmContext*) { return 1; }
int packs_row_major(TmContext*) { return 0; }

TmStatus allocate(TmContext*, size_t bytes, void** out) {
  *out = aligned(bytes);
  return *out ? TM_OK : fail(TM_OUT_OF_MEMORY, "no memory for %zu bytes", bytes);
}

void release(TmContext*, void* pointer) { free(pointer); }

TmStatus copy(TmContext*, void* to, const void* from, size_t bytes) {
  if (bytes > 0) memcpy(to, from, bytes);
  return TM_OK;
}

TmStatus read_elements(TmContext*, float* host, const float* device, size_t count) {
  if (count > 0) memcpy(host, device, count * sizeof(float));
  return TM_OK;
}

TmStatus fill_zero(TmContext*, void* pointer, size_t bytes) {
  if (bytes > 0) memset(pointer, 0, bytes);
  return TM_OK;
}

TmStatus start_copy(TmContext*, const TmSideCopy* args) {
  memcpy(args->to, args->from, args->num_bytes);
  return TM_OK;
}
TmStatus await_copy(TmContext*, size_t) { return TM_OK; }

// Every call has done its work when it returns.
TmStatus synchronize(TmContext*) { return TM_OK; }

TmBackend assemble() {
  TmBackend backend{};
  backend.size = sizeof(TmBackend);
  backend.abi = TM_BACKEND_ABI;
  backend.name = "cpu";
  backend.last_error = last_error;
  backend.create = create;
  backend.destroy = destroy;
  backend.describe = describe;
  backend.instruction_path = instruction_path;
  backend.num_threads = num_threads;
  backend.num_devices = num_devices;
  backend.element_bytes = element_bytes;
  backend.reads_rows = reads_rows;
  backend.packs_row_major = packs_row_major;
  backend.allocate = allocate;
  backend.release = release;
  backend.copy_in = copy;
  backend.copy_out = copy;
  backend.read_elements = read_elements;
  backend.fill_zero = fill_zero;
  backend.synchronize = synchronize;
  backend.start_copy = start_copy;
  backend.await_copy = await_copy;
  backend.packed_weight_elements = packed_weight_floats;
  backend.pack_weight = pack_weight;
  backend.linear_forward = linear_forward;
  backend.linear_backward_input = linear_backward_input;
  backend.linear_weight_grad = linear_weight_grad;
#ifdef TM_HAS_OPS_TABLE
  fill_ops(backend);
#endif
  return backend;
}

}  // namespace
}  // namespace tunemesh

const TmBackend* tm_cpu_backend(void) {
  static const TmBackend backend = tunemesh::assemble();
  return &backend;
}
