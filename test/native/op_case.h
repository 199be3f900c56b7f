// One operation with seeded inputs: how to run its kernel and its reference, and what must hold
// between them.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace tunemesh {

using Floats = std::vector<float>;
using Outputs = std::vector<Floats>;
using Exact = std::vector<std::vector<double>>;

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// To nearest, ties to even; poison stays poison.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float rounded_to_bf16(float value) { return from_bf16(to_bf16(value)); }

// Splitmix64: the same inputs on every machine.
class Random {
 public:
  // Normal numbers are then such that bf16 holds them: the inputs of a bf16 device are exact.
  static inline bool rounds_to_bf16 = false;

  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // A sum of uniforms: close to a normal distribution of this deviation.
  float normal(double deviation) {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    const float value = static_cast<float>(sum * deviation);
    return rounds_to_bf16 ? rounded_to_bf16(value) : value;
  }
  Floats normals(size_t n, double deviation) {
    Floats values(n);
    for (float& value : values) value = normal(deviation);
    return values;
  }
  std::vector<int32_t> indices(size_t n, size_t limit) {
    std::vector<int32_t> values(n);
    for (int32_t& value : values) value = static_cast<int32_t>(next() % limit);
    return values;
  }

 private:
  uint64_t state_;
};

// A matrix in rows of `stride` floats; what lies between the rows must never be written.
struct Matrix {
  Floats values;
  size_t rows, columns, stride;
};
inline Matrix random_matrix(Random& random, size_t rows, size_t columns, size_t gap = 0,
                            double deviation = 1) {
  Matrix m{Floats(rows * (columns + gap), kPoison), rows, columns, columns + gap};
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) m.values[i * m.stride + j] = random.normal(deviation);
  }
  return m;
}
inline Matrix poisoned(const Matrix& shape) {
  Matrix m = shape;
  m.values.assign(m.values.size(), kPoison);
  return m;
}
template <typename Real>
std::vector<Real> as(const Floats& values) {
  return std::vector<Real>(values.begin(), values.end());
}
template <typename Real>
std::vector<double> exact(const std::vector<Real>& values) {
  return std::vector<double>(values.begin(), values.end());
}

struct Device {
  const TmBackend* backend;
  TmContext* context;
  std::string name;
};

struct OpCase {
  std::string name;
  std::function<Outputs(const Device&)> kernel;
  std::function<Exact()> oracle;  // reference in double
  std::function<Exact()> plain;   // reference in float: straightforward code
  // One after the other, where elements are bf16, in the best that is known to do it in bf16.
  int num_roundings = 1;
};

// Distance of `got` from `want` relative to the norm of `want`; poison (NaN) must stand in
// the same places.
struct Distance {
  double rms = 0, largest = 0;
};
template <typename Got>
Distance distance(const std::vector<Got>& got, const std::vector<double>& want) {
  double error2 = 0, norm2 = 0, error = 0, norm = 0;
  if (got.size() != want.size()) return {INFINITY, INFINITY};
  for (size_t i = 0; i < want.size(); ++i) {
    const double g = static_cast<double>(got[i]);
    if (isnan(g) != isnan(want[i])) return {INFINITY, INFINITY};
    if (isnan(g)) continue;
    error2 += (g - want[i]) * (g - want[i]);
    norm2 += want[i] * want[i];
    error = fmax(error, fabs(g - want[i]));
    norm = fmax(norm, fabs(want[i]));
  }
  // Exactly zero only where terms of order 1 cancel (attention to one key): a few roundings remain.
  if (norm == 0) return error < 1e-6 ? Distance{} : Distance{INFINITY, INFINITY};
  return {sqrt(error2 / norm2), error / norm};
}

inline bool same_bits(const Outputs& a, const Outputs& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].size() != b[i].size()) return false;
    if (memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
  }
  return true;
}

class Tally {
 public:
  void check(bool holds, const std::string& what) {
    holds ? ++passed_ : ++failed_;
    if (!holds) printf("FAILED %s\n", what.c_str());
  }
  int finish() const {
    printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ > 0 ? 1 : 0;
  }

 private:
  int passed_ = 0, failed_ = 0;
};

// What the reference loses where only its result is rounded: nobody computes better in bf16.
inline std::vector<double> rounded_result(const std::vector<double>& want) {
  std::vector<double> rounded;
  for (const double value : want) rounded.push_back(rounded_to_bf16(static_cast<float>(value)));
  return rounded;
}
inline bool is_bf16(const Floats& values) {
  for (const float value : values) {
    if (!isnan(value) && value != rounded_to_bf16(value)) return false;
  }
  return true;
}

// On the first device the kernel's error is at most twice that of straightforward float code, with
// half a unit of float32 (6e-8) of the largest value allowed where that code happens to be exact;
// on all others the bits are the same. Results of bf16 elements may lose twice what the rounding of
// an exact result loses; where several roundings follow each other, their root more.
inline void run_case(const OpCase& op, const std::vector<Device>& devices, Tally& tally) {
  const Exact want = op.oracle();
  Exact plain = op.plain();
  Outputs first;
  for (const Device& device : devices) {
    const Outputs got = op.kernel(device);
    if (!first.empty()) {
      tally.check(same_bits(got, first), op.name + " on " + device.name + ": other bits");
      continue;
    }
    first = got;
    for (size_t i = 0; i < want.size(); ++i) {
      const bool is_rounded = Random::rounds_to_bf16 && is_bf16(got[i]);
      if (is_rounded) plain[i] = rounded_result(want[i]);
      const Distance mine = distance(got[i], want[i]);
      Distance theirs = distance(plain[i], want[i]);
      if (is_rounded) {
        theirs.rms *= sqrt(op.num_roundings);
        theirs.largest *= sqrt(op.num_roundings);
      }
      char line[256];
      snprintf(line, sizeof line, "%s, output %zu: error %.2g rms %.2g max, plain float %.2g, %.2g",
               op.name.c_str(), i, mine.rms, mine.largest, theirs.rms, theirs.largest);
      tally.check(mine.rms <= 2 * theirs.rms + 6e-8 && mine.largest <= 2 * theirs.largest + 6e-8,
                  line);
      if (getenv("OPS_VERBOSE")) printf("%s\n", line);
    }
  }
}

}  // namespace tunemesh
