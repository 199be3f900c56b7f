#include <napi.h>

#include "bindings/engine_bindings.h"
#include "bindings/exchange_bindings.h"

namespace {

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
  tunemesh::register_engine(env, exports);
  tunemesh::register_exchange(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(tunemesh, initialise)
