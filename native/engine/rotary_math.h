// Sine, cosine and power of our own for rotary tables: libm differs between machines, and machines
// of one device class must have the same table to the bit. Only + - * / and what is exact.
#pragma once

namespace tunemesh {

struct SineCosine {
  double sine, cosine;
};

// For 0 <= angle <= 1.6e6, within 2^-52 of the true values.
SineCosine sine_cosine(double angle);

// base^exponent for base >= 1 and 0 <= exponent <= 1, to a relative 1e-14.
double power(double base, double exponent);

}  // namespace tunemesh
