// What a card's memory holds beside the buffers that an engine plans: the process's context, loaded
// modules, the libraries' own memory. The one place of that number: TmContext::overhead_bytes()
// adds it up, plugin.h tells it to benchmarks, TmBackend.overhead_bytes to the engine's memory
// choice.
#pragma once
#include <stddef.h>

namespace tunemesh::cuda {

// Of kernels that are loaded when they are first launched, after a context was opened: the plugin's
// own, cuBLASLt's and cuDNN's. Not measured at open.
inline constexpr size_t kLazyModuleBytes = size_t{64} << 20;

// Makes `device` the thread's device. The first time in a process this creates its context, whose
// size is measured through the driver's management library; a usual size where that is not there.
void select_and_measure(int device);
// Of the context that select_and_measure() created.
size_t context_bytes(int device);
// What the runtime says of the thread's device.
size_t free_device_bytes();

}  // namespace tunemesh::cuda
