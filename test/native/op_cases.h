// Every case that a backend must pass, but for the matrix products.
#pragma once
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

}  // namespace tunemesh
