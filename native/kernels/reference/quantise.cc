// Reference: rows as e4m3 numbers. See reference.h.
#include <cmath>

#include "kernels/reference/reference.h"

namespace tunemesh::reference {
namespace {

constexpr int kNumFinite = 127;  // 0x00 to 0x7e

double magnitude_of(int code) {
  const int exponent = code / 8, mantissa = code % 8;
  return exponent == 0 ? mantissa * std::pow(2, -9) : (8 + mantissa) * std::pow(2, exponent - 10);
}

// The code of the nearest magnitude; of two as near the even one, whose last mantissa bit is zero.
int nearest_code(double magnitude) {
  int best = 0;
  for (int code = 1; code < kNumFinite; ++code) {
    const double closer = std::fabs(magnitude_of(code) - magnitude);
    const double found = std::fabs(magnitude_of(best) - magnitude);
    if (closer < found || (closer == found && code % 2 == 0)) best = code;
  }
  return best;
}

}  // namespace

void quantise_rows(const TmQuantiseRows& a) {
  for (size_t i = 0; i < a.n; ++i) {
    const float* x = a.x + i * a.x_stride;
    float largest = std::pow(2.0f, -100.0f);
    for (size_t j = 0; j < a.c; ++j) {
      if (std::fabs(x[j]) > largest) largest = std::fabs(x[j]);
    }
    a.scales[i] = largest / 448.0f;
    const float inverse = 448.0f / largest;
    for (size_t j = 0; j < a.c; ++j) {
      const float scaled = x[j] * inverse;
      const int sign = std::signbit(scaled) ? 0x80 : 0;
      const int code = std::isnan(scaled) ? 0x7f : sign + nearest_code(std::fabs(scaled));
      a.q[i * a.c + j] = static_cast<uint8_t>(code);
    }
  }
}

}  // namespace tunemesh::reference
