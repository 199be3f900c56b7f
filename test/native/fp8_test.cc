// Linear groups with an fp8 base, against exact sums over the numbers that e4m3 leaves: on the
// host, and where there is a card on the CUDA backend.
//
//   fp8_test [tunemesh_cuda.so] [--small]
#include <cstring>

#include "cuda_device.h"
#include "group_case.h"
#include "host_groups.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

constexpr float kScale = 0.75f;

std::string on(const Device& device) {
  return std::string(" on ") + device.ops().name + (device.element_bytes() == 2 ? ", bf16" : "");
}

// A matrix of what the e4m3 numbers of its rows stand for.
struct Rounded {
  Floats values;
  Rounded(const Floats& rows, size_t n, size_t c, size_t stride) : values(n * c) {
    for (size_t i = 0; i < n; ++i) {
      std::memcpy(&values[i * c], &rows[i * stride], c * sizeof(float));
      round_to_e4m3(&values[i * c], c);
    }
  }
};

// How far results are from exact sums over rounded operands. Rounding to the elements may cost
// twice what it must (there are two); tensor cores besides keep some 14 bits of each partial sum
// of 32 products.
class Fp8Closeness {
 public:
  Fp8Closeness(const Device& device, size_t depth)
      : closeness_(device.element_bytes() == 2),
        allowed_(device.is_host() ? 0 : static_cast<double>(depth) / 32 * 0x1p-13) {}
  void add(float got, const Chain& sum) { closeness_.add(got, sum); }
  void check(const std::string& what) const { closeness_.check(what, allowed_); }

 private:
  Closeness closeness_;
  double allowed_;
};

struct Tested {
  const Device& device;
  const GroupCase& made;
  const std::vector<GroupValues>& parts;
  size_t border, out;
  TmQuantised quantised;
  std::string name;
};

Floats poisoned_rows(Random& random, size_t n, size_t width, size_t stride) {
  Floats values(n * stride, kPoison);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < width; ++j) {
      values[i * stride + j] = static_cast<float>(random.symmetric(i % 3 == 0 ? 20 : 1));
    }
  }
  return values;
}

// visit(part, rank index within the part, column of the border, the part's first output)
template <typename Visit>
void for_each_rank(const TmGroupShape& shape, Visit visit) {
  size_t column = 0, first = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    for (size_t k = 0; shape.is_adapted[part] && k < shape.rank; ++k) {
      visit(part, k, column++, first);
    }
    first += shape.out[part];
  }
}

Floats all_weights(const Tested& t) {
  Floats all;
  for (const GroupValues& part : t.parts) {
    all.insert(all.end(), part.weight.begin(), part.weight.end());
  }
  return all;
}

struct ForwardResult {
  Floats x, residual;
  size_t x_stride;
  std::vector<Floats> y;  // of each part, from its first element on
  std::vector<size_t> y_strides;
};

void check_forward(const Tested& t, const ForwardResult& r) {
  const TmGroupShape& shape = t.made.shape;
  const size_t n = t.made.n, in = shape.in;
  const Rounded x(r.x, n, in, r.x_stride);
  const Rounded weights(all_weights(t), t.out, in, in);
  Fp8Closeness result(t.device, in);
  Closeness tail(t.device.element_bytes() == 2);
  for (size_t i = 0; i < n; ++i) {
    const float* row = r.x.data() + i * r.x_stride;
    for_each_rank(shape, [&](size_t part, size_t k, size_t column, size_t) {
      Chain sum;
      for (size_t j = 0; j < in; ++j) sum.add(kScale, row[j], t.parts[part].lora_a[k * in + j]);
      tail.add(row[in + column], sum);
    });
    for (size_t part = 0, first = 0; part < shape.num_parts; first += shape.out[part++]) {
      for (size_t o = 0; o < shape.out[part]; ++o) {
        Chain sum;
        const float* w = &weights.values[(first + o) * in];
        for (size_t j = 0; j < in; ++j) sum.add(1, x.values[i * in + j], w[j]);
        for_each_rank(shape, [&](size_t of, size_t k, size_t column, size_t) {
          if (of == part) sum.add(1, row[in + column], t.parts[part].lora_b[o * shape.rank + k]);
        });
        if (shape.has_bias) sum.add(t.parts[part].bias[o]);
        if (t.made.has_residual) sum.add(r.residual[i * shape.out[0] + o]);
        result.add(r.y[part][i * r.y_strides[part] + o], sum);
      }
    }
  }
  if (t.border > 0) tail.check(t.name + " forward: tail");
  result.check(t.name + " forward");
}

void test_forward(const Tested& t, const PackedGroup& group, Random& random) {
  const TmGroupShape& shape = t.made.shape;
  const size_t n = t.made.n;
  ForwardResult r;
  r.x_stride = shape.in + t.border + t.made.gap;
  const Elements x(t.device, poisoned_rows(random, n, shape.in, r.x_stride));
  const Elements residual(t.device, poisoned_rows(random, n, shape.out[0], shape.out[0]));
  std::vector<std::unique_ptr<Elements>> outputs;
  TmGroupForward call = {};
  call.shape = &shape;
  call.packed = group.packed();
  call.x = x.data();
  call.x_stride = r.x_stride;
  call.n = n;
  call.scale = kScale;
  call.quantised = t.quantised;
  if (t.made.has_residual) {
    call.residual = residual.data();
    call.residual_stride = shape.out[0];
  }
  std::vector<size_t> columns;
  for (size_t part = 0, column = 0; part < shape.num_parts; ++part) {
    const size_t stride = (t.made.is_apart ? shape.out[part] : t.out) + t.made.gap;
    if (t.made.is_apart || part == 0) {
      outputs.push_back(std::make_unique<Elements>(t.device, Floats(n * stride, kPoison)));
      column = 0;
    }
    call.y[part] = t.device.at(outputs.back()->data(), column);
    call.y_stride[part] = stride;
    r.y_strides.push_back(stride);
    columns.push_back(column);
    column += shape.out[part];
  }
  std::vector<Floats> first;
  for (int run = 0; run < 2; ++run) {
    TM_RUN(t.device, group_forward, &call);
    std::vector<Floats> found;
    for (const auto& output : outputs) found.push_back(output->read());
    for (size_t i = 0; run == 1 && i < found.size(); ++i) {
      CHECK(std::memcmp(found[i].data(), first[i].data(), found[i].size() * sizeof(float)) == 0,
            t.name + " forward: other bits in a second run");
    }
    first = std::move(found);
  }
  for (size_t part = 0; part < shape.num_parts; ++part) {
    const Floats& all = first[t.made.is_apart ? part : 0];
    r.y.emplace_back(all.begin() + static_cast<ptrdiff_t>(columns[part]), all.end());
  }
  r.x = x.read();
  r.residual = residual.read();
  check_forward(t, r);
}

void check_backward(const Tested& t, const Floats& dy, size_t dy_stride, const Floats& dx,
                    size_t dx_stride) {
  const TmGroupShape& shape = t.made.shape;
  const size_t in = shape.in;
  const Floats weights = all_weights(t);
  Floats turned(in * t.out);
  for (size_t o = 0; o < t.out; ++o) {
    for (size_t j = 0; j < in; ++j) turned[j * t.out + o] = weights[o * in + j];
  }
  const Rounded columns(turned, in, t.out, t.out), rows(dy, t.made.n, t.out, dy_stride);
  Fp8Closeness result(t.device, t.out);
  Closeness tail(t.device.element_bytes() == 2);
  for (size_t i = 0; i < t.made.n; ++i) {
    const float* row = dy.data() + i * dy_stride;
    for_each_rank(shape, [&](size_t part, size_t k, size_t column, size_t first) {
      Chain sum;
      for (size_t o = 0; o < shape.out[part]; ++o) {
        sum.add(kScale, row[first + o], t.parts[part].lora_b[o * shape.rank + k]);
      }
      tail.add(row[t.out + column], sum);
    });
    for (size_t j = 0; j < in; ++j) {
      Chain sum;
      for (size_t o = 0; o < t.out; ++o) {
        sum.add(1, rows.values[i * t.out + o], columns.values[j * t.out + o]);
      }
      for_each_rank(shape, [&](size_t part, size_t k, size_t column, size_t) {
        sum.add(1, row[t.out + column], t.parts[part].lora_a[k * in + j]);
      });
      result.add(dx[i * dx_stride + j], sum);
    }
  }
  if (t.border > 0) tail.check(t.name + " backward: tail");
  result.check(t.name + " backward");
}

void test_backward(const Tested& t, const PackedGroup& group, Random& random) {
  const TmGroupShape& shape = t.made.shape;
  const size_t n = t.made.n, dy_stride = t.out + t.border + t.made.gap;
  const size_t dx_stride = shape.in + t.made.gap;
  const Elements dy(t.device, poisoned_rows(random, n, t.out, dy_stride));
  const Elements dx(t.device, Floats(n * dx_stride, kPoison));
  const TmGroupBackward call = {
      &shape, group.packed(), dy.data(),   dy_stride, dx.data(), dx_stride,
      n,      kScale,         t.quantised, 0};
  TM_RUN(t.device, group_backward, &call);
  const Floats found = dx.read();
  check_backward(t, dy.read(), dy_stride, found, dx_stride);
  TM_RUN(t.device, group_backward, &call);
  const Floats again = dx.read();
  CHECK(std::memcmp(again.data(), found.data(), again.size() * sizeof(float)) == 0,
        t.name + " backward: other bits in a second run");
  bool is_gap_kept = true;
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = shape.in; j < dx_stride; ++j) {
      is_gap_kept &= std::isnan(found[i * dx_stride + j]);
    }
  }
  CHECK(is_gap_kept, t.name + " backward: wrote behind dx");
}

void test_group(const Device& device, const GroupCase& made, uint64_t seed) {
  Random random(seed);
  const TmGroupShape& shape = made.shape;
  const auto parts = group_values(device, made, random);
  const PackedGroup group(device, shape, parts);
  const DeviceBytes q(device, made.n * std::max(shape.in, out_width(shape)));
  const DeviceBytes scales(device, made.n * sizeof(float));
  const TmQuantised quantised = {static_cast<uint8_t*>(q.data()),
                                 static_cast<float*>(scales.data())};
  std::string name = "fp8 n " + std::to_string(made.n) + " in " + std::to_string(shape.in);
  for (size_t part = 0; part < shape.num_parts; ++part) {
    name += " out " + std::to_string(shape.out[part]) + (shape.is_adapted[part] ? "+" : "");
  }
  name += std::string(shape.has_bias ? " bias" : "") + (made.is_apart ? " apart" : "") +
          (made.has_residual ? " residual" : "") + on(device);
  const Tested tested = {device,           made,      parts, device.ops().group_border(&shape),
                         out_width(shape), quantised, name};
  test_forward(tested, group, random);
  test_backward(tested, group, random);
}

void test_groups(const Device& device, bool is_small) {
  const GroupCase cases[] = {
      {{32, 3, {32, 16, 16}, {1, 1, 1}, 4, 0, 1}, 9, 8, false, false},
      {{48, 3, {32, 16, 16}, {1, 0, 1}, 3, 1, 1}, 33, 0, false, false},
      {{64, 3, {64, 32, 32}, {1, 1, 1}, 16, 1, 1}, 70, 0, false, true},
      {{64, 3, {64, 32, 32}, {0, 0, 0}, 0, 1, 1}, 20, 8, false, true},
      {{96, 2, {160, 160}, {1, 1, 0}, 8, 0, 1}, 129, 0, false, false},
      {{160, 1, {96}, {1, 0, 0}, 16, 0, 1}, 130, 0, true, false},
      {{48, 1, {48}, {0, 0, 0}, 0, 0, 1}, 21, 8, true, false},
      {{64, 1, {32}, {1, 0, 0}, 5, 0, 1}, 1, 0, true, false},
      {{512, 3, {384, 128, 128}, {1, 1, 1}, 16, 0, 1}, 200, 0, false, false},
      {{576, 1, {1536}, {1, 0, 0}, 16, 0, 1}, 128, 64, true, false},
  };
  uint64_t seed = 70;
  for (const GroupCase& made : cases) {
    if (!is_small || made.n * made.shape.in < 10'000) test_group(device, made, seed++);
  }
}

void test_cuda(const TestOptions& test_options) {
  const TmBackend* const backend = cuda_backend_or_skip(test_options.plugin);
  if (backend == nullptr) return;
  DeviceOptions options;
  options.precision = TM_FP8;
  const Device device(backend, options);
  std::printf("%s\n", backend->describe(device.context()));
  test_groups(device, test_options.is_small);
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh;
  using namespace tunemesh::test;
  const TestOptions test_options = options_of(argc, argv);
  DeviceOptions options;
  options.precision = TM_FP8;
  const Device host(host_group_backend(), options);
  if (!test_options.is_small) test_groups(host, false);
  CHECK_THROWS(Device(tm_cpu_backend(), options), "ENGINE_FAILED", "fp8 need a GPU");
  test_cuda(test_options);
  return finish("fp8_test");
}
