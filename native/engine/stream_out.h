// Values of the device on the host, part by part: never a copy of a whole vector.
#pragma once
#include <algorithm>
#include <cstddef>
#include <vector>

#include "engine/device.h"

namespace tunemesh {

inline constexpr size_t kStreamFloats = size_t{1} << 18;

struct DeviceFloats {
  const float* values;
  size_t count;
};

// sink(part, size), ascending, at most kStreamFloats at a time.
template <class Sink>
void stream_out(const Device& device, DeviceFloats from, const Sink& sink) {
  std::vector<float> part(std::min(from.count, kStreamFloats));
  for (size_t first = 0; first < from.count; first += kStreamFloats) {
    const size_t size = std::min(kStreamFloats, from.count - first);
    TM_RUN(device, copy_out, part.data(), from.values + first, size * sizeof(float));
    sink(static_cast<const float*>(part.data()), size);
  }
}

// For what is small.
inline std::vector<float> copied_out(const Device& device, DeviceFloats from) {
  std::vector<float> values(from.count);
  TM_RUN(device, copy_out, values.data(), from.values, from.count * sizeof(float));
  return values;
}

}  // namespace tunemesh
