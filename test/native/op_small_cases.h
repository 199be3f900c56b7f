// Every kernel of the operations at a few odd shapes: what a sanitizer has time for. Each variant
// that is chosen by width (rows of a warp, of several, rows not kept whole; each attention tile)
// has one.
#pragma once
#include <vector>

#include "op_attention_cases.h"
#include "op_linear_cases.h"

namespace tunemesh {

inline std::vector<OpCase> small_linear_cases() {
  constexpr size_t kSizes[][3] = {{1, 64, 96}, {13, 384, 64}, {33, 16, 770}, {97, 33, 130}};
  std::vector<OpCase> cases;
  uint64_t seed = 900;
  for (const auto& size : kSizes) {
    for (const Product product :
         {Product::kForward, Product::kBackwardInput, Product::kWeightGrad}) {
      const size_t variant = seed % 3;
      cases.push_back(linear_case(Random(seed++),
                                  {product, size[0], size[1], size[2], variant == 1 ? 0.37f : 1,
                                   variant == 2, variant, variant == 1 || Random::rounds_to_bf16}));
    }
  }
  return cases;
}

inline std::vector<OpCase> small_cases() {
  uint64_t seed = 800;
  const auto random = [&] { return Random(seed++); };
  std::vector<OpCase> cases = {
      embedding_case(random(), 41, 33, 19),  embedding_case(random(), 90, 1032, 40),
      norm_case(random(), 33, 64, 0, false), norm_case(random(), 129, 577, 5, true),
      norm_case(random(), 40, 584, 8, true), norm_case(random(), 17, 2056, 0, false),
      norm_case(random(), 9, 9003, 2, true), norm_case(random(), 3, 8200, 0, false),
      bias_case(random(), 77, 49, 3),        bias_case(random(), 300, 264, 8),
      rope_case(random(), 4, 24, 8),         rope_case(random(), 3, 128, 1),
      swiglu_case(random(), 31, 177, 1),     swiglu_case(random(), 5, 536, 10),
      loss_case(random(), 3, 4111, 3),       loss_case(random(), 3, 17, 30),
      loss_case(random(), 2, 49152, 10),
  };
  const AttentionShape shapes[] = {
      {{0, 37, 38, 120}, 6, 2, 16, 0, 0},      {{0, 65, 100, 139}, 4, 1, 32, 50, 0},
      {{0, 63, 64, 65, 129}, 2, 1, 33, 0, 0},  {{0, 64, 128}, 4, 2, 64, 0, 0},
      {{0, 31, 95, 96, 97}, 4, 2, 128, 17, 0}, {{0, 70, 99}, 2, 1, 128, 0, 1},
      {{0, 70, 101}, 2, 1, 256, 0, 1},         {{0, 97}, 2, 2, 200, 33, 0},
  };
  for (const AttentionShape& shape : shapes) cases.push_back(attention_case(random(), shape));
  for (const DecodeShape& shape :
       {DecodeShape{3, 40, 6, 2, 24, 5}, {7, 32, 2, 2, 17, 0}, {5, 200, 4, 1, 256, 0}}) {
    cases.push_back(decode_case(random(), shape));
  }
  return cases;
}

}  // namespace tunemesh
