// Times AdamW of one large matrix: bf16 states with gradients of both types, and float32 ones.
#pragma once
#include <algorithm>
#include <vector>

#include "bench/native/cuda_bench.h"

namespace tunemesh::bench {

// Of magnitudes as in training: weights 0.02, gradients 1e-4, moments after them. `deviation` is
// the largest magnitude; a part of rows has no gradient yet, as an embedding's.
class UpdateMemory {
 public:
  explicit UpdateMemory(Bench& bench) : bench_(bench) {}

  void* half(size_t count, float largest, bool is_positive) {
    return filled<uint16_t>(count, largest, is_positive);
  }
  float* floats(size_t count, float largest, bool is_positive) {
    return static_cast<float*>(filled<uint32_t>(count, largest, is_positive));
  }

 private:
  template <typename Bits>
  void* filled(size_t count, float largest, bool is_positive) {
    void* const memory = bench_.memory(count * sizeof(Bits));
    std::vector<Bits> part(std::min(count, size_t{1} << 22));
    uint32_t state = 7;
    for (Bits& value : part) {
      state = state * 1664525 + 1013904223;
      const float unit = static_cast<float>(state >> 8) * 0x1p-24f + 0x1p-24f;
      const float number = is_positive || state % 2 == 0 ? unit * largest : -unit * largest;
      uint32_t bits;
      memcpy(&bits, &number, sizeof bits);
      value = static_cast<Bits>(sizeof(Bits) == 2 ? bits >> 16 : bits);
    }
    for (size_t done = 0; done < count; done += part.size()) {
      const size_t bytes = std::min(part.size(), count - done) * sizeof(Bits);
      bench_.check(bench_.ops().copy_in(bench_.context(), static_cast<Bits*>(memory) + done,
                                        part.data(), bytes));
    }
    return memory;
  }

  Bench& bench_;
};

inline void time_adamw(Bench& b) {
  constexpr size_t kColumns = 4096, kRows = 65536, kCount = kRows * kColumns;
  for (const bool is_half : {true, false}) {
    UpdateMemory memory(b);
    TmTrainedTensor tensor = {};
    const auto state = [&](float largest, bool is_positive) -> void* {
      if (is_half) return memory.half(kCount, largest, is_positive);
      return memory.floats(kCount, largest, is_positive);
    };
    tensor.p = state(0.05f, false);
    tensor.m = state(1e-4f, false);
    tensor.v = state(1e-8f, true);
    tensor.n = kCount;
    tensor.columns = tensor.p_stride = kColumns;
    tensor.decays = 1;
    tensor.is_half = is_half;
    for (const bool is_half_gradient : {true, false}) {
      if (is_half_gradient && !is_half) continue;
      tensor.is_half_gradient = is_half_gradient;
      auto* const table = static_cast<TmTrainedTensor*>(b.memory(sizeof tensor));
      b.check(b.ops().copy_in(b.context(), table, &tensor, sizeof tensor));
      TmAdamW call = {};
      call.tensors = table;
      call.host_tensors = &tensor;
      call.num_tensors = 1;
      call.num_blocks = kCount / 256;
      if (is_half_gradient) {
        call.half_gradient = static_cast<uint16_t*>(memory.half(kCount, 1e-4f, false));
      } else {
        call.gradient = memory.floats(kCount, 1e-4f, false);
      }
      call.learning_rate = 1e-6f;
      call.clip_factor = 0.5f;
      call.bias_correction1 = 0.9f;
      call.bias_correction2_sqrt = 0.3f;
      call.beta1 = 0.9;
      call.beta2 = 0.999;
      call.epsilon = 1e-8f;
      call.weight_decay = 0.01f;
      const double bytes = double(kCount) * ((is_half ? 12 : 24) + (is_half_gradient ? 2 : 4));
      b.memory_bound(!is_half           ? "adamw, float32 states"
                     : is_half_gradient ? "adamw, bf16 states and gradient"
                                        : "adamw, bf16 states",
                     bytes, [&] {
                       ++call.step;
                       return b.ops().adamw(b.context(), &call);
                     });
    }
    b.release_all();
  }
}

}  // namespace tunemesh::bench
