// What this machine has of driver, cuBLASLt and cuDNN, and whether they go together: for people, in
// lines. Needs no device: libraries are found, loaded and asked for their versions.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <deque>
#include <string>
#include <vector>

#include "kernels/cuda/card_refusals.h"
#include "kernels/cuda/library_search.h"
#include "kernels/cuda/library_versions.h"
#include "kernels/cuda/plugin.h"

namespace tunemesh::cuda {
namespace {

using VersionCall = size_t (*)();

struct Found {
  std::string path;
  size_t version = 0;
};

// Texts live as long as the report; a deque keeps their addresses.
struct Report {
  std::deque<std::string> texts;
  std::vector<TmCudaFinding> findings;

  void add(const char* name, bool is_good, const std::string& text) {
    texts.push_back(text);
    findings.push_back({name, is_good ? 1 : 0, texts.back().c_str()});
  }
};

// "13.0.2" of 130002, "9.19.0" of 91900.
std::string library_text(size_t version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

size_t ask(void* handle, const char* name) {
  const auto call = reinterpret_cast<VersionCall>(dlsym(handle, name));
  return call == nullptr ? 0 : call();
}

int check_driver(Report& report) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  cudaGetLastError();
  const std::string refused = refused_driver(driver, runtime);
  report.add("driver", refused.empty(),
             refused.empty() ? "the driver is for CUDA " + cuda_text(driver) : refused);
  return driver;
}

Found check_cublaslt(Report& report, const std::string& folder, int driver) {
  const LibrarySearchResult found = find_library(cublaslt_names(), folder, real_surroundings());
  if (found.handle == nullptr) {
    report.add("cuBLASLt", false, found.error);
    return {};
  }
  const Found library = {found.path, ask(found.handle, "cublasLtGetVersion")};
  const std::string seen = library_text(library.version) + " at " + found.path;
  const size_t major = library.version / 10000;
  if (library.version < kOldestCublasLt) {
    report.add("cuBLASLt", false,
               seen + "; 12.8 or newer is needed: tunemesh doctor --install-libs DIR gets it");
  } else if (driver != 0 && major > static_cast<size_t>(driver / 1000)) {
    report.add("cuBLASLt", false,
               seen + " needs a driver for CUDA " + std::to_string(major) + ", this one is for " +
                   cuda_text(driver) + ": install NVIDIA's driver 580 or newer");
  } else {
    report.add("cuBLASLt", true, seen);
  }
  return library;
}

// cuDNN brings no cuBLASLt: one built for another CUDA looks for a file that is not there.
void check_cudnn(Report& report, const std::string& folder, const Found& cublaslt) {
  const LibrarySearchResult found = find_library(cudnn_names(), folder, real_surroundings());
  const std::string instead = " Attention in bf16 runs on slower kernels without it";
  if (found.handle == nullptr) return report.add("cuDNN", false, found.error + instead);
  const size_t version = ask(found.handle, "cudnnGetVersion");
  const size_t cuda = ask(found.handle, "cudnnGetCudartVersion");
  const std::string seen = library_text(version) + " for CUDA " +
                           cuda_text(static_cast<int>(cuda)) + " at " + found.path;
  const size_t major = cublaslt.version / 10000;
  if (version < kOldestCudnn) {
    report.add("cuDNN", false,
               seen + "; 9.12 or newer is needed: tunemesh doctor --install-libs DIR gets it");
  } else if (cublaslt.version != 0 && cuda != 0 && cuda / 1000 != major) {
    report.add("cuDNN", false,
               seen + " does not go with cuBLASLt " + library_text(cublaslt.version) + " at " +
                   cublaslt.path + ": both must be for the same CUDA. Get a pair by tunemesh " +
                   "doctor --install-libs DIR");
  } else {
    report.add("cuDNN", true, seen);
  }
}

}  // namespace
}  // namespace tunemesh::cuda

extern "C" __attribute__((visibility("default"))) size_t tm_cuda_libraries(
    const char* folder, const TmCudaFinding** findings) {
  using namespace tunemesh::cuda;
  thread_local Report report;
  report = {};
  const std::string option = folder != nullptr ? folder : "";
  const int driver = check_driver(report);
  const Found cublaslt = check_cublaslt(report, option, driver);
  check_cudnn(report, option, cublaslt);
  *findings = report.findings.data();
  return report.findings.size();
}
