// The backends by name: the CPU's is built in, others are plugins that are loaded when asked for.
#pragma once
#include <string>

#include "kernels/backend.h"

namespace tunemesh {

// "cpu", or "cuda" with the plugin's path. A plugin stays loaded until the process ends. Throws
// ENGINE_MISSING where it can't be loaded, or was built for another version of backend.h.
const TmBackend* find_backend(const std::string& name, const std::string& plugin_path);

}  // namespace tunemesh
