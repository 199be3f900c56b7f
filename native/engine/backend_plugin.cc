#include "engine/backend_plugin.h"

#include <dlfcn.h>

#include "engine/error.h"

namespace tunemesh {
namespace {

using BackendFunction = const TmBackend* (*)();

const TmBackend* load_plugin(const std::string& name, const std::string& path) {
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw EngineError("ENGINE_MISSING",
                      "the " + name + " plugin can't be loaded: " + ::dlerror() + ".");
  }
  const std::string symbol = "tm_" + name + "_backend";
  const auto function = reinterpret_cast<BackendFunction>(::dlsym(library, symbol.c_str()));
  if (function == nullptr) {
    throw EngineError("ENGINE_MISSING", path + " is no plugin: it has no function " + symbol + ".");
  }
  const TmBackend* backend = function();
  if (backend->abi != TM_BACKEND_ABI || backend->size != sizeof(TmBackend)) {
    throw EngineError("ENGINE_MISSING", path + " has version " + std::to_string(backend->abi) +
                                            " of the backend's interface, this engine needs " +
                                            std::to_string(TM_BACKEND_ABI) +
                                            ". Build both from the same sources.");
  }
  return backend;
}

}  // namespace

const TmBackend* find_backend(const std::string& name, const std::string& plugin_path) {
  if (name == "cpu") return tm_cpu_backend();
  return load_plugin(name, plugin_path);
}

}  // namespace tunemesh
