// Sustained rates of the matrix products of a model's layers, through the backend's own products.
#pragma once
#include <vector>

#include "bench/native/bench_model.h"
#include "bench/native/timed_backend.h"

namespace tunemesh::bench {

struct ProductCeiling {
  size_t n, in, out;
  double flops_per_second;
};

inline void wait_for(const Device& device) {
  device.check(device.ops().synchronize(device.context()), "synchronize");
}

// The operands are random numbers: zeros draw less power, and the card would run faster.
class RandomProduct {
 public:
  RandomProduct(const Device& device, const ProductCeiling& size)
      : device_(device), size_(size), arena_(device) {
    take_all();
    arena_.allocate();
    take_all();
    arena_.seal();
    fill(x_, size.n);
    fill(weight_, size.out);
  }

  double rate(double warm_seconds, double seconds) {
    repeat(warm_seconds);
    const auto start = Clock::now();
    const size_t rounds = repeat(seconds);
    const double flops = 2.0 * static_cast<double>(size_.n) * static_cast<double>(size_.in) *
                         static_cast<double>(size_.out);
    return flops * static_cast<double>(rounds) / seconds_since(start);
  }

 private:
  void take_all() {
    x_ = arena_.take_elements("ceiling", packed(size_.n));
    weight_ = arena_.take_elements("ceiling", packed(size_.out));
    y_ = arena_.take_elements("ceiling", size_.n * size_.out);
  }
  size_t packed(size_t rows) const { return device_.ops().packed_weight_elements(rows, size_.in); }
  void fill(TmElement* matrix, size_t rows) const {
    std::vector<float> values(rows * size_.in);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(static_cast<uint32_t>(i * 2654435761u) >> 8) * 0x1p-24f - 0.5f;
    }
    TM_RUN(device_, pack_weight, values.data(), rows, size_.in, matrix);
  }
  // Four products between waits; answers how many ran.
  size_t repeat(double seconds) const {
    TmLinear call = {};
    call.x = x_;
    call.x_stride = size_.in;
    call.w = {nullptr, weight_, size_.out, size_.in};
    call.y = y_;
    call.y_stride = size_.out;
    call.n = size_.n;
    call.alpha = 1;
    const auto start = Clock::now();
    size_t rounds = 0;
    do {
      for (int i = 0; i < 4; ++i) TM_RUN(device_, linear_forward, &call);
      wait_for(device_);
      rounds += 4;
    } while (seconds_since(start) < seconds);
    return rounds;
  }

  const Device& device_;
  const ProductCeiling size_;
  Arena arena_;
  TmElement *x_ = nullptr, *weight_ = nullptr, *y_ = nullptr;
};

// The shapes of one layer: query with keys and values, output, gate with up, down. The first comes
// after two seconds of uninterrupted products, which bring a card to its power limit.
inline std::vector<ProductCeiling> product_ceilings(const Device& device, const ModelConfig& config,
                                                    size_t num_tokens) {
  const size_t hidden = config.hidden_size, wide = config.intermediate_size;
  std::vector<ProductCeiling> products = {
      {num_tokens, hidden, config.query_width() + 2 * config.kv_width(), 0},
      {num_tokens, config.query_width(), hidden, 0},
      {num_tokens, hidden, 2 * wide, 0},
      {num_tokens, wide, hidden, 0}};
  double warm = 2;
  for (ProductCeiling& product : products) {
    product.flops_per_second = RandomProduct(device, product).rate(warm, 0.3);
    warm = 0.3;
  }
  return products;
}

}  // namespace tunemesh::bench
