#include "bindings/device_bindings.h"

#include "bindings/engine_arguments.h"
#include "bindings/method.h"
#include "engine/backend_plugin.h"

namespace tunemesh {
namespace {

// memoryBytes is 0 where the device uses the machine's.
Napi::Value describe_device(Info info) {
  const Napi::Object from = argument_object(info, 0);
  const ChosenDevice chosen = chosen_device(from);
  const Device device(chosen.backend, chosen.options);
  auto out = Napi::Object::New(info.Env());
  out.Set("device", device.ops().describe(device.context()));
  out.Set("deviceClass", device_class(device));
  out.Set("numThreads", device.ops().num_threads(device.context()));
  size_t memory = 0;
  if (device.ops().memory_bytes != nullptr) memory = device.ops().memory_bytes(device.context());
  out.Set("memoryBytes", static_cast<double>(memory));
  const std::vector<std::string> notes = device.take_notes();
  auto lines = Napi::Array::New(info.Env(), notes.size());
  for (uint32_t i = 0; i < notes.size(); ++i) lines.Set(i, notes[i]);
  out.Set("notes", lines);
  return out;
}

Napi::Value count_devices(Info info) {
  const TmBackend* backend =
      find_backend(text_value(info[0], "backend"), text_value(info[1], "pluginPath"));
  return Napi::Number::New(info.Env(), backend->num_devices());
}

Napi::Value find_device_libraries(Info info) {
  const std::vector<LibraryFinding> found =
      find_libraries(text_value(info[0], "backend"), text_value(info[1], "pluginPath"),
                     text_value(info[2], "libraryFolder"));
  auto out = Napi::Array::New(info.Env(), found.size());
  for (uint32_t i = 0; i < found.size(); ++i) {
    auto finding = Napi::Object::New(info.Env());
    finding.Set("name", found[i].name);
    finding.Set("isGood", found[i].is_good);
    finding.Set("text", found[i].text);
    out.Set(i, finding);
  }
  return out;
}

}  // namespace

void register_devices(Napi::Env env, Napi::Object exports) {
  (void)env;
  set_method(exports, "describeDevice", describe_device);
  set_method(exports, "countDevices", count_devices);
  set_method(exports, "findLibraries", find_device_libraries);
}

}  // namespace tunemesh
