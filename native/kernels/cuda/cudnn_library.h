// cuDNN, loaded at run time (library_search.h). cuDNN's frontend calls its functions by name, so
// cudnn_library.cc defines them all and hands each call on: nothing links the library.
#pragma once
#include <cudnn.h>

#include <string>

#include "kernels/cuda/library_versions.h"

namespace tunemesh::cuda {

class CudnnLibrary {
 public:
  // Throws CudaFailure: not found (every place tried), too old, a function missing, or no handle.
  // The library is loaded once for the process and never unloaded; so are its siblings, from the
  // same folder.
  CudnnLibrary(const std::string& option_folder, cudaStream_t stream);
  ~CudnnLibrary();
  CudnnLibrary(const CudnnLibrary&) = delete;
  CudnnLibrary& operator=(const CudnnLibrary&) = delete;

  cudnnHandle_t handle() const { return handle_; }
  std::string version() const;  // "9.19.0"

 private:
  cudnnHandle_t handle_ = nullptr;
};

}  // namespace tunemesh::cuda
