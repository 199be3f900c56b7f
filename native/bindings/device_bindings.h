// The machine's devices for JavaScript (worker/device.ts types it).
#pragma once
#include <napi.h>

namespace tunemesh {

// Adds describeDevice(options) and countDevices(backend, pluginPath).
void register_devices(Napi::Env env, Napi::Object exports);

}  // namespace tunemesh
