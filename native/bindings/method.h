// A native function as a method of a JavaScript object: an EngineError becomes a JavaScript error
// with its code.
#pragma once
#include <napi.h>

#include <functional>
#include <string>
#include <utility>

#include "bindings/async_task.h"

namespace tunemesh {

using Info = const Napi::CallbackInfo&;
using Method = std::function<Napi::Value(Info)>;

inline void set_method(Napi::Object object, const char* name, Method method) {
  auto call = [method = std::move(method)](Info info) -> Napi::Value {
    try {
      return method(info);
    } catch (const EngineError& error) {
      throw js_error(info.Env(), error);
    }
  };
  object.Set(name, Napi::Function::New(object.Env(), call, name));
}

inline Napi::Object argument_object(Info info, size_t index) {
  if (info.Length() <= index || !info[index].IsObject()) {
    throw Napi::TypeError::New(info.Env(),
                               "argument " + std::to_string(index) + " must be an object");
  }
  return info[index].As<Napi::Object>();
}

}  // namespace tunemesh
