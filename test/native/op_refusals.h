// What the CUDA backend refuses, its memory, and the packing of bf16 weights.
#pragma once
#include "op_layer_cases.h"
#include "staged_backend.h"

namespace tunemesh {

inline bool says(const Device& d, const char* part) {
  return strstr(d.backend->last_error(), part) != nullptr;
}

// What the device finds is told with a line, and the context goes on.
inline void refused_indices(const Device& d, Tally& tally) {
  Floats logits(40, 1.0f);
  logits[7] = kPoison;
  double losses[2] = {};
  int32_t targets[2] = {3, 4};
  TmCrossEntropy loss = {logits.data(), 20, targets, losses, 2, 20, 1.0f, 1};
  tally.check(
      d.backend->cross_entropy(d.context, &loss) == TM_OK && isnan(losses[0]) && !isnan(losses[1]),
      "cross entropy: a NaN logit gives a NaN loss in its row alone");
  targets[1] = 20;
  tally.check(d.backend->cross_entropy(d.context, &loss) == TM_BAD_ARGUMENT &&
                  says(d, "cross_entropy: index 20 at position 1 is not within [0, 20)"),
              "cross entropy: a target beyond the vocabulary is refused");
  const int32_t tokens[3] = {0, 5, -1};
  Floats rows(3 * 8, 1.0f), table(5 * 8, 2.0f);
  const TmWeight weight = {table.data(), nullptr, 5, 8};
  tally.check(d.backend->embedding_forward(d.context, tokens, 1, &weight, rows.data()) == TM_OK &&
                  rows[0] == 2.0f,
              "after a refusal the context goes on");
  tally.check(d.backend->embedding_backward_add(d.context, tokens, 2, rows.data(), 8, 5,
                                                table.data()) == TM_BAD_ARGUMENT &&
                  says(d, "scatter: index 5 at position 1 is not within [0, 5)"),
              "embedding: a token beyond the table is refused");
  tally.check(d.backend->gather_rows(d.context, table.data(), tokens + 2, 1, 8, rows.data()) ==
                      TM_BAD_ARGUMENT &&
                  says(d, "gather: index -1 at position 0"),
              "gather: a negative index is refused");
}

inline void refused_attention(const Device& d, Tally& tally) {
  Floats x(300 * 4, 0.5f), out(300 * 4), lse(16);
  int32_t starts[] = {0, 4, 4};
  TmAttention a = {x.data(), x.data(),   x.data(), 16,      16, 16,     out.data(),
                   16,       lse.data(), starts,   2,       4,  1,      1,
                   16,       0,          0.25f,    nullptr, 0,  starts, 0};
  tally.check(d.backend->attention_forward(d.context, &a) == TM_OK, "attention without scratch");
  a.n = 5;
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT &&
                  says(d, "documents span [0, 4), expected [0, 5)"),
              "attention: documents that do not end at n are refused");
  a.n = 4;
  starts[1] = 6;
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT &&
                  says(d, "document 1 starts at 6 and ends at 4"),
              "attention: a document that runs backwards is refused");
  a.head_size = 257;
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT && says(d, "257"),
              "attention: a head size without a kernel is refused");
  a.head_size = 16;
  a.num_kv_heads = 0;
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT,
              "attention: heads that do not divide are refused");
  TmDecodeAttention decode = {x.data(), x.data(), x.data(), 16, 16,    out.data(), 2,
                              2,        1,        1,        16, 0.25f, lse.data(), 16};
  tally.check(d.backend->decode_attention(d.context, &decode) == TM_BAD_ARGUMENT &&
                  says(d, "rows [2, 2) hold no key"),
              "decode attention: no keys are refused");
}

inline void refused_calls(const Device& d, Tally& tally) {
  TmLinear linear{};
  linear.x_stride = linear.y_stride = 8;
  linear.w.out = linear.w.in = 8;
  tally.check(d.backend->linear_forward(d.context, &linear) == TM_BAD_ARGUMENT,
              "a weight without data is refused");
  TmRope rope{};
  rope.head_size = 15;
  tally.check(d.backend->rope(d.context, &rope) == TM_BAD_ARGUMENT && says(d, "15 is odd"),
              "rope: an odd head size is refused");
  TmRoundAndAdd rounding{};
  rounding.significant_bits = 25;
  tally.check(d.backend->round_and_add(d.context, &rounding) == TM_BAD_ARGUMENT && says(d, "25"),
              "round_and_add: 25 bits are refused");
  TmContextOptions options{};
  TmContext* context = nullptr;
  tally.check(d.backend->create(&options, &context) == TM_BAD_ARGUMENT && context == nullptr,
              "options without a size are refused");
  options.size = sizeof options;
  options.precision = 3;
  tally.check(d.backend->create(&options, &context) == TM_BAD_ARGUMENT && says(d, "precision 3"),
              "an unknown precision is refused");
  options.precision = TM_FP32;
  options.device_index = 4096;
  tally.check(d.backend->create(&options, &context) == TM_BAD_ARGUMENT && says(d, "4096"),
              "a device that is not there is refused");
}

inline void check_memory(const Device& d, Tally& tally) {
  const TmBackend& cuda = *d.backend;
  void* memory = nullptr;
  tally.check(cuda.allocate(d.context, 100, &memory) == TM_OK, "allocate");
  char in[100], out[100];
  memset(in, 7, sizeof in);
  cuda.copy_in(d.context, memory, in, sizeof in);
  cuda.fill_zero(d.context, static_cast<char*>(memory) + 50, 50);
  cuda.copy_out(d.context, out, memory, sizeof out);
  tally.check(out[49] == 7 && out[50] == 0 && out[99] == 0, "copy in, fill with zeros, copy out");
  tally.check(cuda.synchronize(d.context) == TM_OK, "synchronize");
  cuda.release(d.context, memory);
  float dw[6] = {1, 2, 3, 4, 5, 6};
  TmLinearWeightGrad empty{};
  empty.dw = dw;
  empty.out = empty.dy_stride = 2;
  empty.in = empty.x_stride = 3;
  empty.alpha = 1.0f;
  tally.check(cuda.linear_weight_grad(d.context, &empty) == TM_OK && dw[0] == 0 && dw[5] == 0,
              "no tokens give a gradient of zero");
}

// A sanitizer tells CUDA's own refusal as an error.
inline void refused_memory(const Device& d, Tally& tally) {
  void* memory = nullptr;
  tally.check(d.backend->allocate(d.context, size_t{1} << 46, &memory) == TM_OUT_OF_MEMORY &&
                  memory == nullptr && says(d, "are free"),
              "an impossible size is refused with what is free");
}

// Every group of blocks as on the CPU, to the bit; the last group is not a whole one.
inline void compare_sum_squares(const Device& cuda, const Device& cpu, Tally& tally) {
  constexpr size_t kBlocks = 3 * TM_NORM_GROUP_BLOCKS + 5, kGroups = 4;
  std::vector<float> values(kBlocks * 256);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = std::sin(static_cast<float>(i)) * std::exp2(static_cast<float>(i % 41) - 20.0f);
  }
  double wanted[kGroups], found[kGroups];
  const TmSumSquares host = {values.data(), kBlocks, wanted, nullptr};
  tally.check(cpu.backend->sum_squares(cpu.context, &host) == TM_OK, "sum_squares on the CPU");
  const TmBackend& ops = *cuda.backend;
  void *in = nullptr, *out = nullptr;
  ops.allocate(cuda.context, values.size() * sizeof(float), &in);
  ops.allocate(cuda.context, sizeof found, &out);
  ops.copy_in(cuda.context, in, values.data(), values.size() * sizeof(float));
  const TmSumSquares device = {static_cast<float*>(in), kBlocks, static_cast<double*>(out),
                               nullptr};
  tally.check(ops.sum_squares(cuda.context, &device) == TM_OK, "sum_squares");
  ops.copy_out(cuda.context, found, out, sizeof found);
  ops.release(cuda.context, in);
  ops.release(cuda.context, out);
  tally.check(memcmp(wanted, found, sizeof found) == 0, "sums of squares equal the CPU's bits");
}

// Of bf16 values as of the floats that they are.
inline void compare_half_squares(const std::vector<Device>& devices, const Device& cpu,
                                 Tally& tally) {
  constexpr size_t kBlocks = TM_NORM_GROUP_BLOCKS + 3, kGroups = 2;
  std::vector<uint16_t> halves(kBlocks * 256);
  Floats floats(halves.size());
  for (size_t i = 0; i < halves.size(); ++i) {
    const auto place = static_cast<float>(i);
    halves[i] = to_bf16(std::sin(place) * std::exp2(static_cast<float>(i % 41) - 20.0f));
    floats[i] = from_bf16(halves[i]);
  }
  double wanted[kGroups];
  const TmSumSquares call = {floats.data(), kBlocks, wanted, nullptr};
  require(cpu.backend->sum_squares(cpu.context, &call), cpu);
  for (const Device& device : devices) {
    double found[kGroups];
    const TmBackend& ops = *device.backend;
    void *in = nullptr, *out = nullptr;
    require(ops.allocate(device.context, halves.size() * 2, &in), device);
    require(ops.allocate(device.context, sizeof found, &out), device);
    require(ops.copy_in(device.context, in, halves.data(), halves.size() * 2), device);
    const TmSumSquares half = {nullptr, kBlocks, static_cast<double*>(out),
                               static_cast<uint16_t*>(in)};
    require(ops.sum_squares(device.context, &half), device);
    require(ops.copy_out(device.context, found, out, sizeof found), device);
    ops.release(device.context, in);
    ops.release(device.context, out);
    tally.check(memcmp(wanted, found, sizeof found) == 0,
                "squares of bf16 values on " + device.name);
  }
}

// Floats of the host as elements of the device, longer than one piece of the way there and back,
// and trained rows packed where they lie.
inline void check_packing(const Device& d, Tally& tally) {
  const TmBackend& cuda = *staged_device;
  constexpr size_t kOut = 2049, kIn = 4099;
  Random random(17);
  Floats rows(kOut * kIn), read(rows.size(), 1.0f);
  for (float& row : rows) row = static_cast<float>(random.uniform() - 0.5);
  rows[5] = kPoison;
  rows[6] = INFINITY;
  rows[7] = 3.4e38f;  // above bf16's largest: infinity
  Floats want = rows;
  for (float& value : want) value = rounded_to_bf16(value);
  void *packed = nullptr, *trained = nullptr;
  require(cuda.allocate(d.context, rows.size() * sizeof(uint16_t), &packed), d);
  require(cuda.allocate(d.context, rows.size() * sizeof(float), &trained), d);
  auto* elements = static_cast<TmElement*>(packed);
  require(cuda.pack_weight(d.context, rows.data(), kOut, kIn, elements), d);
  require(cuda.read_elements(d.context, read.data(), elements, read.size()), d);
  tally.check(same_bits({read}, {want}), "pack_weight rounds as the host does");
  require(cuda.copy_in(d.context, trained, rows.data(), rows.size() * sizeof(float)), d);
  require(cuda.fill_zero(d.context, packed, rows.size() * sizeof(uint16_t)), d);
  require(cuda.pack_trained_weight(d.context, static_cast<float*>(trained), kOut, kIn, elements),
          d);
  require(cuda.read_elements(d.context, read.data(), elements, read.size()), d);
  for (Floats* values : {&read, &want}) (*values)[5] = 0;  // NaNs differ in their payload
  tally.check(same_bits({read}, {want}), "pack_trained_weight rounds as the host does");
  cuda.release(d.context, packed);
  cuda.release(d.context, trained);
  const Floats weight(4, 1.0f);
  Floats x(2, 1.0f), y(2);
  const TmLinear call = {x.data(), 2, {weight.data(), nullptr, 2, 2}, y.data(), 2, 1, 0, 1.0f};
  tally.check(d.backend->linear_forward(d.context, &call) == TM_BAD_ARGUMENT,
              "bf16: a weight of floats is refused");
}

}  // namespace tunemesh
