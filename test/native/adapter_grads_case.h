// Gradients of a group's adapters on a device against sums in double over the very elements that
// the device holds; outputs poisoned, and the same bits in a second run.
#pragma once
#include "group_case.h"

namespace tunemesh::test {

// n rows of `width` random columns, poison behind them up to `stride`.
inline Floats poisoned_rows(Random& random, size_t n, size_t width, size_t stride) {
  Floats values(n * stride, kPoison);
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < width; ++j) {
      values[i * stride + j] = static_cast<float>(random.symmetric(1));
    }
  }
  return values;
}

// A gradient in device memory.
class DeviceFloats {
 public:
  DeviceFloats(const Device& device, size_t count)
      : device_(device), count_(count), memory_(device, count * sizeof(float)) {
    const Floats poison(count, kPoison);
    TM_RUN(device, copy_in, data(), poison.data(), count * sizeof(float));
  }
  float* data() const { return static_cast<float*>(memory_.data()); }
  Floats read() const {
    Floats values(count_);
    TM_RUN(device_, copy_out, values.data(), data(), count_ * sizeof(float));
    return values;
  }

 private:
  const Device& device_;
  size_t count_;
  DeviceBytes memory_;
};

struct AdapterGradsCase {
  TmGroupShape shape;
  size_t n, gap;  // elements behind each row
};

// sum over tokens of a[i, column] b[i, column], strides of the rows
struct GradOperand {
  const Floats& rows;
  size_t stride, column;
  float at(size_t i) const { return rows[i * stride + column]; }
};
inline Chain summed(const GradOperand& a, const GradOperand& b, size_t n) {
  Chain sum;
  for (size_t i = 0; i < n; ++i) sum.add(1, a.at(i), b.at(i));
  return sum;
}

inline void test_adapter_grads(const Device& device, const AdapterGradsCase& made, uint64_t seed) {
  Random random(seed);
  const TmGroupShape& shape = made.shape;
  size_t out = 0, ranks = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    out += shape.out[part];
    ranks += shape.is_adapted[part] ? shape.rank : 0;
  }
  const size_t n = made.n, x_stride = shape.in + made.gap, tail_stride = ranks + made.gap;
  const size_t dy_stride = out + ranks + made.gap;
  const Elements x(device, poisoned_rows(random, n, shape.in, x_stride));
  const Elements tail(device, poisoned_rows(random, n, ranks, tail_stride));
  const Elements dy(device, poisoned_rows(random, n, out + ranks, dy_stride));
  TmGroupAdapterGrads call = {
      &shape, x.data(), x_stride, tail.data(), tail_stride, dy.data(), dy_stride, {}, {}, n, 0};
  std::vector<std::unique_ptr<DeviceFloats>> a_grads(shape.num_parts), b_grads(shape.num_parts);
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (!shape.is_adapted[part]) continue;
    a_grads[part] = std::make_unique<DeviceFloats>(device, shape.rank * shape.in);
    b_grads[part] = std::make_unique<DeviceFloats>(device, shape.rank * shape.out[part]);
    call.lora_a[part] = a_grads[part]->data();
    call.lora_b[part] = b_grads[part]->data();
  }
  TM_RUN(device, group_adapter_grads, &call);
  const Floats xs = x.read(), tails = tail.read(), dys = dy.read();
  Closeness close_a(false), close_b(false);
  std::vector<Floats> first;
  for (size_t part = 0, column = 0, rank = 0; part < shape.num_parts; column += shape.out[part++]) {
    if (!shape.is_adapted[part]) continue;
    const Floats a = a_grads[part]->read(), b = b_grads[part]->read();
    for (size_t k = 0; k < shape.rank; ++k, ++rank) {
      for (size_t o = 0; o < shape.out[part]; ++o) {
        close_b.add(b[o * shape.rank + k],
                    summed({dys, dy_stride, column + o}, {tails, tail_stride, rank}, n));
      }
      for (size_t j = 0; j < shape.in; ++j) {
        close_a.add(a[k * shape.in + j],
                    summed({dys, dy_stride, out + rank}, {xs, x_stride, j}, n));
      }
    }
    first.push_back(a);
    first.push_back(b);
  }
  const std::string name = std::string(device.ops().name) +
                           (device.element_bytes() == 2 ? " bf16" : "") + " adapter grads n " +
                           std::to_string(n) + " in " + std::to_string(shape.in) + " out " +
                           std::to_string(out) + " rank " + std::to_string(shape.rank);
  close_a.check(name + ": A");
  close_b.check(name + ": B");
  TM_RUN(device, group_adapter_grads, &call);
  std::vector<Floats> again;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (!shape.is_adapted[part]) continue;
    again.push_back(a_grads[part]->read());
    again.push_back(b_grads[part]->read());
  }
  CHECK(again == first, name + ": other values in a second run");
  // Added to itself: twice the sum, which rounds nothing.
  call.accumulate = 1;
  TM_RUN(device, group_adapter_grads, &call);
  size_t next = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (!shape.is_adapted[part]) continue;
    for (const DeviceFloats* grad : {a_grads[part].get(), b_grads[part].get()}) {
      Floats twice = first[next++];
      for (float& value : twice) value *= 2;
      CHECK(grad->read() == twice, name + ": not added");
    }
  }
}

inline void test_adapter_grads(const Device& device) {
  const AdapterGradsCase cases[] = {
      {{24, 3, {12, 6, 6}, {1, 1, 1}, 4, 0, 0}, 9, 3},
      {{31, 2, {45, 45}, {0, 1, 0}, 7, 0, 0}, 5, 2},
      {{37, 1, {29}, {1, 0, 0}, 3, 0, 0}, 1, 1},
      // What the card's own kernel takes: multiples of 8.
      {{64, 3, {64, 32, 32}, {1, 1, 1}, 8, 0, 0}, 70, 8},
      {{136, 3, {200, 72, 72}, {1, 0, 1}, 16, 0, 0}, 33, 0},
      {{128, 2, {160, 160}, {1, 1, 0}, 16, 0, 0}, 700, 16},
      {{72, 1, {264}, {1, 0, 0}, 64, 0, 0}, 129, 0},
      {{264, 2, {136, 136}, {1, 1, 0}, 40, 0, 0}, 400, 24},
      {{256, 1, {128}, {1, 0, 0}, 136, 0, 0}, 1, 8},
      {{128, 3, {128, 8, 8}, {0, 1, 1}, 24, 0, 0}, 1000, 0},
  };
  uint64_t seed = 90;
  for (const AdapterGradsCase& made : cases) test_adapter_grads(device, made, seed++);
}

}  // namespace tunemesh::test
