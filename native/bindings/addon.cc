#include <malloc.h>
#include <napi.h>

#include "bindings/addon_interface.h"
#include "bindings/device_bindings.h"
#include "bindings/engine_bindings.h"
#include "bindings/exchange_bindings.h"

namespace {

// Buffers of this size go back to the system when they are freed. By default the C library raises
// the limit with every such buffer, up to 32 MiB, and then keeps as much for later.
constexpr int kMappedFromBytes = 256 << 10;

Napi::Object initialise(Napi::Env env, Napi::Object exports) {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, kMappedFromBytes);
  mallopt(M_TRIM_THRESHOLD, 4 * kMappedFromBytes);
#endif
  exports.Set("interface", tunemesh::kAddonInterface);
  tunemesh::register_devices(env, exports);
  tunemesh::register_engine(env, exports);
  tunemesh::register_exchange(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(tunemesh, initialise)
