// cuBLASLt, loaded at run time (library_search.h): only the functions used here, under their own
// names, and owners of its handles. The header declares them; nothing links the library.
#pragma once
#include <cublasLt.h>

#include <string>

#include "kernels/cuda/library_search.h"

namespace tunemesh::cuda {

#define TM_CUBLASLT_FUNCTIONS(X)          \
  X(cublasLtCreate)                       \
  X(cublasLtDestroy)                      \
  X(cublasLtGetVersion)                   \
  X(cublasLtGetStatusString)              \
  X(cublasLtMatmul)                       \
  X(cublasLtMatmulAlgoGetHeuristic)       \
  X(cublasLtMatmulDescCreate)             \
  X(cublasLtMatmulDescDestroy)            \
  X(cublasLtMatmulDescSetAttribute)       \
  X(cublasLtMatmulPreferenceCreate)       \
  X(cublasLtMatmulPreferenceDestroy)      \
  X(cublasLtMatmulPreferenceSetAttribute) \
  X(cublasLtMatrixLayoutCreate)           \
  X(cublasLtMatrixLayoutDestroy)

// One library, loaded and never unloaded: its kernels may be in captured graphs.
class CublasLt {
 public:
  // Throws CudaFailure: not found (every place tried), a function missing, or no handle.
  explicit CublasLt(const std::string& option_folder);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

#define TM_DECLARE(function) decltype(&::function) function = nullptr;
  TM_CUBLASLT_FUNCTIONS(TM_DECLARE)
#undef TM_DECLARE

  cublasLtHandle_t handle() const { return handle_; }
  const std::string& path() const { return path_; }
  std::string version() const;  // "13.0.2"
  // Throws CudaFailure with the library's own words.
  void check(cublasStatus_t status, const char* call) const;

 private:
  std::string path_;
  cublasLtHandle_t handle_ = nullptr;
};

}  // namespace tunemesh::cuda
