// Times what adapters cost beside their linears: gradients and tails of linear groups.
#pragma once
#include "bench/native/cuda_bench.h"

namespace tunemesh::bench {

struct AdaptedGroup {
  const char* name;
  size_t n;
  TmGroupShape shape;
};

// Rank 16; beside them what cuBLASLt takes for the same matrices one by one.
inline void time_adapters(Bench& b, const AdaptedGroup& group) {
  constexpr size_t kBorder = 64;
  const TmGroupShape& shape = group.shape;
  TmGroupAdapterGrads call = {};
  size_t out = 0, ranks = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    out += shape.out[part];
    ranks += shape.rank;
    call.lora_a[part] = b.floats(shape.rank * shape.in);
    call.lora_b[part] = b.floats(shape.rank * shape.out[part]);
  }
  call.shape = &shape;
  call.n = group.n;
  call.x_stride = shape.in + kBorder;
  call.x = b.elements(group.n * call.x_stride);
  call.x_tail_stride = kBorder;
  call.x_tail = b.elements(group.n * kBorder);
  call.dy_stride = out + kBorder;
  TmElement* const dy = b.elements(group.n * call.dy_stride);
  call.dy = dy;
  const double bytes =
      double(group.n) * double(shape.in + out + 2 * ranks) * double(b.element_bytes());
  const std::string name = std::string("adapters of ") + group.name;
  b.memory_bound(name, bytes, [&] { return b.ops().group_adapter_grads(b.context(), &call); });
  const auto at = [&](size_t column) {
    return reinterpret_cast<TmElement*>(reinterpret_cast<char*>(dy) + column * b.element_bytes());
  };
  b.memory_bound(name + ", products", bytes, [&] {
    TmLinearWeightGrad grad = {
        at(out), call.dy_stride, call.x, call.x_stride, call.lora_a[0], group.n, ranks, shape.in,
        0,       1.0f,           0};
    TmStatus status = shape.num_parts == 1 ? b.ops().linear_weight_grad(b.context(), &grad) : TM_OK;
    for (size_t part = 0, column = 0; part < shape.num_parts; column += shape.out[part++]) {
      grad = {at(column),
              call.dy_stride,
              call.x_tail,
              call.x_tail_stride,
              call.lora_b[part],
              group.n,
              shape.out[part],
              shape.rank,
              0,
              1.0f,
              0};
      if (status == TM_OK) status = b.ops().linear_weight_grad(b.context(), &grad);
      if (shape.num_parts == 1) continue;
      grad = {at(out + part * shape.rank),
              call.dy_stride,
              call.x,
              call.x_stride,
              call.lora_a[part],
              group.n,
              shape.rank,
              shape.in,
              0,
              1.0f,
              0};
      if (status == TM_OK) status = b.ops().linear_weight_grad(b.context(), &grad);
    }
    return status;
  });
  b.release_all();
}

// A group's tail: 64 columns by the plugin's kernel, 72 by cuBLASLt.
inline void time_tails(Bench& b) {
  const struct {
    const char* name;
    size_t n, k;
    bool is_forward;
  } tails[] = {{"8B qkv forward", kTokens, 4096, true},
               {"8B down forward", kTokens, 14336, true},
               {"8B gate, up backward", kTokens, 28672, false},
               {"135M qkv forward", 4096, 576, true},
               {"135M gate, up backward", 4096, 3072, false}};
  for (const auto& tail : tails) {
    for (const size_t m : {size_t{64}, size_t{72}}) {
      const size_t out = tail.is_forward ? m : tail.k, in = tail.is_forward ? tail.k : m;
      TmElement *x = b.elements(tail.n * in), *y = b.elements(tail.n * out);
      const TmLinear call = {x, in,  {nullptr, b.elements(out * in), out, in}, y, out, tail.n,
                             0, 0.5f};
      const double bytes = double(tail.n) * double(tail.k + m) * double(b.element_bytes());
      b.memory_bound(std::string("tail ") + tail.name + " " + std::to_string(m), bytes, [&] {
        return tail.is_forward ? b.ops().linear_forward(b.context(), &call)
                               : b.ops().linear_backward_input(b.context(), &call);
      });
      b.release_all();
    }
  }
}

inline void time_all_adapters(Bench& b) {
  const AdaptedGroup groups[] = {
      {"8B qkv", kTokens, {4096, 3, {4096, 1024, 1024}, {1, 1, 1}, 16, 0, 0}},
      {"8B o", kTokens, {4096, 1, {4096}, {1, 0, 0}, 16, 0, 0}},
      {"8B gate, up", kTokens, {4096, 2, {14336, 14336}, {1, 1, 0}, 16, 0, 0}},
      {"8B down", kTokens, {14336, 1, {4096}, {1, 0, 0}, 16, 0, 0}},
      {"135M qkv", 4096, {576, 3, {576, 192, 192}, {1, 1, 1}, 16, 0, 0}},
      {"135M gate, up", 4096, {576, 2, {1536, 1536}, {1, 1, 0}, 16, 0, 0}},
      {"135M down", 4096, {1536, 1, {576}, {1, 0, 0}, 16, 0, 0}},
  };
  for (const AdaptedGroup& group : groups) time_adapters(b, group);
}

}  // namespace tunemesh::bench
