#include "kernels/cuda/cublaslt.h"

#include <dlfcn.h>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/library_versions.h"

namespace tunemesh::cuda {

CublasLt::CublasLt(const std::string& option_folder) {
  const LibrarySearchResult found =
      find_library(cublaslt_names(), option_folder, real_surroundings());
  if (found.handle == nullptr) throw CudaFailure(TM_DEVICE_ERROR, found.error);
  path_ = found.path;
#define TM_LOAD(name)                                                                \
  name = reinterpret_cast<decltype(name)>(dlsym(found.handle, #name));               \
  if (name == nullptr) {                                                             \
    throw CudaFailure(TM_DEVICE_ERROR, path_ + " lacks " #name                       \
                                               "; install cuBLASLt 12.8 or "         \
                                               "newer (pip install nvidia-cublas)"); \
  }
  TM_CUBLASLT_FUNCTIONS(TM_LOAD)
#undef TM_LOAD
  if (cublasLtGetVersion() < kOldestCublasLt) {
    throw CudaFailure(TM_DEVICE_ERROR, path_ + " is version " + version() +
                                           "; 12.8 or newer is needed: tunemesh doctor "
                                           "--install-libs DIR gets it");
  }
  check(cublasLtCreate(&handle_), "cublasLtCreate");
}

CublasLt::~CublasLt() {
  if (handle_ != nullptr) cublasLtDestroy(handle_);
}

// The number is major * 10000 + minor * 100 + patch.
std::string CublasLt::version() const {
  const size_t number = cublasLtGetVersion();
  return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
         std::to_string(number % 100);
}

void CublasLt::check(cublasStatus_t status, const char* call) const {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const TmStatus kind = status == CUBLAS_STATUS_ALLOC_FAILED ? TM_OUT_OF_MEMORY : TM_DEVICE_ERROR;
  throw CudaFailure(kind,
                    std::string(call) + " of " + path_ + ": " + cublasLtGetStatusString(status));
}

}  // namespace tunemesh::cuda
