// The CUDA backend for tests that run on the host too.
#pragma once
#include <cstdio>
#include <filesystem>
#include <string>

#include "engine/backend_plugin.h"

namespace tunemesh::test {

// Null, and one line that says what was skipped, where there is no plugin or no card.
inline const TmBackend* cuda_backend_or_skip(const std::string& plugin_path) {
  if (!std::filesystem::exists(plugin_path)) {
    std::printf("skipped: no CUDA plugin at %s; node scripts/build.mjs cuda builds it\n",
                plugin_path.c_str());
    return nullptr;
  }
  const TmBackend* backend = find_backend("cuda", plugin_path);
  if (backend->num_devices() > 0) return backend;
  std::printf("skipped: no CUDA device\n");
  return nullptr;
}

}  // namespace tunemesh::test
