// Where things lie in a packed fp8 group (fp8_group.h). Plain C++: a memory plan is made of it
// where there is no card too.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"

namespace tunemesh::cuda {

// In bytes; a border is of bfloat16 elements.
struct Fp8Places {
  size_t in, out = 0, border;
  size_t rows = 0, columns, row_scales, column_scales, lora_a, lora_b, bias, end;

  Fp8Places(const TmGroupShape& shape, size_t of_border) : in(shape.in), border(of_border) {
    for (size_t part = 0; part < shape.num_parts; ++part) out += shape.out[part];
    columns = rows + aligned(out * in);
    row_scales = columns + aligned(in * out);
    column_scales = row_scales + aligned(out * sizeof(float));
    lora_a = column_scales + aligned(in * sizeof(float));
    lora_b = lora_a + aligned(border * in * kElement);
    bias = lora_b + aligned(out * border * kElement);
    end = bias + (shape.has_bias ? aligned(out * kElement) : 0);
  }
  size_t packed_elements() const { return end / kElement; }

 private:
  static constexpr size_t kAlignment = 256, kElement = 2;
  static size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }
};

}  // namespace tunemesh::cuda
