// Times AdamW of one large matrix: float32 states, bf16 ones, and moments in 8 bits.
#pragma once
#include <algorithm>
#include <vector>

#include "bench/native/cuda_bench.h"

namespace tunemesh::bench {

// Device memory with numbers up to `largest`, of either sign or not.
class UpdateMemory {
 public:
  explicit UpdateMemory(Bench& bench) : bench_(bench) {}

  void* half(size_t count, float largest, bool is_positive) {
    return filled<uint16_t>(count, largest, is_positive);
  }
  float* floats(size_t count, float largest, bool is_positive) {
    return static_cast<float*>(filled<uint32_t>(count, largest, is_positive));
  }
  uint8_t* exponents(size_t count, uint8_t exponent) {
    const std::vector<uint8_t> values(count, exponent);
    void* const memory = bench_.memory(count);
    bench_.check(bench_.ops().copy_in(bench_.context(), memory, values.data(), count));
    return static_cast<uint8_t*>(memory);
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

struct UpdateKind {
  const char* name;
  bool is_half, is_half_gradient, has_bytes;
  double bytes;  // an element
};

inline void time_update(Bench& b, const UpdateKind& kind) {
  constexpr size_t kColumns = 4096, kRows = 65536, kCount = kRows * kColumns;
  UpdateMemory memory(b);
  TmTrainedTensor tensor = {};
  const auto state = [&](float largest, bool is_positive) -> void* {
    if (kind.is_half) return memory.half(kCount, largest, is_positive);
    return memory.floats(kCount, largest, is_positive);
  };
  tensor.p = state(0.05f, false);
  if (kind.has_bytes) {  // any codes
    tensor.m = b.memory(kCount);
    tensor.v = b.memory(kCount);
    tensor.m_exponents = memory.exponents(kCount / 256, 113);  // 1e-4
    tensor.v_exponents = memory.exponents(kCount / 256, 100);  // 1e-8
  } else {
    tensor.m = state(1e-4f, false);
    tensor.v = state(1e-8f, true);
  }
  tensor.n = kCount;
  tensor.columns = tensor.p_stride = kColumns;
  tensor.decays = 1;
  tensor.is_half = kind.is_half;
  tensor.is_half_gradient = kind.is_half_gradient;
  auto* const table = static_cast<TmTrainedTensor*>(b.memory(sizeof tensor));
  b.check(b.ops().copy_in(b.context(), table, &tensor, sizeof tensor));
  TmAdamW call = {};
  call.tensors = table;
  call.host_tensors = &tensor;
  call.num_tensors = 1;
  call.num_blocks = kCount / 256;
  if (kind.is_half_gradient) {
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
  b.memory_bound(kind.name, double(kCount) * kind.bytes, [&] {
    ++call.step;
    return b.ops().adamw(b.context(), &call);
  });
  b.release_all();
}

inline void time_adamw(Bench& b) {
  time_update(b, {"adamw, float32 states", false, false, false, 28});
  time_update(b, {"adamw, bf16 states", true, false, false, 16});
  time_update(b, {"adamw, bf16 states and gradient", true, true, false, 14});
  time_update(b, {"adamw, 8-bit moments", true, false, true, 12});
  time_update(b, {"adamw, 8-bit moments, bf16 gradient", true, true, true, 10});
}

}  // namespace tunemesh::bench
