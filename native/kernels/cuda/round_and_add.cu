#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/round_and_add.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kBlockElements = 256;
constexpr int kFractionBits = 48;
constexpr double kRoundingMagic = 6755399441055744.0;  // 1.5 * 2^52
constexpr long long kRoundingMagicBits = 0x4338000000000000;
constexpr int kInfinityBits = 0x7f800000;
constexpr int kRangeBits = 0x47000000;  // 32768.0f

__device__ void report(unsigned long long* outcome, TmStatus status) {
  atomicMin(outcome, static_cast<unsigned long long>(blockIdx.x) << 8 |
                         static_cast<unsigned long long>(status));
}

__global__ void round_and_add_kernel(TmRoundAndAdd a, unsigned long long* outcome) {
  const size_t at = size_t{blockIdx.x} * kBlockElements + threadIdx.x;
  const float x = a.gradient[at];
  const int magnitude = __float_as_int(x) & 0x7fffffff;
  const int top = block_reduce<kBlockElements>(magnitude, Max());
  if (top == 0) return;
  if (top >= kRangeBits) {
    if (threadIdx.x == 0) report(outcome, top >= kInfinityBits ? TM_NON_FINITE : TM_OUT_OF_RANGE);
    return;
  }
  const int exponent = (top >> 23) - 127;
  const int wanted = exponent + 1 - a.significant_bits + kFractionBits;
  const int shift = wanted > 0 ? wanted : 0;
  const double scale = __longlong_as_double((long long){kFractionBits - shift + 1023} << 52);
  const double shifted = __dadd_rn(__dmul_rn(static_cast<double>(x), scale), kRoundingMagic);
  const long long rounded = __double_as_longlong(shifted) - kRoundingMagicBits;
  const long long limit = 1ll << (shift == 0 ? 62 : 63 - shift);
  const unsigned long long value = static_cast<unsigned long long>(rounded) << shift;
  const unsigned long long before = static_cast<unsigned long long>(a.accumulator[at]);
  const unsigned long long after = before + value;
  const bool overflows = (((before ^ after) & (value ^ after)) >> 63) != 0;
  if (overflows || rounded >= limit || rounded <= -limit) report(outcome, TM_OUT_OF_RANGE);
  a.accumulator[at] = static_cast<int64_t>(after);
}

}  // namespace

void round_and_add(const TmRoundAndAdd& args, unsigned long long* outcome, cudaStream_t stream) {
  if (args.num_blocks == 0) return;
  const unsigned grid = static_cast<unsigned>(args.num_blocks);
  round_and_add_kernel<<<grid, kBlockElements, 0, stream>>>(args, outcome);
  CUDA_CHECK_LAUNCH("round_and_add", stream);
}

}  // namespace tunemesh::cuda
