#include "engine/product_rate.h"

#include <algorithm>
#include <chrono>

#include "engine/arena.h"

namespace tunemesh {
namespace {

constexpr size_t kMostExtent = 2048;
constexpr size_t kMostRows = 256;
constexpr double kSecondsEach = 0.02;
constexpr int kMostRounds = 1000;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Product {
  size_t n, out, in;
  double flops() const {
    return 2.0 * static_cast<double>(n) * static_cast<double>(out) * static_cast<double>(in);
  }
};

// Seconds of one product, once warm.
double time_product(const Device& device, const Product& product) {
  Arena arena(device);
  TmLinear call = {};
  TmElement* packed = nullptr;
  const auto take_all = [&] {
    call.x = arena.take_elements("measurement", product.n * product.in);
    call.y = arena.take_elements("measurement", product.n * product.out);
    packed = arena.take_elements("measurement",
                                 device.ops().packed_weight_elements(product.out, product.in));
  };
  take_all();
  arena.allocate();
  take_all();
  arena.seal();
  const std::vector<float> rows(product.out * product.in);
  TM_RUN(device, pack_weight, rows.data(), product.out, product.in, packed);
  call.w.packed = packed;
  call.w.out = product.out;
  call.w.in = product.in;
  call.x_stride = product.in;
  call.y_stride = product.out;
  call.n = product.n;
  call.alpha = 1;
  const auto run = [&] { TM_RUN(device, linear_forward, &call); };
  const auto wait = [&] {
    device.check(device.ops().synchronize(device.context()), "synchronize");
  };
  run();
  wait();
  const Clock::time_point start = Clock::now();
  int rounds = 0;
  do {
    run();
    wait();
  } while (++rounds < kMostRounds && seconds_since(start) < kSecondsEach);
  return seconds_since(start) / rounds;
}

}  // namespace

ProductRate measure_products(const Device& device, const ModelConfig& config, size_t num_tokens) {
  const Clock::time_point start = Clock::now();
  const size_t n = std::clamp<size_t>(num_tokens, 1, kMostRows);
  const auto cut = [](size_t extent) { return std::min(extent, kMostExtent); };
  // Each weighs as much as its work in the whole model.
  double flops = 0, seconds = 0;
  const auto add = [&](const Product& product, double times) {
    flops += times * product.flops();
    const Product cut_down = {n, cut(product.out), cut(product.in)};
    seconds += times * time_product(device, cut_down) * product.flops() / cut_down.flops();
  };
  for (const LinearShape& shape : linear_shapes(config)) {
    add({n, shape.out, shape.in}, static_cast<double>(config.num_layers));
  }
  add({n, config.vocab_size, config.hidden_size}, 1);
  return {flops / seconds, seconds_since(start)};
}

}  // namespace tunemesh
