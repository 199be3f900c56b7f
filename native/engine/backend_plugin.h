// The backends by name: the CPU's is built in, others are plugins that are loaded when asked for.
#pragma once
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace tunemesh {

// "cpu", or "cuda" with the plugin's path. A plugin stays loaded until the process ends. Throws
// ENGINE_MISSING where it can't be loaded, or was built for another version of backend.h.
const TmBackend* find_backend(const std::string& name, const std::string& plugin_path);

// A function that a plugin has beside its table, for benchmarks; null where it has none.
void* plugin_symbol(const std::string& plugin_path, const char* symbol);

struct LibraryFinding {
  std::string name;  // "driver", "cuBLASLt", "cuDNN"
  bool is_good;
  std::string text;  // what was seen and, where that is not good, what to do
};

// What a plugin finds of its driver and libraries, in `folder` first; no device is needed.
std::vector<LibraryFinding> find_libraries(const std::string& name, const std::string& plugin_path,
                                           const std::string& folder);

}  // namespace tunemesh
