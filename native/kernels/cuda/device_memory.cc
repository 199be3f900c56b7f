#include "kernels/cuda/device_memory.h"

#include "kernels/cuda/card_refusals.h"

namespace tunemesh::cuda {
namespace {

std::string device_name() {
  int device = 0;
  cudaDeviceProp properties{};
  if (cudaGetDevice(&device) != cudaSuccess) return "no device";
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return "device";
  return "device " + std::to_string(device) + ", " + properties.name;
}

#ifdef TUNEMESH_SYNC_LAUNCHES
constexpr bool kChecksAllLaunches = true;
#else
constexpr bool kChecksAllLaunches = false;
#endif

thread_local bool launches_are_checked = false;

}  // namespace

void throw_cuda_failure(cudaError_t error, const char* expression, const char* place) {
  const TmStatus status = error == cudaErrorMemoryAllocation ? TM_OUT_OF_MEMORY : TM_DEVICE_ERROR;
  const std::string name = device_name();
  cudaGetLastError();  // an error that is not sticky must not be found by the next call
  throw CudaFailure(status, std::string(expression) + " at " + place + ": " +
                                cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ", " +
                                name + ")");
}

void check_launch(const char* kernel, cudaStream_t stream) {
  cudaError_t error = cudaGetLastError();
  const bool waits = kChecksAllLaunches || launches_are_checked;
  if (error == cudaSuccess && waits) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) throw_cuda_failure(error, kernel, "launch");
}

void check_launches_of_thread(bool are_checked) { launches_are_checked = are_checked; }

void* allocate_device(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes == 0 ? 1 : bytes);
  if (error == cudaSuccess) return data;
  if (error != cudaErrorMemoryAllocation) throw_cuda_failure(error, "cudaMalloc", "allocate");
  cudaGetLastError();
  size_t free_bytes = 0, total_bytes = 0;
  cudaMemGetInfo(&free_bytes, &total_bytes);
  throw CudaFailure(TM_OUT_OF_MEMORY,
                    "no device memory for " + memory_text(bytes) + ": " + memory_text(free_bytes) +
                        " of " + memory_text(total_bytes) + " are free (" + device_name() + ")");
}

void* allocate_pinned(size_t bytes) {
  void* data = nullptr;
  const cudaError_t error = cudaMallocHost(&data, bytes == 0 ? 1 : bytes);
  if (error == cudaSuccess) return data;
  if (error != cudaErrorMemoryAllocation) throw_cuda_failure(error, "cudaMallocHost", "allocate");
  cudaGetLastError();
  throw CudaFailure(TM_OUT_OF_MEMORY, "no page-locked host memory for " + memory_text(bytes) +
                                          "; raise the limit of locked memory (ulimit -l)");
}

}  // namespace tunemesh::cuda
