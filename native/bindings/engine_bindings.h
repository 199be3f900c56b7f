// The engine's face for JavaScript (worker/engine.ts types it).
#pragma once
#include <napi.h>

namespace tunemesh {

// Adds createEngine(options).
void register_engine(Napi::Env env, Napi::Object exports);

}  // namespace tunemesh
