// Cases for the matrix products, for backends that do not promise one fma chain an element (the
// CPU's are compared to the bit in gemm_test.cc).
#pragma once
#include <type_traits>
#include <vector>

#include "op_layer_cases.h"

namespace tunemesh {

enum class Product { kForward, kBackwardInput, kWeightGrad };

struct LinearShape {
  Product product;
  size_t n, in, out;
  float alpha;
  bool accumulate;
  size_t gap;
  bool packed;              // the weight comes from pack_weight
  bool is_element = false;  // of a weight's gradient: elements, not floats
};

// x [n, in], w [out, in], y [n, out]; the product's result is one of them.
struct LinearOperands {
  Matrix x, w, y;
};

inline Matrix& result_of(const LinearShape& s, LinearOperands& o) {
  return s.product == Product::kForward ? o.y : s.product == Product::kBackwardInput ? o.x : o.w;
}

inline Outputs linear_kernel(const Device& d, const LinearShape& s, LinearOperands o) {
  if (!s.accumulate) result_of(s, o) = poisoned(result_of(s, o));
  if (s.product == Product::kWeightGrad) {
    const TmLinearWeightGrad call = {o.y.values.data(),
                                     o.y.stride,
                                     o.x.values.data(),
                                     o.x.stride,
                                     o.w.values.data(),
                                     s.n,
                                     s.out,
                                     s.in,
                                     s.accumulate ? 1 : 0,
                                     s.alpha,
                                     s.is_element ? 1 : 0};
    require(d.backend->linear_weight_grad(d.context, &call), d);
    return {o.w.values};
  }
  Floats packed(d.backend->packed_weight_elements(s.out, s.in), kPoison);
  require(d.backend->pack_weight(d.context, o.w.values.data(), s.out, s.in, packed.data()), d);
  const TmWeight weight = {s.packed ? nullptr : o.w.values.data(),
                           s.packed ? packed.data() : nullptr, s.out, s.in};
  const TmLinear call = {o.x.values.data(),    o.x.stride, weight,
                         o.y.values.data(),    o.y.stride, s.n,
                         s.accumulate ? 1 : 0, s.alpha};
  const bool is_forward = s.product == Product::kForward;
  const auto run = is_forward ? d.backend->linear_forward : d.backend->linear_backward_input;
  require(run(d.context, &call), d);
  return {result_of(s, o).values};
}

// What tensor cores make of bf16 operands where the result is float: float sums cut toward zero
// after each 16 products (Hopper's inner size of one instruction), then scaled and added. Code that
// rounds to nearest is no yardstick for that: at 515 products an H100 is 4.7e-7 off, these sums
// 5.3e-7, sums to nearest 1.5e-7.
class TensorCoreSum {
 public:
  void add(double a, double b) {
    step_ += a * b;
    if (++count_ % 16 == 0) finish_step();
  }
  float finish() {
    finish_step();
    return sum_;
  }

 private:
  void finish_step() {
    const double exact = sum_ + step_;
    sum_ = static_cast<float>(exact);
    if (fabs(sum_) > fabs(exact)) sum_ = nextafterf(sum_, 0);
    step_ = 0;
  }

  float sum_ = 0;
  double step_ = 0;
  size_t count_ = 0;
};

inline Exact tensor_core_weight_grad(const LinearShape& s, const LinearOperands& o) {
  Floats dw = s.accumulate ? o.w.values : poisoned(o.w).values;
  for (size_t i = 0; i < s.out; ++i) {
    for (size_t j = 0; j < s.in; ++j) {
      TensorCoreSum sum;
      for (size_t k = 0; k < s.n; ++k) {
        sum.add(o.y.values[k * o.y.stride + i], o.x.values[k * o.x.stride + j]);
      }
      float& to = dw[i * o.w.stride + j];
      to = s.alpha * sum.finish() + (s.accumulate ? to : 0);
    }
  }
  return {exact(dw)};
}

template <typename Real>
inline Exact linear_reference(const LinearShape& s, LinearOperands o) {
  if (std::is_same_v<Real, float> && Random::rounds_to_bf16 && s.product == Product::kWeightGrad &&
      !s.is_element) {
    return tensor_core_weight_grad(s, o);
  }
  const auto x = as<Real>(o.x.values), w = as<Real>(o.w.values), y = as<Real>(o.y.values);
  Matrix& result = result_of(s, o);
  std::vector<Real> out = as<Real>(s.accumulate ? result.values : poisoned(result).values);
  const size_t depth = s.product == Product::kForward         ? s.in
                       : s.product == Product::kBackwardInput ? s.out
                                                              : s.n;
  for (size_t i = 0; i < result.rows; ++i) {
    for (size_t j = 0; j < result.columns; ++j) {
      Real sum = s.accumulate ? out[i * result.stride + j] : Real(0);
      for (size_t k = 0; k < depth; ++k) {
        const Real a = s.product == Product::kForward         ? x[i * o.x.stride + k]
                       : s.product == Product::kBackwardInput ? y[i * o.y.stride + k]
                                                              : y[k * o.y.stride + i];
        const Real b = s.product == Product::kForward         ? w[j * s.in + k]
                       : s.product == Product::kBackwardInput ? w[k * s.in + j]
                                                              : x[k * o.x.stride + j];
        sum += a * Real(s.alpha) * b;
      }
      out[i * result.stride + j] = sum;
    }
  }
  return {exact(out)};
}

inline OpCase linear_case(Random random, const LinearShape& s) {
  const LinearOperands operands = {random_matrix(random, s.n, s.in, s.gap),
                                   random_matrix(random, s.out, s.in),
                                   random_matrix(random, s.n, s.out, 2 * s.gap)};
  const char* const names[] = {"linear forward", "linear backward input", "linear weight grad"};
  return make_case(
      named(names[static_cast<int>(s.product)],
            {s.n, s.in, s.out, s.gap, s.accumulate, s.packed, s.is_element, size_t(s.alpha * 100)}),
      [=](const Device& d) { return linear_kernel(d, s, operands); },
      [=](auto real) { return linear_reference<decltype(real)>(s, operands); });
}

}  // namespace tunemesh
