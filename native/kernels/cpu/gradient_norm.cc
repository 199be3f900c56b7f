// Sums of squares of a gradient by groups of blocks, in the order that backend.h fixes: the same
// bits on every path and thread count, and as kernels/cuda/gradient_norm.cu gives.
//
//   order   a product of two float32 is exact in float64, so every lane is one chain of additions
//   floor   4 bytes an element: bound by memory
#include <algorithm>
#include <bit>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/ops_table.h"

namespace tunemesh {
namespace {

constexpr size_t kBlockElements = 256;
constexpr size_t kLanes = 8;

float value_at(const float* values, size_t i) { return values[i]; }
float value_at(const uint16_t* values, size_t i) {
  return std::bit_cast<float>(uint32_t{values[i]} << 16);
}

template <typename Value>
double block_squares(const Value* values) {
  double lanes[kLanes] = {};
  for (size_t first = 0; first < kBlockElements; first += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(value_at(values, first + lane));
      lanes[lane] += value * value;
    }
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

}  // namespace

TmStatus sum_squares(TmContext* context, const TmSumSquares* args) {
  const size_t num_groups = (args->num_blocks + TM_NORM_GROUP_BLOCKS - 1) / TM_NORM_GROUP_BLOCKS;
  context->pool.parallel_for(num_groups, [&](size_t group, int) {
    const size_t first = group * TM_NORM_GROUP_BLOCKS;
    const size_t end = std::min(args->num_blocks, first + TM_NORM_GROUP_BLOCKS);
    double sum = 0;
    for (size_t block = first; block < end; ++block) {
      const size_t at = block * kBlockElements;
      sum += args->half_values == nullptr ? block_squares(args->values + at)
                                          : block_squares(args->half_values + at);
    }
    args->group_sums[group] = sum;
  });
  return TM_OK;
}

}  // namespace tunemesh
