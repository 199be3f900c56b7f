// The operations of linear groups (kernels/backend.h), by loops on the host and, where there is a
// card, on the CUDA backend with float and bfloat16 elements.
//
//   groups_test [tunemesh_cuda.so] [--small] [--precision fp32|bf16]
#include "adapter_grads_case.h"
#include "cuda_device.h"
#include "group_case.h"
#include "host_groups.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

constexpr float kScale = 0.75f;

std::string name_of(const Device& device, const GroupCase& made, const char* operation) {
  std::string name = std::string(device.ops().name) + (device.element_bytes() == 2 ? " bf16" : "") +
                     " " + operation + " n " + std::to_string(made.n) + " in " +
                     std::to_string(made.shape.in) + " rank " + std::to_string(made.shape.rank);
  for (size_t part = 0; part < made.shape.num_parts; ++part) {
    name += " out " + std::to_string(made.shape.out[part]);
    if (made.shape.is_adapted[part]) name += "+";
  }
  return name + (made.is_apart ? " apart" : "") + (made.has_residual ? " residual" : "");
}

struct Rows {
  size_t width, stride;
};

// `width` random columns of n rows, poison behind them.
Floats random_rows(Random& random, size_t n, Rows rows) {
  Floats values(n * rows.stride, kPoison);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < rows.width; ++j) {
      values[i * rows.stride + j] = static_cast<float>(random.symmetric(1));
    }
  }
  return values;
}

struct Tested {
  const Device& device;
  const GroupCase& made;
  const std::vector<GroupValues>& parts;
  size_t border, out;
};

// visit(part, rank index within the part, column of the border)
template <typename Visit>
void for_each_rank(const TmGroupShape& shape, Visit visit) {
  size_t column = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    for (size_t k = 0; shape.is_adapted[part] && k < shape.rank; ++k) visit(part, k, column++);
  }
}

// The tail against A and the x of the device; y then against the tail that the device has.
void check_forward(const Tested& t, const Floats& x, size_t x_stride, const Floats& residual,
                   const std::vector<Floats>& y, const std::vector<size_t>& y_strides) {
  const TmGroupShape& shape = t.made.shape;
  Closeness tail(t.device.element_bytes() == 2), result(t.device.element_bytes() == 2);
  bool is_gap_kept = true;
  for (size_t i = 0; i < t.made.n; ++i) {
    const float* row = x.data() + i * x_stride;
    for_each_rank(shape, [&](size_t part, size_t k, size_t column) {
      Chain sum;
      for (size_t j = 0; j < shape.in; ++j) {
        sum.add(kScale, row[j], t.parts[part].lora_a[k * shape.in + j]);
      }
      tail.add(row[shape.in + column], sum);
    });
    for (size_t j = shape.in + t.border; j < x_stride; ++j) is_gap_kept &= std::isnan(row[j]);
    for (size_t part = 0; part < shape.num_parts; ++part) {
      for (size_t o = 0; o < shape.out[part]; ++o) {
        Chain sum;
        for (size_t j = 0; j < shape.in; ++j) {
          sum.add(1, row[j], t.parts[part].weight[o * shape.in + j]);
        }
        for_each_rank(shape, [&](size_t of, size_t k, size_t column) {
          if (of == part) {
            sum.add(1, row[shape.in + column], t.parts[part].lora_b[o * shape.rank + k]);
          }
        });
        if (shape.has_bias) sum.add(t.parts[part].bias[o]);
        if (t.made.has_residual) sum.add(residual[i * shape.out[0] + o]);
        result.add(y[part][i * y_strides[part] + o], sum);
      }
    }
  }
  const std::string name = name_of(t.device, t.made, "forward");
  CHECK(is_gap_kept, name + ": wrote behind x's border");
  if (t.border > 0) tail.check(name + ": tail");
  result.check(name);
}

void test_forward(const Tested& t, const PackedGroup& group, Random& random) {
  const TmGroupShape& shape = t.made.shape;
  const size_t n = t.made.n, x_stride = shape.in + t.border + t.made.gap;
  const Elements x(t.device, random_rows(random, n, {shape.in, x_stride}));
  const size_t wide = t.out + t.made.gap;
  std::vector<std::unique_ptr<Elements>> outputs;
  TmGroupForward call = {&shape, group.packed(), x.data(), x_stride, {}, {}, nullptr, 0,
                         n,      kScale,         {},       0};
  std::vector<size_t> y_strides;
  size_t column = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (t.made.is_apart || part == 0) {
      const size_t stride = t.made.is_apart ? shape.out[part] + t.made.gap : wide;
      outputs.push_back(std::make_unique<Elements>(t.device, Floats(n * stride, kPoison)));
      column = 0;
      call.y_stride[part] = stride;
    } else {
      call.y_stride[part] = wide;
    }
    call.y[part] = t.device.at(outputs.back()->data(), column);
    y_strides.push_back(call.y_stride[part]);
    column += shape.out[part];
  }
  const Elements residual(t.device, random_rows(random, n, {shape.out[0], shape.out[0]}));
  if (t.made.has_residual) {
    call.residual = residual.data();
    call.residual_stride = shape.out[0];
  }
  TM_RUN(t.device, group_forward, &call);
  std::vector<Floats> y, first;
  for (size_t part = 0, offset = 0; part < shape.num_parts; ++part) {
    const Floats all = outputs[t.made.is_apart ? part : 0]->read();
    y.emplace_back(all.begin() + static_cast<ptrdiff_t>(t.made.is_apart ? 0 : offset), all.end());
    offset += shape.out[part];
  }
  check_forward(t, x.read(), x_stride, residual.read(), y, y_strides);
  for (const auto& output : outputs) first.push_back(output->read());
  TM_RUN(t.device, group_forward, &call);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Floats again = outputs[i]->read();
    CHECK(std::memcmp(again.data(), first[i].data(), again.size() * sizeof(float)) == 0,
          name_of(t.device, t.made, "forward") + ": other bits in a second run");
  }
}

void check_backward(const Tested& t, const Floats& dy, size_t dy_stride, const Floats& dx,
                    size_t dx_stride) {
  const TmGroupShape& shape = t.made.shape;
  Closeness tail(t.device.element_bytes() == 2), result(t.device.element_bytes() == 2);
  bool is_gap_kept = true;
  for (size_t i = 0; i < t.made.n; ++i) {
    const float* row = dy.data() + i * dy_stride;
    std::vector<size_t> first_row(shape.num_parts + 1, 0);
    for (size_t part = 0; part < shape.num_parts; ++part) {
      first_row[part + 1] = first_row[part] + shape.out[part];
    }
    for_each_rank(shape, [&](size_t part, size_t k, size_t column) {
      Chain sum;
      for (size_t o = 0; o < shape.out[part]; ++o) {
        sum.add(kScale, row[first_row[part] + o], t.parts[part].lora_b[o * shape.rank + k]);
      }
      tail.add(row[t.out + column], sum);
    });
    for (size_t j = t.out + t.border; j < dy_stride; ++j) is_gap_kept &= std::isnan(row[j]);
    for (size_t j = 0; j < dx_stride; ++j) {
      const float got = dx[i * dx_stride + j];
      if (j >= shape.in) {
        is_gap_kept &= std::isnan(got);
        continue;
      }
      Chain sum;
      for (size_t part = 0; part < shape.num_parts; ++part) {
        for (size_t o = 0; o < shape.out[part]; ++o) {
          sum.add(1, row[first_row[part] + o], t.parts[part].weight[o * shape.in + j]);
        }
      }
      for_each_rank(shape, [&](size_t part, size_t k, size_t column) {
        sum.add(1, row[t.out + column], t.parts[part].lora_a[k * shape.in + j]);
      });
      result.add(got, sum);
    }
  }
  const std::string name = name_of(t.device, t.made, "backward");
  CHECK(is_gap_kept, name + ": wrote behind a border");
  if (t.border > 0) tail.check(name + ": tail");
  result.check(name);
}

void test_backward(const Tested& t, const PackedGroup& group, Random& random) {
  const TmGroupShape& shape = t.made.shape;
  const size_t n = t.made.n, dy_stride = t.out + t.border + t.made.gap;
  const size_t dx_stride = shape.in + t.made.gap;
  const Elements dy(t.device, random_rows(random, n, {t.out, dy_stride}));
  const Elements dx(t.device, Floats(n * dx_stride, kPoison));
  TmGroupBackward call = {&shape, group.packed(), dy.data(), dy_stride, nullptr, dx_stride,
                          n,      kScale,         {},        0};
  TM_RUN(t.device, group_backward, &call);
  bool is_untouched = true;
  for (const float value : dx.read()) is_untouched &= std::isnan(value);
  CHECK(is_untouched, name_of(t.device, t.made, "backward") + ": wrote a dx not asked for");
  call.dx = dx.data();
  TM_RUN(t.device, group_backward, &call);
  check_backward(t, dy.read(), dy_stride, dx.read(), dx_stride);
}

void test_group(const Device& device, const GroupCase& made, uint64_t seed) {
  Random random(seed);
  const auto parts = group_values(device, made, random);
  const Tested tested = {device, made, parts, device.ops().group_border(&made.shape),
                         out_width(made.shape)};
  PackedGroup group(device, made.shape, parts);
  test_forward(tested, group, random);
  test_backward(tested, group, random);
  // Other weights over the old ones; the adapters stay.
  auto others = group_values(device, made, random);
  for (size_t part = 0; part < parts.size(); ++part) {
    others[part].lora_a = parts[part].lora_a;
    others[part].lora_b = parts[part].lora_b;
  }
  group.pack_all(others);
  test_forward({device, made, others, tested.border, tested.out}, group, random);
}

void test_copy_rows(const Device& device) {
  for (const size_t unit : {size_t{1}, size_t{16}}) {
    const size_t n = 77, from_stride = 9 * unit, to_stride = 5 * unit, row_bytes = 3 * unit;
    std::vector<unsigned char> values(n * from_stride), result(n * to_stride, 7);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<unsigned char>(i * 37 % 251);
    const DeviceBytes from(device, values.size()), to(device, result.size());
    TM_RUN(device, copy_in, from.data(), values.data(), values.size());
    TM_RUN(device, copy_in, to.data(), result.data(), result.size());
    const TmCopyRows call = {to.data(), from.data(), to_stride, from_stride, row_bytes, n};
    TM_RUN(device, copy_rows, &call);
    TM_RUN(device, copy_out, result.data(), to.data(), result.size());
    bool is_right = true;
    for (size_t i = 0; i < result.size(); ++i) {
      const size_t row = i / to_stride, byte = i % to_stride;
      is_right &= result[i] == (byte < row_bytes ? values[row * from_stride + byte] : 7);
    }
    CHECK(is_right, std::string(device.ops().name) + " copy_rows by " + std::to_string(unit));
  }
}

// Heads inside wider rows against the same heads row by row.
void test_head_norm(const Device& device) {
  constexpr size_t kTokens = 19, kHeads = 3, kSize = 24, kStride = 101;
  Random random(5);
  Floats wide = random_rows(random, kTokens, {kHeads * kSize, kStride});
  Floats even;
  for (size_t i = 0; i < kTokens; ++i) {
    const auto row = wide.begin() + static_cast<ptrdiff_t>(i * kStride);
    even.insert(even.end(), row, row + kHeads * kSize);
  }
  const Floats gain_values = normals(random, kSize, 1);
  const DeviceBytes gain(device, kSize * sizeof(float)), rstd(device, kTokens * kHeads * 4);
  const DeviceBytes gain_grad(device, kSize * sizeof(float));
  TM_RUN(device, copy_in, gain.data(), gain_values.data(), kSize * sizeof(float));
  std::vector<Floats> results, gain_grads;
  for (const bool is_wide : {false, true}) {
    const size_t stride = is_wide ? kStride : kSize;
    const Elements x(device, is_wide ? wide : even), y(device, is_wide ? wide : even);
    TmRmsNorm norm = {};
    norm.x = x.data();
    norm.y = y.data();
    norm.gain = static_cast<const float*>(gain.data());
    norm.rstd = static_cast<float*>(rstd.data());
    norm.n = kTokens * kHeads;
    norm.c = kSize;
    norm.x_stride = norm.y_stride = stride;
    norm.epsilon = 1e-5f;
    norm.heads = is_wide ? kHeads : 0;
    TM_RUN(device, rms_norm_forward, &norm);
    TmRmsNormBackward back = {};
    back.dy = back.dx = y.data();
    back.x = x.data();
    back.gain = norm.gain;
    back.rstd = norm.rstd;
    back.dgain = static_cast<float*>(gain_grad.data());
    back.n = norm.n;
    back.c = kSize;
    back.x_stride = back.dy_stride = back.dx_stride = stride;
    back.heads = norm.heads;
    TM_RUN(device, fill_zero, gain_grad.data(), kSize * sizeof(float));
    TM_RUN(device, rms_norm_backward, &back);
    results.push_back(y.read());
    gain_grads.emplace_back(kSize);
    TM_RUN(device, copy_out, gain_grads.back().data(), gain_grad.data(), kSize * sizeof(float));
  }
  bool is_same = true;
  for (size_t i = 0; i < wide.size(); ++i) {
    const size_t row = i / kStride, column = i % kStride;
    is_same &= column < kHeads * kSize ? results[1][i] == results[0][row * kHeads * kSize + column]
                                       : std::isnan(results[1][i]);
  }
  const std::string name = device.ops().name;
  CHECK(is_same, name + " norm of heads inside wider rows");
  // Rows may be summed in groups of other sizes.
  double error = 0;
  for (size_t i = 0; i < kSize; ++i) {
    error = std::fmax(error, std::fabs(gain_grads[0][i] - gain_grads[1][i]));
  }
  CHECK_BELOW(error, 1e-5, name + " gain gradient of heads inside wider rows");
}

void test_device(const Device& device, bool is_small) {
  const GroupCase cases[] = {
      {{24, 3, {12, 6, 6}, {1, 1, 1}, 4, 0, 0}, 9, 3, false, false},
      {{40, 3, {24, 8, 8}, {1, 0, 1}, 3, 1, 0}, 33, 5, false, false},
      {{64, 3, {64, 32, 32}, {1, 1, 1}, 16, 1, 0}, 70, 0, false, true},
      {{64, 3, {33, 17, 17}, {0, 1, 0}, 5, 0, 0}, 13, 1, false, true},
      {{96, 2, {160, 160}, {1, 1, 0}, 8, 0, 0}, 129, 0, false, false},
      {{31, 2, {45, 45}, {0, 1, 0}, 7, 0, 0}, 5, 2, false, false},
      {{160, 1, {96}, {1, 0, 0}, 16, 0, 0}, 130, 0, true, false},
      {{37, 1, {29}, {1, 0, 0}, 3, 0, 0}, 1, 1, true, false},
      {{48, 1, {40}, {0, 0, 0}, 0, 0, 0}, 21, 4, true, false},
      {{72, 3, {48, 24, 24}, {0, 0, 0}, 0, 1, 0}, 20, 0, false, false},
      {{512, 3, {384, 128, 128}, {1, 1, 1}, 16, 0, 0}, 200, 0, false, false},
      {{128, 1, {640}, {1, 0, 0}, 64, 0, 0}, 64, 8, false, false},
  };
  uint64_t seed = 40;
  for (const GroupCase& made : cases) {
    if (!is_small || made.n * made.shape.in < 10'000) test_group(device, made, seed++);
  }
  test_adapter_grads(device);
  test_copy_rows(device);
  test_head_norm(device);
}

void test_cuda(const TestOptions& test_options) {
  const TmBackend* const backend = cuda_backend_or_skip(test_options.plugin);
  if (backend == nullptr) return;
  for (const TmPrecision precision : {TM_FP32, TM_BF16}) {
    DeviceOptions options;
    options.precision = precision;
    if (!test_options.wants_precision(precision == TM_BF16 ? "bf16" : "fp32")) continue;
    const Device device(backend, options);
    test_device(device, test_options.is_small);
  }
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh;
  using namespace tunemesh::test;
  const TestOptions options = options_of(argc, argv);
  if (!options.is_small) test_device(Device(host_group_backend(), DeviceOptions{}), false);
  test_cuda(options);
  return finish("groups_test");
}
