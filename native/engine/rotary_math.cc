#include "engine/rotary_math.h"

#include <cmath>

namespace tunemesh {
namespace {

// ln 2 in two parts; the first has 33 bits, so that its multiples up to 2^20 are exact.
constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;

// base = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1), by its
// power series.
double logarithm(double base) {
  int n;
  double m = std::frexp(base, &n);
  if (m < 0.70710678118654752440) {
    m *= 2;
    --n;
  }
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 1.0 / 23;
  for (int k = 21; k >= 1; k -= 2) series = series * z + 1.0 / k;
  return n * kLn2High + (n * kLn2Low + 2 * s * series);
}

// x = n ln2 + r with |r| <= ln2 / 2; exp(r) by its power series.
double exponential(double x) {
  const double n = std::floor(x * 1.44269504088896340736 + 0.5);
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double series = 1;
  for (int k = 14; k >= 1; --k) series = 1 + series * r / k;
  return std::ldexp(series, static_cast<int>(n));
}

}  // namespace

double power(double base, double exponent) { return exponential(exponent * logarithm(base)); }

// angle = n pi/2 + r with |r| <= pi/4, pi/2 in two parts of which the first has 33 bits.
// source  FreeBSD msun, k_sin.c and k_cos.c: the polynomials
SineCosine sine_cosine(double angle) {
  const double n = std::floor(angle * 6.36619772367581382433e-01 + 0.5);
  const double r = (angle - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11;
  const double z = r * r;
  const double p =
      -1.66666666666666324348e-01 +
      z * (8.33333333332248946124e-03 +
           z * (-1.98412698298579493134e-04 +
                z * (2.75573137070700676789e-06 +
                     z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10))));
  const double q =
      4.16666666666666019037e-02 +
      z * (-1.38888888888741095749e-03 +
           z * (2.48015872894767294178e-05 +
                z * (-2.75573143513906633035e-07 +
                     z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11))));
  const double sine = r + r * z * p;
  const double cosine = 1 - (0.5 * z - z * z * q);
  switch (static_cast<long long>(n) % 4) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

}  // namespace tunemesh
