// Entries of the table: exceptions become a status and a line, and the element type is chosen.
#pragma once
#include <exception>
#include <new>
#include <string>
#include <type_traits>

#include "kernels/cuda/context.h"
#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

// The line of this thread's last failure; keeping one answers its status.
const char* last_failure();
TmStatus keep_line(TmStatus status, const char* line);

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string line;
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  (line.append(text(parts)), ...);
  throw CudaFailure(TM_BAD_ARGUMENT, line);
}

// Runs `body`, whose answer is a status or nothing. A device error stays with the context: its
// state can't be trusted any more. While calls are recorded nothing runs: an error then only ends
// the recording. A checked context is waited for, so that the call itself tells what it caused, a
// kernel's fault included.
template <typename Body>
TmStatus guarded(TmContext* context, Body body) {
  try {
    if (context != nullptr) context->enter();
    TmStatus status = TM_OK;
    if constexpr (std::is_same_v<decltype(body()), TmStatus>) {
      status = body();
    } else {
      body();
    }
    if (context != nullptr && context->is_checked() && status == TM_OK) context->check_operation();
    return status;
  } catch (const CudaFailure& failure) {
    const bool stays = failure.status() == TM_DEVICE_ERROR;
    if (context != nullptr && stays && !context->is_recording()) context->fail(failure.what());
    return keep_line(failure.status(), failure.what());
  } catch (const std::bad_alloc&) {
    return keep_line(TM_OUT_OF_MEMORY, "no memory on the host");
  } catch (const std::exception& error) {
    return keep_line(TM_DEVICE_ERROR, error.what());
  }
}

// Runs `body` with an element of the context's type.
template <typename Body>
TmStatus with_element(TmContext* context, Body body) {
  return guarded(context, [&] {
    if (context->precision() == TM_BF16) {
      body(Bfloat16{});
    } else {
      body(float{});
    }
  });
}

}  // namespace tunemesh::cuda
