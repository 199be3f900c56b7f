#include "engine/weight_reader.h"

#include "kernels/parallel_parts.h"

namespace tunemesh {

std::span<const float> WeightReader::read(const std::string& name, const std::vector<size_t>& shape,
                                          size_t place) {
  size_t width = 1;
  for (size_t i = 1; i < shape.size(); ++i) width *= shape[i];
  const size_t count = shape[0] * width;
  auto& [values, capacity] = places_[place];
  if (capacity < count) {
    values.reset();
    values = std::make_unique_for_overwrite<float[]>(count);
    capacity = count;
  }
  float* const out = values.get();
  // Quantised kinds need whole rows.
  const size_t units = shape.size() < 2 ? 1 : shape[0], unit = count / units;
  in_parallel_parts(units, unit, [&](size_t first, size_t size) {
    source_.read(name, first * unit, size * unit, out + first * unit);
  });
  return {out, count};
}

}  // namespace tunemesh
