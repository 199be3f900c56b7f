// Every case that a backend must pass, but for the matrix products, and the vectors of AdamW.
#pragma once
#include <stdio.h>

#include <bit>
#include <string>
#include <vector>

#include "op_attention_cases.h"

namespace tunemesh {

inline std::vector<OpCase> all_cases() {
  uint64_t seed = 1;
  auto random = [&] { return Random(seed++); };
  std::vector<OpCase> cases = {
      embedding_case(random(), 41, 33, 19),   embedding_case(random(), 130, 576, 300),
      norm_case(random(), 33, 64, 0, false),  norm_case(random(), 129, 577, 5, true),
      norm_case(random(), 7, 16, 0, true),    norm_case(random(), 300, 576, 0, false),
      norm_case(random(), 5, 1031, 1, false), bias_case(random(), 77, 49, 3),
      bias_case(random(), 33, 300, 0),        rope_case(random(), 3, 16, 0),
      rope_case(random(), 4, 24, 8),          rope_case(random(), 9, 64, 5),
      rope_case(random(), 2, 128, 1),         swiglu_case(random(), 31, 177, 1),
      swiglu_case(random(), 5, 1536, 10),     swiglu_case(random(), 3, 333, 60),
      loss_case(random(), 5, 320, 1),         loss_case(random(), 3, 4111, 3),
      loss_case(random(), 2, 49152, 10),      loss_case(random(), 3, 17, 30),
  };
  const AttentionShape shapes[] = {
      {{0, 37, 38, 120, 233}, 6, 2, 16, 0, 0}, {{0, 37, 38, 120, 233}, 6, 2, 64, 0, 5},
      {{0, 130, 131, 200}, 4, 4, 32, 8, 3},    {{0, 65, 100, 259}, 4, 1, 32, 50, 0},
      {{0, 64, 192}, 2, 1, 128, 0, 1},         {{0, 5, 9, 14, 100}, 4, 2, 24, 7, 2},
      {{0, 1, 2, 40}, 2, 1, 16, 1, 0},         {{0, 300}, 3, 1, 64, 100, 0},
      {{0, 3, 3, 50}, 2, 2, 8, 0, 0},          {{0, 97, 161, 340}, 3, 3, 17, 65, 0},
  };
  for (const AttentionShape& shape : shapes) cases.push_back(attention_case(random(), shape));
  const DecodeShape decodes[] = {{0, 1, 4, 2, 16, 0},    {0, 2, 9, 3, 64, 1},
                                 {3, 40, 6, 2, 24, 5},   {100, 613, 9, 3, 64, 0},
                                 {0, 300, 3, 1, 128, 2}, {7, 32, 2, 2, 17, 0}};
  for (const DecodeShape& shape : decodes) cases.push_back(decode_case(random(), shape));
  return cases;
}

inline void adamw_vectors(const std::vector<Device>& devices, const char* path, Tally& tally) {
  FILE* file = fopen(path, "r");
  tally.check(file != nullptr, std::string("adamw vectors: cannot open ") + path);
  if (!file) return;
  std::vector<std::vector<uint32_t>>
      rows;  // every innermost list of numbers: scalars, then elements
  std::vector<uint32_t> row;
  uint32_t value = 0;
  bool in_number = false, in_text = false;
  for (int c; (c = fgetc(file)) != EOF;) {
    if (c == '"') in_text = !in_text;
    if (in_text) continue;
    if (c >= '0' && c <= '9') {
      value = (in_number ? value * 10 : 0) + uint32_t(c - '0');
      in_number = true;
      continue;
    }
    if (in_number) row.push_back(value);
    in_number = false;
    if (c == ']' && !row.empty()) rows.push_back(std::move(row));
    if (c == ']' || c == '[') row.clear();
  }
  fclose(file);
  auto number = [](uint32_t bits) { return std::bit_cast<float>(bits); };
  auto wide_number = [](uint32_t high, uint32_t low) {
    return std::bit_cast<double>(uint64_t{high} << 32 | low);
  };
  size_t num_elements = 0;
  for (size_t i = 0; i < rows.size();) {
    const std::vector<uint32_t> s = rows[i++];
    Floats columns[7];
    for (; i < rows.size() && rows[i].size() == 7; ++i) {
      for (size_t k = 0; k < 7; ++k) columns[k].push_back(number(rows[i][k]));
    }
    const size_t n = columns[0].size();
    num_elements += n;
    for (size_t device = 0; device <= devices.size(); ++device) {
      Floats p = columns[0], m = columns[1], v = columns[2];
      TmAdamW args{};
      args.p = p.data();
      args.m = m.data();
      args.v = v.data();
      args.gradient = columns[3].data();
      args.n = n;
      args.learning_rate = number(s[0]);
      args.clip_factor = number(s[1]);
      args.bias_correction1 = number(s[2]);
      args.bias_correction2_sqrt = number(s[3]);
      args.beta1 = wide_number(s[4], s[5]);
      args.beta2 = wide_number(s[6], s[7]);
      args.epsilon = number(s[8]);
      args.weight_decay = number(s[9]);
      const bool is_reference = device == devices.size();
      if (is_reference) reference::adamw(args);
      if (!is_reference)
        require(devices[device].backend->adamw(devices[device].context, &args), devices[device]);
      tally.check(
          same_bits({p, m, v}, {columns[4], columns[5], columns[6]}),
          "adamw vectors on " + (is_reference ? std::string("reference") : devices[device].name));
    }
  }
  tally.check(num_elements >= 200, "adamw vectors: fewer than 200 elements read");
}

}  // namespace tunemesh
