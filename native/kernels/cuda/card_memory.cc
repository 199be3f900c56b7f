#include "kernels/cuda/card_memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/plugin.h"

namespace tunemesh::cuda {
namespace {

// NVML, as far as it is used; nvml.h is not in every toolkit.
struct NvmlMemory {
  unsigned long long total, free, used;
};
using NvmlDevice = void*;
using NvmlInit = int (*)();
using NvmlFind = int (*)(const char* bus, NvmlDevice* device);
using NvmlAsk = int (*)(NvmlDevice device, NvmlMemory* memory);

// What contexts were seen to have: on an H100 about half a gigabyte. Another process that takes
// memory in the same moment must not count.
constexpr size_t kUsualContextBytes = size_t{512} << 20;
constexpr size_t kLeastContextBytes = size_t{64} << 20;
constexpr size_t kMostContextBytes = size_t{1536} << 20;
constexpr int kBusLength = 32;

// Bytes in use on the card, 0 where it can't be told. Needs no context.
size_t used_bytes(int device) {
  static void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 0;
  const auto init = reinterpret_cast<NvmlInit>(dlsym(library, "nvmlInit_v2"));
  const auto find = reinterpret_cast<NvmlFind>(dlsym(library, "nvmlDeviceGetHandleByPciBusId_v2"));
  const auto ask = reinterpret_cast<NvmlAsk>(dlsym(library, "nvmlDeviceGetMemoryInfo"));
  char bus[kBusLength] = {};
  NvmlDevice handle = nullptr;
  NvmlMemory memory = {};
  if (init == nullptr || find == nullptr || ask == nullptr) return 0;
  if (cudaDeviceGetPCIBusId(bus, kBusLength, device) != cudaSuccess) return 0;
  if (init() != 0 || find(bus, &handle) != 0 || ask(handle, &memory) != 0) return 0;
  return memory.used;
}

std::mutex measuring;
std::map<int, size_t>& contexts() {
  static std::map<int, size_t> by_device;
  return by_device;
}

}  // namespace

void select_and_measure(int device) {
  const std::lock_guard lock(measuring);
  if (contexts().count(device) != 0) {
    CUDA_CHECK(cudaSetDevice(device));
    return;
  }
  const size_t before = used_bytes(device);
  CUDA_CHECK(cudaSetDevice(device));
  CUDA_CHECK(cudaFree(nullptr));  // older runtimes create the context here
  const size_t after = used_bytes(device);
  const bool is_known = after > before;
  contexts()[device] = is_known ? std::clamp(after - before, kLeastContextBytes, kMostContextBytes)
                                : kUsualContextBytes;
}

size_t context_bytes(int device) {
  const std::lock_guard lock(measuring);
  const auto found = contexts().find(device);
  return found == contexts().end() ? kUsualContextBytes : found->second;
}

size_t free_device_bytes() {
  size_t free = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

}  // namespace tunemesh::cuda

#define TM_EXPORT extern "C" __attribute__((visibility("default")))

TM_EXPORT size_t tm_cuda_free_bytes(int device) {
  size_t free = 0, total = 0;
  const bool is_told =
      cudaSetDevice(device) == cudaSuccess && cudaMemGetInfo(&free, &total) == cudaSuccess;
  cudaGetLastError();
  return is_told ? free : 0;
}
