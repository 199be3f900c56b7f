// Plain JavaScript objects to the engine's structs. Throws TypeError for what TypeScript would
// refuse.
#pragma once
#include <napi.h>

#include "engine/engine.h"

namespace tunemesh {

struct ChosenDevice {
  const TmBackend* backend;
  DeviceOptions options;
};
ChosenDevice chosen_device(const Napi::Object& from);
EngineOptions engine_options(const Napi::Object& from);
TrainSpec train_spec(const Napi::Object& from);
GenerateOptions generate_options(const Napi::Object& from);

// A copy: the caller may change its arrays while the engine works.
struct OwnedBatch {
  std::vector<int32_t> tokens, targets, document_starts;
  TokenBatch view() const;
};
OwnedBatch token_batch(const Napi::Object& from);

double number_field(const Napi::Object& from, const char* name);
size_t count_value(const Napi::Value& value, const char* name);
std::string text_value(const Napi::Value& value, const char* name);

}  // namespace tunemesh
