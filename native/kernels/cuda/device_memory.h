// CUDA calls that throw, and owners of what they give: each handle is freed by its destructor.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/backend.h"

namespace tunemesh::cuda {

// A failed call. backend.cc turns it into a status and last_error()'s line.
class CudaFailure : public std::runtime_error {
 public:
  CudaFailure(TmStatus status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  TmStatus status() const { return status_; }

 private:
  TmStatus status_;
};

// Throws with the expression, its place and the device.
[[noreturn]] void throw_cuda_failure(cudaError_t error, const char* expression, const char* place);

#define TM_CUDA_TEXT(x) #x
#define TM_CUDA_LINE(x) TM_CUDA_TEXT(x)
#define CUDA_CHECK(expression)                                                   \
  do {                                                                           \
    const cudaError_t cuda_check_error = (expression);                           \
    if (cuda_check_error != cudaSuccess) {                                       \
      ::tunemesh::cuda::throw_cuda_failure(cuda_check_error, #expression,        \
                                           __FILE__ ":" TM_CUDA_LINE(__LINE__)); \
    }                                                                            \
  } while (false)

// After each launch. Where this thread's launches are checked it also waits, so that an error names
// its kernel.
void check_launch(const char* kernel, cudaStream_t stream);
void check_launches_of_thread(bool are_checked);
#define CUDA_CHECK_LAUNCH(kernel, stream) ::tunemesh::cuda::check_launch(kernel, stream)

// Device memory; TM_OUT_OF_MEMORY says how much was wanted and free.
void* allocate_device(size_t bytes);
// Page-locked host memory.
void* allocate_pinned(size_t bytes);

class Stream {
 public:
  Stream() { CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming)); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) : data_(allocate_device(bytes)), bytes_(bytes) {}
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_;
};

class PinnedBuffer {
 public:
  explicit PinnedBuffer(size_t bytes) { CUDA_CHECK(cudaMallocHost(&data_, bytes)); }
  ~PinnedBuffer() { cudaFreeHost(data_); }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

}  // namespace tunemesh::cuda
