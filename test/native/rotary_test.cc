// The rotary tables' own sine, cosine and power, beside libm's in double.
#include <algorithm>
#include <cmath>

#include "engine/rotary_math.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

// libm is within a unit of the last place here, ours within two: 4 2^-53 near 1.
constexpr double kLimit = 4.5e-16;

double distance(double angle) {
  const auto [sine, cosine] = sine_cosine(angle);
  return std::max(std::fabs(sine - std::sin(angle)), std::fabs(cosine - std::cos(angle)));
}

void test_sine_cosine() {
  double worst = 0;
  // A step that no multiple of pi/2 shares: every octant and every size of angle.
  for (double angle = 0; angle < 1.6e6; angle += 0.7310585786300049) {
    worst = std::max(worst, distance(static_cast<float>(angle)));
  }
  for (float angle = 1e-30f; angle < 1; angle *= 1.001f) worst = std::max(worst, distance(angle));
  // Where the result is nearly 0, on both sides of each multiple of pi/2.
  for (int n = 1; n < 1000000; n += 7) {
    const float near = static_cast<float>(n * 1.57079632679489661923);
    worst = std::max({worst, distance(near), distance(std::nextafter(near, 0.0f))});
  }
  CHECK_BELOW(worst, kLimit, "sine_cosine is libm's");
  const auto [sine, cosine] = sine_cosine(0);
  CHECK(sine == 0 && cosine == 1, "angle 0 turns nothing");
}

void test_power() {
  double worst = 0;
  for (const double base : {1.0, 1.5, 2.0, 100.0, 1e4, 5e5, 1e6, 1.23456789e7}) {
    for (int i = 0; i <= 256; ++i) {
      const double exponent = static_cast<float>(i) / 256;
      const double expected = std::pow(base, exponent);
      worst = std::max(worst, std::fabs(power(base, exponent) / expected - 1));
    }
  }
  // The logarithm, up to 16.3, is rounded to 2^-53 of itself, and an exponential keeps that.
  CHECK_BELOW(worst, 1e-14, "power is libm's");
  CHECK(power(1e4, 0) == 1, "the first frequency is 1");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  test_sine_cosine();
  test_power();
  return finish("rotary_test");
}
