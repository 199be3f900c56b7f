// A linear group with seeded operands on a device: its operations, and what they should give by
// sums in double over the very elements that the device holds.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "engine/device.h"
#include "engine_case.h"
#include "test_check.h"

namespace tunemesh::test {

using Floats = std::vector<float>;
constexpr float kPoison = NAN;

inline float rounded_to_bf16(double value) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

// Memory of a device, or of the host where the device computes there.
class DeviceBytes {
 public:
  DeviceBytes(const Device& device, size_t bytes) : device_(device) {
    TM_RUN(device, allocate, bytes + 64, &data_);
    TM_RUN(device, fill_zero, data_, bytes + 64);
  }
  ~DeviceBytes() { device_.ops().release(device_.context(), data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  void* data() const { return data_; }

 private:
  const Device& device_;
  void* data_ = nullptr;
};

// A matrix of elements in rows of `stride`.
class Elements {
 public:
  Elements(const Device& device, const Floats& values)
      : device_(device), count_(values.size()), memory_(device, count_ * device.element_bytes()) {
    write(values);
  }
  TmElement* data() const { return static_cast<TmElement*>(memory_.data()); }
  // pack_weight() rounds a device's elements; the host's are floats as they are.
  void write(const Floats& values) {
    if (device_.is_host()) {
      std::memcpy(memory_.data(), values.data(), count_ * sizeof(float));
    } else {
      TM_RUN(device_, pack_weight, values.data(), 1, count_, data());
    }
  }
  Floats read() const {
    Floats values(count_);
    if (device_.is_host()) {
      std::memcpy(values.data(), memory_.data(), count_ * sizeof(float));
    } else {
      TM_RUN(device_, read_elements, values.data(), data(), count_);
    }
    return values;
  }

 private:
  const Device& device_;
  size_t count_;
  DeviceBytes memory_;
};

struct GroupCase {
  TmGroupShape shape;
  size_t n, gap;      // elements behind a row's border that nobody may touch
  bool has_residual;  // of groups of one part
  bool is_apart;      // each part's y in a matrix of its own
};

struct GroupValues {
  Floats weight, bias, lora_a, lora_b;  // of one part
};

inline Floats normals(Random& random, size_t count, double scale) {
  Floats values(count);
  for (float& value : values) value = static_cast<float>(random.symmetric(scale));
  return values;
}

// The parts' values, rounded to the device's elements: what the packed group should hold.
inline std::vector<GroupValues> group_values(const Device& device, const GroupCase& made,
                                             Random& random) {
  std::vector<GroupValues> parts;
  for (size_t part = 0; part < made.shape.num_parts; ++part) {
    const size_t out = made.shape.out[part];
    const size_t rank = made.shape.is_adapted[part] ? made.shape.rank : 0;
    GroupValues values = {normals(random, out * made.shape.in, 0.3),
                          normals(random, made.shape.has_bias ? out : 0, 1),
                          normals(random, rank * made.shape.in, 0.3),
                          normals(random, out * rank, 0.5)};
    if (device.element_bytes() == 2) {
      for (Floats* each : {&values.weight, &values.bias, &values.lora_a, &values.lora_b}) {
        for (float& value : *each) value = rounded_to_bf16(value);
      }
    }
    parts.push_back(std::move(values));
  }
  return parts;
}

// Base from the host (part by part, or where it is fp8 all at once), adapters (or in a second run
// everything) from the device's floats.
class PackedGroup {
 public:
  PackedGroup(const Device& device, const TmGroupShape& shape,
              const std::vector<GroupValues>& parts)
      : device_(device),
        shape_(shape),
        memory_(device, device.ops().group_packed_elements(&shape) * device.element_bytes()) {
    TmGroupPack base = {};
    base.shape = &shape_;
    base.packed = packed();
    for (size_t part = 0; part < shape.num_parts; ++part) {
      base.weight[part] = parts[part].weight.data();
      base.bias[part] = shape.has_bias ? parts[part].bias.data() : nullptr;
      if (shape.is_fp8 && part + 1 < shape.num_parts) continue;
      TM_RUN(device, pack_group_base, &base);
      base.weight[part] = base.bias[part] = nullptr;
    }
    TmGroupPack trained = {};
    trained.shape = &shape_;
    trained.packed = packed();
    for (size_t part = 0; part < shape.num_parts; ++part) {
      if (!shape.is_adapted[part]) continue;
      trained.lora_a[part] = on_device(parts[part].lora_a);
      trained.lora_b[part] = on_device(parts[part].lora_b);
    }
    TM_RUN(device, pack_group_trained, &trained);
  }
  TmElement* packed() const { return static_cast<TmElement*>(memory_.data()); }
  // Everything anew from the device, as after an update of a full fine-tuning.
  void pack_all(const std::vector<GroupValues>& parts) {
    TmGroupPack trained = {};
    trained.shape = &shape_;
    trained.packed = packed();
    for (size_t part = 0; part < shape_.num_parts; ++part) {
      trained.weight[part] = on_device(parts[part].weight);
      trained.bias[part] = shape_.has_bias ? on_device(parts[part].bias) : nullptr;
    }
    TM_RUN(device_, pack_group_trained, &trained);
  }

 private:
  const float* on_device(const Floats& values) {
    floats_.push_back(std::make_unique<DeviceBytes>(device_, values.size() * sizeof(float)));
    TM_RUN(device_, copy_in, floats_.back()->data(), values.data(), values.size() * sizeof(float));
    return static_cast<const float*>(floats_.back()->data());
  }

  const Device& device_;
  const TmGroupShape& shape_;
  DeviceBytes memory_;
  std::vector<std::unique_ptr<DeviceBytes>> floats_;
};

inline size_t out_width(const TmGroupShape& shape) {
  size_t width = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) width += shape.out[part];
  return width;
}

// A sum of products in double, and as straightforward float code makes it: products rounded first,
// or fused into the sum.
struct Chain {
  double exact = 0;
  float plain = 0, fused = 0;
  void add(double factor, float a, float b) {
    const float scaled = static_cast<float>(factor) * a;
    exact += factor * a * b;
    plain += scaled * b;
    fused = std::fma(scaled, b, fused);
  }
  void add(float value) {
    exact += value;
    plain += value;
    fused += value;
  }
};

// How far results are from exact sums, and how far straightforward code would be: float chains
// where elements are floats, else exact sums rounded once. Of the two chains the worse counts: one
// alone may be exact by luck where results are few (the tail of one token at rank 3: rounded
// products are 1.4e-7 off, fused ones 2.4e-7, an H100's kernel 4.6e-7).
class Closeness {
 public:
  explicit Closeness(bool is_bf16) : is_bf16_(is_bf16) {}
  void add(float got, const Chain& sum) {
    const auto square = [&](double value) { return (value - sum.exact) * (value - sum.exact); };
    error_ += square(got);
    plain_ += square(is_bf16_ ? rounded_to_bf16(sum.exact) : sum.plain);
    fused_ += is_bf16_ ? 0 : square(sum.fused);
    norm_ += sum.exact * sum.exact;
    if (std::isnan(got)) error_ = INFINITY;
  }
  // Half a unit of float32 is allowed where straightforward code happens to be exact.
  // `allowed` besides: what the operation itself keeps, relative to the norm.
  void check(const std::string& what, double allowed = 0) const {
    const double norm = std::sqrt(norm_) + 1e-30;
    const double reached = std::sqrt(std::fmax(plain_, fused_)) / norm;
    CHECK_BELOW(std::sqrt(error_) / norm, 2 * reached + 6e-8 + allowed, what);
  }

 private:
  bool is_bf16_;
  double error_ = 0, plain_ = 0, fused_ = 0, norm_ = 0;
};

}  // namespace tunemesh::test
