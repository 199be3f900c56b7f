// Finds the libraries that the plugin loads at run time: cuBLASLt and cuDNN are not linked, so that
// a machine without them still starts.
//
// Places, in this order; in each, the names in their order:
//   1 option       a folder given by the caller
//   2 environment  TUNEMESH_CUDA_LIBRARY_PATH, folders separated by ':'
//   3 loader       the name alone: already loaded, LD_LIBRARY_PATH, the system's cache
//   4 toolkit      lib64, lib and targets/x86_64-linux/lib below CUDA_HOME, CUDA_PATH and
//                  /usr/local/cuda
//   5 pip          nvidia/*/lib in site-packages of VIRTUAL_ENV, CONDA_PREFIX, each folder of PATH
//                  that has a python3 (and what that links to), ~/.local, /usr/local and /usr;
//                  Python is not started
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace tunemesh::cuda {

struct LibraryNames {
  const char* title;                 // "cuBLASLt"
  std::vector<const char*> sonames;  // best first
  const char* pip_package;
};
LibraryNames cublaslt_names();
LibraryNames cudnn_names();

// What the search touches outside of itself; tests put their own in place.
struct Surroundings {
  std::function<std::string(const char* name)> environment;  // empty where not set
  // A handle, or null and one line that says why.
  std::function<void*(const std::string& path, std::string* why)> open;
  std::function<bool(const std::string& path)> exists;
  std::function<std::vector<std::string>(const std::string& folder)> entries;  // names, sorted
  // Where a symbolic link points, as an absolute path; empty for anything else.
  std::function<std::string(const std::string& path)> link;
};
Surroundings real_surroundings();

struct LibrarySearchResult {
  void* handle = nullptr;
  std::string path;   // as given to the loader
  std::string error;  // where there is no handle: every place tried and what to do
};
LibrarySearchResult find_library(const LibraryNames& names, const std::string& option_folder,
                                 const Surroundings& surroundings);

}  // namespace tunemesh::cuda
