#include "kernels/cuda/cudnn_library.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>

#include <mutex>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/library_search.h"

#define TM_CUDNN_FUNCTIONS(X)      \
  X(cudnnCreate)                   \
  X(cudnnDestroy)                  \
  X(cudnnSetStream)                \
  X(cudnnGetStream)                \
  X(cudnnGetVersion)               \
  X(cudnnGetErrorString)           \
  X(cudnnGetLastErrorString)       \
  X(cudnnBackendCreateDescriptor)  \
  X(cudnnBackendDestroyDescriptor) \
  X(cudnnBackendSetAttribute)      \
  X(cudnnBackendGetAttribute)      \
  X(cudnnBackendFinalize)          \
  X(cudnnBackendExecute)           \
  X(cudnnCreateFilterDescriptor)   \
  X(cudnnSetFilterNdDescriptor)    \
  X(cudnnReorderFilterAndBias)     \
  X(cudnnDestroyFilterDescriptor)

namespace tunemesh::cuda {
namespace {

struct Table {
#define TM_DECLARE(function) decltype(&::function) function = nullptr;
  TM_CUDNN_FUNCTIONS(TM_DECLARE)
#undef TM_DECLARE
};

std::string folder_of(void* handle) {
  char folder[PATH_MAX] = {};
  return dlinfo(handle, RTLD_DI_ORIGIN, folder) == 0 ? std::string(folder) : std::string();
}

// libcudnn.so.9 opens these by name when it first needs them, and would take any that
// LD_LIBRARY_PATH has; versions do not mix. A missing one is cuDNN's to report.
void load_siblings(const std::string& folder) {
  for (const char* part : {"graph", "ops", "engines_precompiled", "engines_runtime_compiled",
                           "heuristic", "cnn", "adv"}) {
    const std::string path = folder + "/libcudnn_" + part + ".so.9";
    dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  }
}

Table load(const std::string& option_folder) {
  const LibrarySearchResult found = find_library(cudnn_names(), option_folder, real_surroundings());
  if (found.handle == nullptr) throw CudaFailure(TM_DEVICE_ERROR, found.error);
  Table table;
#define TM_LOAD(name)                                                                   \
  table.name = reinterpret_cast<decltype(table.name)>(dlsym(found.handle, #name));      \
  if (table.name == nullptr) {                                                          \
    throw CudaFailure(TM_DEVICE_ERROR, found.path + " lacks " #name                     \
                                                    "; install cuDNN 9.12 or newer "    \
                                                    "(pip install nvidia-cudnn-cu13)"); \
  }
  TM_CUDNN_FUNCTIONS(TM_LOAD)
#undef TM_LOAD
  if (table.cudnnGetVersion() < kOldestCudnn) {
    throw CudaFailure(TM_DEVICE_ERROR, found.path + " is version " +
                                           std::to_string(table.cudnnGetVersion()) +
                                           "; 91200 (9.12) or newer is needed "
                                           "(pip install nvidia-cudnn-cu13)");
  }
  load_siblings(folder_of(found.handle));
  return table;
}

// Filled by the first CudnnLibrary; the functions below have no other way to it.
Table& table() {
  static Table loaded;
  return loaded;
}

void check(cudnnStatus_t status, const char* call) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  throw CudaFailure(TM_DEVICE_ERROR,
                    std::string(call) + " of cuDNN: " + table().cudnnGetErrorString(status));
}

}  // namespace

CudnnLibrary::CudnnLibrary(const std::string& option_folder, cudaStream_t stream) {
  {
    static std::mutex loading;  // engines may start on threads of their own
    const std::lock_guard lock(loading);
    if (table().cudnnCreate == nullptr) table() = load(option_folder);
  }
  check(cudnnCreate(&handle_), "cudnnCreate");
  const cudnnStatus_t status = cudnnSetStream(handle_, stream);
  if (status != CUDNN_STATUS_SUCCESS) cudnnDestroy(handle_);
  check(status, "cudnnSetStream");
}

CudnnLibrary::~CudnnLibrary() { cudnnDestroy(handle_); }

std::string CudnnLibrary::version() const {
  const size_t number = cudnnGetVersion();
  return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
         std::to_string(number % 100);
}

}  // namespace tunemesh::cuda

// cuDNN's functions, under their own names for the frontend's headers; plugin.map keeps them
// inside.
using tunemesh::cuda::table;

extern "C" {

cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) { return table().cudnnCreate(handle); }
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { return table().cudnnDestroy(handle); }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  return table().cudnnSetStream(handle, stream);
}
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  return table().cudnnGetStream(handle, stream);
}
size_t cudnnGetVersion(void) { return table().cudnnGetVersion(); }
const char* cudnnGetErrorString(cudnnStatus_t status) {
  return table().cudnnGetErrorString(status);
}
void cudnnGetLastErrorString(char* message, size_t size) {
  table().cudnnGetLastErrorString(message, size);
}
cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                           cudnnBackendDescriptor_t* descriptor) {
  return table().cudnnBackendCreateDescriptor(type, descriptor);
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  return table().cudnnBackendDestroyDescriptor(descriptor);
}
cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t count,
                                       const void* elements) {
  return table().cudnnBackendSetAttribute(descriptor, name, type, count, elements);
}
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t room,
                                       int64_t* count, void* elements) {
  return table().cudnnBackendGetAttribute(descriptor, name, type, room, count, elements);
}
cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t descriptor) {
  return table().cudnnBackendFinalize(descriptor);
}
cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                  cudnnBackendDescriptor_t variant) {
  return table().cudnnBackendExecute(handle, plan, variant);
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* filter) {
  return table().cudnnCreateFilterDescriptor(filter);
}
cudnnStatus_t cudnnSetFilterNdDescriptor(cudnnFilterDescriptor_t filter, cudnnDataType_t type,
                                         cudnnTensorFormat_t format, int count, const int sizes[]) {
  return table().cudnnSetFilterNdDescriptor(filter, type, format, count, sizes);
}
cudnnStatus_t cudnnReorderFilterAndBias(cudnnHandle_t handle, cudnnFilterDescriptor_t filter,
                                        cudnnReorderType_t type, const void* from, void* to,
                                        int has_bias, const void* bias_from, void* bias_to) {
  return table().cudnnReorderFilterAndBias(handle, filter, type, from, to, has_bias, bias_from,
                                           bias_to);
}
cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t filter) {
  return table().cudnnDestroyFilterDescriptor(filter);
}

}  // extern "C"
