#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/round_and_add.cuh"

namespace tunemesh::cuda {
namespace {

constexpr size_t kBlockElements = 256;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kFractionBits = 48;
constexpr double kRoundingMagic = 6755399441055744.0;  // 1.5 * 2^52
constexpr long long kRoundingMagicBits = 0x4338000000000000;
constexpr int kInfinityBits = 0x7f800000;
constexpr int kRangeBits = 0x47000000;  // 32768.0f

__device__ void report(const TmRoundBlocks& a, size_t block, TmStatus status) {
  const unsigned long long first = (a.first_block + block) << 8;
  atomicMax(reinterpret_cast<unsigned long long*>(a.outcome),
            ~(first | static_cast<unsigned long long>(status)));
}

// A block's unit is 2^(shift - 48).
struct Rounding {
  double scale;
  long long limit;
  int shift;
  bool overwrites;
  __device__ Rounding(const TmRoundBlocks& a, int top) : overwrites(a.overwrites != 0) {
    const int wanted = (top >> 23) - 127 + 1 - a.significant_bits + kFractionBits;
    shift = wanted > 0 ? wanted : 0;
    scale = __longlong_as_double((long long){kFractionBits - shift + 1023} << 52);
    limit = 1ll << (shift == 0 ? 62 : 63 - shift);
  }
  // False where the rounded value or the sum leaves int64.
  __device__ bool add(float x, long long* sum) const {
    const double shifted = __dadd_rn(__dmul_rn(static_cast<double>(x), scale), kRoundingMagic);
    const long long rounded = __double_as_longlong(shifted) - kRoundingMagicBits;
    const unsigned long long value = static_cast<unsigned long long>(rounded) << shift;
    const unsigned long long before = overwrites ? 0 : static_cast<unsigned long long>(*sum);
    const unsigned long long after = before + value;
    *sum = static_cast<long long>(after);
    const bool overflows = (((before ^ after) & (value ^ after)) >> 63) != 0;
    return !overflows && rounded < limit && rounded > -limit;
  }
};

__device__ int magnitude_bits(const float4& x) {
  const int a = max(__float_as_int(x.x) & 0x7fffffff, __float_as_int(x.y) & 0x7fffffff);
  const int b = max(__float_as_int(x.z) & 0x7fffffff, __float_as_int(x.w) & 0x7fffffff);
  return max(a, b);
}

__device__ bool add_four(const Rounding& rounding, const float4& x, longlong2* sums) {
  longlong2 low = {0, 0}, high = {0, 0};
  if (!rounding.overwrites) {
    low = sums[0];
    high = sums[1];
  }
  const bool a = rounding.add(x.x, &low.x), b = rounding.add(x.y, &low.y);
  const bool c = rounding.add(x.z, &high.x), d = rounding.add(x.w, &high.y);
  sums[0] = low;
  sums[1] = high;
  return a && b && c && d;
}

__global__ void round_blocks_kernel(TmRoundBlocks a) {
  const size_t block = size_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (block >= a.num_blocks) return;  // a whole warp
  const int lane = threadIdx.x % kWarpSize;
  const float4* const x = reinterpret_cast<const float4*>(a.gradient + block * kBlockElements);
  longlong2* const sums = reinterpret_cast<longlong2*>(a.accumulator + block * kBlockElements);
  const float4 first = x[lane], second = x[lane + kWarpSize];
  const int top = warp_reduce<kWarpSize>(max(magnitude_bits(first), magnitude_bits(second)), Max());
  if (top >= kRangeBits) {
    if (lane == 0) report(a, block, top >= kInfinityBits ? TM_NON_FINITE : TM_OUT_OF_RANGE);
    return;
  }
  if (top == 0) {
    if (!a.overwrites) return;
    for (int i = 0; i < 4; ++i) sums[lane + i * kWarpSize] = {0, 0};
    return;
  }
  const Rounding rounding(a, top);
  const bool low_fits = add_four(rounding, first, sums + 2 * lane);
  const bool high_fits = add_four(rounding, second, sums + 2 * (lane + kWarpSize));
  if (!low_fits || !high_fits) report(a, block, TM_OUT_OF_RANGE);
}

}  // namespace

void round_blocks(const TmRoundBlocks& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return;
  const unsigned grid = static_cast<unsigned>((args.num_blocks + kWarps - 1) / kWarps);
  round_blocks_kernel<<<grid, kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("round_blocks", stream);
}

}  // namespace tunemesh::cuda
