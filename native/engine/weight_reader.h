// Whole tensors of a source as floats in host memory, which serves one tensor after the other:
// fresh memory for each would be paged in each time, slower than reading. Several threads read.
#pragma once
#include <array>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/weight_source.h"
#include "kernels/backend.h"

namespace tunemesh {

class WeightReader {
 public:
  explicit WeightReader(const WeightSource& source) : source_(source) {}

  // The tensor of this shape, row-major; valid until the next tensor is read to the same place.
  // `place`: below TM_GROUP_PARTS. Throws what the source throws.
  std::span<const float> read(const std::string& name, const std::vector<size_t>& shape,
                              size_t place = 0);

 private:
  struct Place {
    std::unique_ptr<float[]> values;
    size_t capacity = 0;
  };
  const WeightSource& source_;
  std::array<Place, TM_GROUP_PARTS> places_;
};

}  // namespace tunemesh
