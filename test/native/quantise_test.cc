// e4m3 numbers, and rows quantised to them: to the bit as the reference's, on the host and where
// there is a card on the CUDA backend.
//
//   quantise_test [tunemesh_cuda.so] [--small]
#include <cstring>

#include "cuda_device.h"
#include "group_case.h"
#include "host_groups.h"
#include "kernels/reference/reference.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

std::string on(const Device& device) {
  return std::string(" on ") + device.ops().name + (device.element_bytes() == 2 ? ", bf16" : "");
}

void test_numbers() {
  for (int code = 0; code < 256; ++code) {
    const float value = e4m3_to_float(static_cast<uint8_t>(code));
    const bool is_nan = (code & 0x7f) == 0x7f;
    CHECK(std::isnan(value) == is_nan, "e4m3 " + std::to_string(code) + " is NaN or not");
    if (!is_nan) {
      CHECK(e4m3_from_float(value) == code, "e4m3 " + std::to_string(code) + " survives");
    }
    if ((code & 0x7f) >= 0x7e) continue;
    // Between two neighbours: the even one in the middle, else the nearer.
    const float next = e4m3_to_float(static_cast<uint8_t>(code + 1));
    const float middle = (value + next) / 2;
    const int even = code % 2 == 0 ? code : code + 1;
    CHECK(e4m3_from_float(middle) == even, "tie above e4m3 " + std::to_string(code));
    CHECK(e4m3_from_float(std::nextafter(middle, value)) == code,
          "below the tie above e4m3 " + std::to_string(code));
    CHECK(e4m3_from_float(std::nextafter(middle, next)) == code + 1,
          "above the tie above e4m3 " + std::to_string(code));
  }
  CHECK(e4m3_to_float(0x7e) == 448 && e4m3_to_float(1) == 0x1p-9f, "largest and smallest e4m3");
  for (const float beyond : {449.0f, 480.0f, 1e30f, INFINITY}) {
    CHECK(e4m3_from_float(beyond) == 0x7e && e4m3_from_float(-beyond) == 0xfe, "beyond 448 is 448");
  }
  CHECK(e4m3_from_float(NAN) == 0x7f && e4m3_from_float(-NAN) == 0x7f, "NaN is 0x7f");
}

struct QuantiseCase {
  std::string name;
  size_t n, c, gap;
  Floats values;  // [n, c + gap]
};

QuantiseCase random_rows(size_t n, size_t c, size_t gap) {
  Random random(n * 1000 + c);
  QuantiseCase made = {std::to_string(n) + " rows of " + std::to_string(c), n, c, gap, {}};
  for (size_t i = 0; i < n; ++i) {
    const double size = std::pow(2.0, random.symmetric(40));
    for (size_t j = 0; j < c + gap; ++j) {
      // Some far below the largest of the row: subnormal e4m3 numbers and zeros.
      const double part = random.uniform() < 0.2 ? std::pow(2.0, -12 * random.uniform()) : 1;
      made.values.push_back(rounded_to_bf16(j < c ? random.symmetric(size * part) : NAN));
    }
  }
  return made;
}

QuantiseCase special_rows() {
  QuantiseCase made = {"special rows", 9, 8, 0, Floats(9 * 8)};
  const float rows[][8] = {
      {0, 0, -0.0f, 0, 0, 0, 0, 0},
      {1, -1, 0.5f, 0.25f, 1e-3f, -1e-3f, 0, 3e-5f},
      {1e-38f, -1e-38f, 0, 5e-39f, 0, 0, 0, 0},
      {1e-45f, 0, 0, 0, 0, 0, 0, 0},
      {3e38f, -3e38f, 1, 1e30f, 0, 0, 0, 0},
      {NAN, 2, 1, -2, 0, 0, 0, 0},
      {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN},
      {INFINITY, 1, -1, 0, 0, 0, 0, 0},
      {448, 447, 464, 17, 19, -21, 0.0009765625f, 0.00146484375f},
  };
  std::memcpy(made.values.data(), rows, sizeof rows);
  for (float& value : made.values) {
    if (!std::isnan(value)) value = rounded_to_bf16(value);
  }
  return made;
}

struct Quantised {
  std::vector<uint8_t> q;
  Floats scales;
};

Quantised quantised(const Device& device, const QuantiseCase& made) {
  Quantised result = {std::vector<uint8_t>(made.n * made.c, 0xaa), Floats(made.n, kPoison)};
  const Elements x(device, made.values);
  const DeviceBytes q(device, result.q.size()), scales(device, made.n * sizeof(float));
  TM_RUN(device, copy_in, q.data(), result.q.data(), result.q.size());
  const TmQuantiseRows call = {x.data(),
                               made.c + made.gap,
                               static_cast<uint8_t*>(q.data()),
                               static_cast<float*>(scales.data()),
                               made.n,
                               made.c};
  TM_RUN(device, quantise_rows, &call);
  TM_RUN(device, copy_out, result.q.data(), q.data(), result.q.size());
  TM_RUN(device, copy_out, result.scales.data(), scales.data(), made.n * sizeof(float));
  return result;
}

void test_quantise(const Device& device, bool is_small) {
  std::vector<QuantiseCase> cases = {special_rows()};
  constexpr size_t kSizes[][3] = {{1, 1, 0},    {3, 7, 2},     {33, 64, 0},    {9, 100, 3},
                                  {5, 576, 64}, {3, 1024, 0},  {2, 1025, 7},   {7, 4096, 64},
                                  {2, 6144, 0}, {3, 14336, 8}, {2, 28672, 64}, {1, 40001, 1}};
  for (const auto& size : kSizes) {
    if (!is_small || size[1] < 7000) cases.push_back(random_rows(size[0], size[1], size[2]));
  }
  for (const QuantiseCase& made : cases) {
    Quantised wanted = {std::vector<uint8_t>(made.n * made.c), Floats(made.n)};
    reference::quantise_rows({reinterpret_cast<const TmElement*>(made.values.data()),
                              made.c + made.gap, wanted.q.data(), wanted.scales.data(), made.n,
                              made.c});
    const Quantised got = quantised(device, made);
    CHECK(got.q == wanted.q, made.name + ": other e4m3 numbers" + on(device));
    CHECK(std::memcmp(got.scales.data(), wanted.scales.data(), made.n * sizeof(float)) == 0,
          made.name + ": other scales" + on(device));
  }
}

// Rows that an operation makes, and their e4m3 numbers: of quantise_rows afterwards, or of the
// operation itself.
class Made {
 public:
  Made(const Device& device, size_t n, size_t c)
      : device_(device), n_(n), c_(c), q_(device, n * c), scales_(device, n * sizeof(float)) {}
  TmQuantised numbers() const {
    return {static_cast<uint8_t*>(q_.data()), static_cast<float*>(scales_.data())};
  }
  void quantise(const TmElement* rows, size_t stride) const {
    const TmQuantiseRows call = {rows, stride, numbers().q, numbers().scales, n_, c_};
    TM_RUN(device_, quantise_rows, &call);
  }
  Quantised read() const {
    Quantised result = {std::vector<uint8_t>(n_ * c_), Floats(n_)};
    TM_RUN(device_, copy_out, result.q.data(), q_.data(), result.q.size());
    TM_RUN(device_, copy_out, result.scales.data(), scales_.data(), n_ * sizeof(float));
    return result;
  }

 private:
  const Device& device_;
  size_t n_, c_;
  DeviceBytes q_, scales_;
};

struct Outcome {
  Floats rows;
  Quantised numbers;
  bool operator==(const Outcome& other) const {
    return numbers.q == other.numbers.q && same(rows, other.rows) &&
           same(numbers.scales, other.numbers.scales);
  }
  static bool same(const Floats& a, const Floats& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

struct Shape {
  size_t n, c, gap;
  size_t stride() const { return c + gap; }
};

struct Heads {
  size_t n, rotated, others, size, gap;
  size_t width() const { return (rotated + others) * size; }
};

Floats gap_rows(uint64_t seed, const Shape& shape) {
  Random random(seed);
  Floats values(shape.n * shape.stride(), kPoison);
  for (size_t i = 0; i < shape.n; ++i) {
    for (size_t j = 0; j < shape.c; ++j) {
      values[i * shape.stride() + j] = static_cast<float>(random.symmetric(i % 4 == 1 ? 30 : 1));
    }
  }
  return values;
}

Outcome norm_outcome(const Device& device, const Shape& shape, bool is_backward, bool is_fused) {
  const Elements x(device, gap_rows(1, shape)), y(device, gap_rows(2, shape));
  const Elements dx(device, gap_rows(3, shape));
  const Floats gains = gap_rows(4, {1, shape.c, 0});
  const DeviceBytes gain(device, shape.c * sizeof(float)), rstd(device, shape.n * sizeof(float));
  TM_RUN(device, copy_in, gain.data(), gains.data(), shape.c * sizeof(float));
  const Made made(device, shape.n, shape.c);
  TmRmsNorm norm = {};
  norm.x = x.data();
  norm.y = y.data();
  norm.gain = static_cast<const float*>(gain.data());
  norm.rstd = static_cast<float*>(rstd.data());
  norm.n = shape.n;
  norm.c = shape.c;
  norm.x_stride = norm.y_stride = shape.stride();
  norm.epsilon = 1e-5f;
  if (is_fused && !is_backward) norm.quantised = made.numbers();
  TM_RUN(device, rms_norm_forward, &norm);
  TmRmsNormBackward back = {};
  back.dy = y.data();
  back.x = x.data();
  back.dx = dx.data();
  back.gain = norm.gain;
  back.rstd = norm.rstd;
  back.n = shape.n;
  back.c = shape.c;
  back.x_stride = back.dy_stride = back.dx_stride = shape.stride();
  back.dx_add = 1;
  if (is_fused && is_backward) back.quantised = made.numbers();
  if (is_backward) TM_RUN(device, rms_norm_backward, &back);
  const Elements& result = is_backward ? dx : y;
  if (!is_fused) made.quantise(result.data(), shape.stride());
  return {result.read(), made.read()};
}

// Rows [gate | up] and their gradients over them.
Outcome swiglu_outcome(const Device& device, const Shape& shape, bool is_backward, bool is_fused) {
  const size_t d = shape.c / 2;
  const Elements both(device, gap_rows(5, shape)), dout(device, gap_rows(6, {shape.n, d, 3}));
  const Elements out(device, Floats(shape.n * (d + 3), kPoison));
  const Made made(device, shape.n, is_backward ? shape.c : d);
  TmElement* const up = device.at(both.data(), d);
  TmSwiGlu forward = {both.data(), up, out.data(), shape.n, d, shape.stride(), d + 3, {}};
  if (is_fused && !is_backward) forward.quantised = made.numbers();
  TM_RUN(device, swiglu_forward, &forward);
  TmSwiGluBackward back = {dout.data(), both.data(),    up,    both.data(), up, out.data(), shape.n,
                           d,           shape.stride(), d + 3, {}};
  if (is_fused && is_backward) back.quantised = made.numbers();
  if (is_backward) TM_RUN(device, swiglu_backward, &back);
  const Elements& result = is_backward ? both : out;
  if (!is_fused) made.quantise(result.data(), is_backward ? shape.stride() : d + 3);
  return {result.read(), made.read()};
}

// Rows [q | k | v], of which the heads of q and k are rotated.
Outcome rope_outcome(const Device& device, const Heads& shape, bool is_fused) {
  const Shape all = {shape.n, shape.width(), shape.gap};
  const Elements x(device, gap_rows(7, all));
  constexpr size_t kPositions = 40;
  const size_t half = shape.size / 2;
  const Floats cosines = gap_rows(8, {kPositions, half, 0});
  const Floats sines = gap_rows(9, {kPositions, half, 0});
  std::vector<int32_t> positions;
  for (size_t i = 0; i < shape.n; ++i)
    positions.push_back(static_cast<int32_t>(7 * i % kPositions));
  const DeviceBytes cos(device, cosines.size() * sizeof(float));
  const DeviceBytes sin(device, sines.size() * sizeof(float));
  const DeviceBytes at(device, shape.n * sizeof(int32_t));
  TM_RUN(device, copy_in, cos.data(), cosines.data(), cosines.size() * sizeof(float));
  TM_RUN(device, copy_in, sin.data(), sines.data(), sines.size() * sizeof(float));
  TM_RUN(device, copy_in, at.data(), positions.data(), shape.n * sizeof(int32_t));
  const Made made(device, shape.n, shape.width());
  TmRope rope = {};
  rope.x = x.data();
  rope.x_stride = all.stride();
  rope.positions = static_cast<const int32_t*>(at.data());
  rope.cos = static_cast<const float*>(cos.data());
  rope.sin = static_cast<const float*>(sin.data());
  rope.n = shape.n;
  rope.heads = shape.rotated;
  rope.head_size = shape.size;
  rope.inverse = 1;
  if (is_fused) rope.quantised = made.numbers();
  if (is_fused) rope.quantised_width = shape.width();
  TM_RUN(device, rope, &rope);
  if (!is_fused) made.quantise(x.data(), all.stride());
  return {x.read(), made.read()};
}

// Up to far more than what the card's kernel keeps in registers.
void test_rotated(const Device& device, bool is_small) {
  const Heads shapes[] = {{5, 2, 1, 16, 0},    {7, 5, 1, 24, 64},   {33, 12, 3, 64, 64},
                          {3, 40, 8, 128, 8},  {4, 6, 0, 80, 0},    {2, 7, 2, 10, 3},
                          {2, 64, 32, 128, 0}, {2, 96, 48, 128, 64}};
  for (const Heads& shape : shapes) {
    if (is_small && shape.width() > 7000) continue;
    CHECK(rope_outcome(device, shape, true) == rope_outcome(device, shape, false),
          "rope, " + std::to_string(shape.rotated) + " heads of " + std::to_string(shape.size) +
              on(device) + ": other e4m3 numbers, or rows");
  }
}

void test_results(const Device& device, bool is_small) {
  const Shape shapes[] = {{1, 16, 0},    {9, 64, 64},  {33, 576, 64},  {5, 1032, 8}, {7, 3072, 64},
                          {3, 4096, 64}, {2, 9000, 2}, {3, 28672, 64}, {2, 37888, 0}};
  for (const Shape& shape : shapes) {
    if (is_small && shape.c > 7000) continue;
    const std::string what = std::to_string(shape.n) + " rows of " + std::to_string(shape.c);
    for (const bool is_backward : {false, true}) {
      const std::string which = (is_backward ? " backward, " : " forward, ") + what + on(device);
      CHECK(norm_outcome(device, shape, is_backward, true) ==
                norm_outcome(device, shape, is_backward, false),
            "norm" + which + ": other e4m3 numbers, or rows");
      CHECK(swiglu_outcome(device, shape, is_backward, true) ==
                swiglu_outcome(device, shape, is_backward, false),
            "swiglu" + which + ": other e4m3 numbers, or rows");
    }
  }
}

void test_cuda(const TestOptions& test_options) {
  const TmBackend* const backend = cuda_backend_or_skip(test_options.plugin);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    DeviceOptions options;
    options.precision = precision;
    const Device device(backend, options);
    test_quantise(device, test_options.is_small);
    test_results(device, test_options.is_small);
    test_rotated(device, test_options.is_small);
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh;
  using namespace tunemesh::test;
  const TestOptions options = options_of(argc, argv);
  if (!options.is_small) {
    const Device host(tm_cpu_backend(), DeviceOptions{});
    test_numbers();
    test_quantise(host, false);
    test_results(host, false);
    test_rotated(host, false);
  }
  test_cuda(options);
  return finish("quantise_test");
}
