// Stands in the place of NVIDIA's driver, cuBLASLt and cuDNN: each answers what version it is, as
// the environment says, and nothing more. For tests of what users read where those do not fit
// (test/integration/bad-cards.test.ts).
#include <cstdlib>

namespace {

int version_of(const char* variable) {
  const char* const text = std::getenv(variable);
  return text == nullptr ? 0 : std::atoi(text);
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// 12020 for CUDA 12.2.
EXPORTED int cuDriverGetVersion(int* version) {
  *version = version_of("TUNEMESH_FAKE_DRIVER");
  return 0;
}

// 130002 for 13.0.2.
EXPORTED size_t cublasLtGetVersion() {
  return static_cast<size_t>(version_of("TUNEMESH_FAKE_CUBLASLT"));
}

// 91900 for 9.19.0; 12090 for CUDA 12.9.
EXPORTED size_t cudnnGetVersion() { return static_cast<size_t>(version_of("TUNEMESH_FAKE_CUDNN")); }
EXPORTED size_t cudnnGetCudartVersion() {
  return static_cast<size_t>(version_of("TUNEMESH_FAKE_CUDNN_CUDA"));
}
