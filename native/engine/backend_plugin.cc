#include "engine/backend_plugin.h"

#include <dlfcn.h>

#include "engine/error.h"

namespace tunemesh {
namespace {

using BackendFunction = const TmBackend* (*)();

// As kernels/cuda/plugin.h has them.
struct PluginFinding {
  const char* name;
  int is_good;
  const char* text;
};
using LibrariesFunction = size_t (*)(const char*, const PluginFinding**);

template <typename Function>
Function plugin_function(const std::string& name, const std::string& path, const char* suffix) {
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw EngineError("ENGINE_MISSING",
                      "the " + name + " plugin can't be loaded: " + ::dlerror() + ".");
  }
  const std::string symbol = "tm_" + name + suffix;
  const auto function = reinterpret_cast<Function>(::dlsym(library, symbol.c_str()));
  if (function == nullptr) {
    throw EngineError("ENGINE_MISSING", path + " is no plugin: it has no function " + symbol + ".");
  }
  return function;
}

const TmBackend* load_plugin(const std::string& name, const std::string& path) {
  const TmBackend* backend = plugin_function<BackendFunction>(name, path, "_backend")();
  if (backend->abi != TM_BACKEND_ABI || backend->size != sizeof(TmBackend)) {
    const auto table = [](uint32_t abi, size_t bytes) {
      return std::to_string(abi) + " (" + std::to_string(bytes) + " bytes)";
    };
    throw EngineError("ENGINE_MISSING", path + " has version " +
                                            table(backend->abi, backend->size) +
                                            " of the backend's interface, this engine needs " +
                                            table(TM_BACKEND_ABI, sizeof(TmBackend)) +
                                            ". Build both from the same sources.");
  }
  return backend;
}

}  // namespace

const TmBackend* find_backend(const std::string& name, const std::string& plugin_path) {
  if (name == "cpu") return tm_cpu_backend();
  return load_plugin(name, plugin_path);
}

void* plugin_symbol(const std::string& plugin_path, const char* symbol) {
  void* library = ::dlopen(plugin_path.c_str(), RTLD_NOW | RTLD_LOCAL);
  return library == nullptr ? nullptr : ::dlsym(library, symbol);
}

std::vector<LibraryFinding> find_libraries(const std::string& name, const std::string& plugin_path,
                                           const std::string& folder) {
  const auto function = plugin_function<LibrariesFunction>(name, plugin_path, "_libraries");
  const PluginFinding* findings = nullptr;
  const size_t count = function(folder.c_str(), &findings);
  std::vector<LibraryFinding> found;
  for (size_t i = 0; i < count; ++i) {
    found.push_back({findings[i].name, findings[i].is_good != 0, findings[i].text});
  }
  return found;
}

}  // namespace tunemesh
