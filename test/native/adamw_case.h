// Trained tensors of a small model with everything that an update meets, on the host: odd shapes,
// states of floats and of bf16, rows with gaps, copies, gradients of both types; and an update of
// one vector of floats.
#pragma once
#include <bit>
#include <memory>

#include "op_layer_cases.h"

namespace tunemesh {

// AdamW of one vector without copy; `decays` as a matrix.
struct VectorUpdate {
  TmTrainedTensor tensor = {};
  TmAdamW call = {};

  VectorUpdate(Outputs& state, const Floats& gradient) {
    tensor.p = state[0].data();
    tensor.m = state[1].data();
    tensor.v = state[2].data();
    tensor.n = tensor.columns = tensor.p_stride = state[0].size();
    tensor.decays = 1;
    call.tensors = call.host_tensors = &tensor;
    call.num_tensors = 1;
    call.num_blocks = (tensor.n + 255) / 256;
    call.gradient = gradient.data();
    call.beta1 = 0.9;
    call.beta2 = 0.999;
    call.epsilon = 1e-8f;
  }
  VectorUpdate(const VectorUpdate&) = delete;
  VectorUpdate& operator=(const VectorUpdate&) = delete;
};

struct TensorShape {
  size_t rows, columns, p_gap, copy_gap;  // copy_gap kNoCopy: none
  bool is_half, is_half_gradient;
  bool has_byte_moments = false;
};
constexpr size_t kNoCopy = ~size_t{0};

// Gaps are poisoned: nobody may touch them.
class UpdateCase {
 public:
  explicit UpdateCase(const std::vector<TensorShape>& shapes, uint64_t seed = 11) : random_(seed) {
    for (const TensorShape& shape : shapes) add(shape);
    gradient_.resize(num_blocks_ * 256);
    half_gradient_.resize(num_blocks_ * 256);
    for (float& value : gradient_) value = random_.normal(1e-3);
    for (size_t i = 0; i < gradient_.size(); i += 5) gradient_[i] *= 1e-36f;
    for (size_t i = 3; i < gradient_.size(); i += 7) gradient_[i] = 0;
    for (size_t i = 0; i < gradient_.size(); ++i) half_gradient_[i] = to_bf16(gradient_[i]);
  }
  UpdateCase(const UpdateCase&) = delete;
  UpdateCase& operator=(const UpdateCase&) = delete;

  TmAdamW call(uint32_t step, float weight_decay) const {
    TmAdamW args = {};
    args.tensors = args.host_tensors = tensors_.data();
    args.num_tensors = tensors_.size();
    args.num_blocks = num_blocks_;
    args.gradient = gradient_.data();
    args.half_gradient = half_gradient_.data();
    args.learning_rate = 3e-4f;
    args.clip_factor = 0.73f;
    args.bias_correction1 = 0.271f;
    args.bias_correction2_sqrt = 0.0547f;
    args.beta1 = 0.9;
    args.beta2 = 0.999;
    args.epsilon = 1e-8f;
    args.weight_decay = weight_decay;
    args.seed = 0x123456789abcdef0;
    args.step = step;
    return args;
  }
  // Of half states and gradients: every fourth run of 64 gets magnitudes from 1e-38 to 1e18, every
  // fourth is zero, the others stay as a training has them.
  void spread_magnitudes() {
    const auto spread = [this](uint16_t& half, size_t i) {
      if (i / 64 % 4 == 1) half = half & 0x8000;
      if (i / 64 % 4 != 3) return;
      half = static_cast<uint16_t>(half & 0x807f) | static_cast<uint16_t>(random_.next() % 186 + 1)
                                                        << 7;
    };
    for (auto& memory : memory_) {
      if (tensors_.front().m_exponents != nullptr && memory != memory_.front()) continue;  // bytes
      auto* const halves = reinterpret_cast<uint16_t*>(memory->data());
      for (size_t i = 0; i < memory->size() / 2; ++i) spread(halves[i], i);
    }
    for (size_t i = 0; i < half_gradient_.size(); ++i) {
      spread(half_gradient_[i], i);
      gradient_[i] = std::bit_cast<float>(uint32_t{half_gradient_[i]} << 16);
    }
  }
  // Every buffer that an update may write, byte by byte.
  std::vector<std::vector<char>> bytes() const {
    std::vector<std::vector<char>> all;
    for (const auto& memory : memory_) all.push_back(*memory);
    return all;
  }
  // As a device of bf16 elements leaves the copies.
  void round_copies() {
    for (const size_t index : copies_) {
      auto* const values = reinterpret_cast<float*>(memory_[index]->data());
      const size_t count = memory_[index]->size() / sizeof(float);
      for (size_t i = 0; i < count; ++i) values[i] = rounded_to_bf16(values[i]);
    }
  }

 private:
  // Values of a matrix in rows with gaps, in memory of its own.
  void* take(size_t rows, size_t columns, size_t gap, bool is_half, double deviation) {
    const size_t stride = columns + gap, bytes = is_half ? 2 : 4;
    auto memory = std::make_unique<std::vector<char>>(rows * stride * bytes);
    for (size_t i = 0; i < rows * stride; ++i) {
      float value = i % stride >= columns ? kPoison : random_.normal(deviation);
      if (deviation < 1e-4) value = fabsf(value);
      if (i % 7 == 3 && deviation < 1) value *= 1e-37f;
      const uint16_t half = to_bf16(value);
      memcpy(memory->data() + i * bytes, is_half ? static_cast<const void*>(&half) : &value, bytes);
    }
    memory_.push_back(std::move(memory));
    return memory_.back()->data();
  }
  // Any codes and exponents of blocks with magnitudes as in training.
  void take_byte_moments(TmTrainedTensor& tensor, size_t n) {
    const auto bytes = [this](size_t count, uint32_t low, uint32_t high) {
      memory_.push_back(std::make_unique<std::vector<char>>(count));
      for (char& byte : *memory_.back()) {
        byte = static_cast<char>(low + random_.next() % (high - low + 1));
      }
      return reinterpret_cast<uint8_t*>(memory_.back()->data());
    };
    const size_t num_blocks = (n + 255) / 256;
    tensor.m = bytes(n, 0, 255);
    tensor.v = bytes(n, 0, 255);
    tensor.m_exponents = bytes(num_blocks, 100, 120);
    tensor.v_exponents = bytes(num_blocks, 80, 110);
    tensor.m_exponents[0] = tensor.v_exponents[0] = 34;
  }
  void add(const TensorShape& shape) {
    TmTrainedTensor tensor = {};
    const auto [rows, columns, p_gap, copy_gap, is_half, is_half_gradient, has_bytes] = shape;
    tensor.p = take(rows, columns, p_gap, is_half, 1);
    if (has_bytes) {
      take_byte_moments(tensor, rows * columns);
    } else {
      tensor.m = take(1, rows * columns, 0, is_half, 1e-3);
      tensor.v = take(1, rows * columns, 0, is_half, 1e-6);
    }
    if (copy_gap != kNoCopy) {
      copies_.push_back(memory_.size());
      tensor.copy = reinterpret_cast<TmElement*>(take(rows, columns, copy_gap, false, 1));
      tensor.copy_stride = columns + copy_gap;
    }
    tensor.n = rows * columns;
    tensor.columns = columns;
    tensor.p_stride = columns + p_gap;
    tensor.first_block = num_blocks_;
    tensor.gradient_offset = num_blocks_ * 256;
    tensor.is_half = is_half;
    tensor.is_half_gradient = is_half_gradient;
    tensor.decays = rows > 1;
    tensors_.push_back(tensor);
    num_blocks_ += (tensor.n + 255) / 256;
  }

  Random random_;
  std::vector<std::unique_ptr<std::vector<char>>> memory_;
  std::vector<size_t> copies_;
  std::vector<TmTrainedTensor> tensors_;
  Floats gradient_;
  std::vector<uint16_t> half_gradient_;
  size_t num_blocks_ = 0;
};

inline const std::vector<TensorShape>& update_shapes() {
  static const std::vector<TensorShape> shapes = {
      {1, 257, 0, kNoCopy, false, false},
      {3, 1, 0, 0, false, false},
      {1, 1, 0, kNoCopy, true, true},
      {64, 96, 0, 32, false, false},
      {33, 31, 0, 7, false, false},
      {33, 31, 5, kNoCopy, true, true},
      {64, 96, 0, kNoCopy, true, true},
      {40, 64, 64, kNoCopy, true, false},
      {1, 640, 0, 0, false, false},
      {129, 515, 0, 0, true, false},
      {1, 255, 0, kNoCopy, false, false},
      {300, 16, 0, 48, false, false},
      {16, 1000, 0, 24, false, false},
      {257, 264, 8, 0, true, true},
      {33, 31, 5, kNoCopy, true, true, true},
      {64, 96, 0, kNoCopy, true, true, true},
      {40, 64, 64, kNoCopy, true, false, true},
      {129, 515, 0, 0, true, false, true},
  };
  return shapes;
}

}  // namespace tunemesh
