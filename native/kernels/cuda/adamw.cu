#include "kernels/cuda/adamw.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/stochastic_rounding.h"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kBlocksOfGroup = kThreads / kLanes;  // canonical blocks a thread block
constexpr size_t kBlockElements = 256;

struct Scalars {
  float clip, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon, step_size;
  bool has_decay;
};

__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ float minus(float a, float b) { return __fsub_rn(a, b); }

__device__ void update(float& p, float& m, float& v, float gradient, bool decays,
                       const Scalars& s) {
  const float g = multiply(gradient, s.clip);
  if (decays) p = minus(p, multiply(p, s.decay));
  m = plus(m, multiply(minus(g, m), s.one_minus_beta1));
  v = plus(multiply(v, s.beta2), multiply(multiply(g, g), s.one_minus_beta2));
  const float denominator = plus(__fdiv_rn(__fsqrt_rn(v), s.correction2), s.epsilon);
  p = minus(p, multiply(s.step_size, __fdiv_rn(m, denominator)));
}

// The last tensor that starts at or before the block.
__device__ const TmTrainedTensor& tensor_of(const TmAdamW& a, size_t block) {
  size_t low = 0, high = a.num_tensors;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    if (a.tensors[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return a.tensors[low];
}

// Where element i of [.., columns] lies in rows of `stride`.
__device__ size_t place(size_t i, size_t columns, size_t stride) {
  if (stride == columns) return i;
  if (i >> 32 == 0 && columns >> 32 == 0) {
    const uint32_t row = static_cast<uint32_t>(i) / static_cast<uint32_t>(columns);
    return size_t{row} * stride + (static_cast<uint32_t>(i) - row * static_cast<uint32_t>(columns));
  }
  return i / columns * stride + i % columns;
}

// `kCount` neighbouring elements of a tensor, in registers as floats. Elements whose row ends
// within them are placed one by one.
template <typename Element, int kCount>
struct Values {
  static constexpr int kWidth = Chunk<Element>::kWidth;
  static_assert(kCount % kWidth == 0 || kWidth % kCount == 0);
  float at[kCount];

  __device__ Values() = default;
  __device__ Values(const Element* from, size_t left) { load(from, left); }
  __device__ void load(const Element* from, size_t left) {
#pragma unroll
    for (int first = 0; first < kCount; first += kWidth) {
      const size_t rest = left > static_cast<size_t>(first) ? left - first : 0;
      const Chunk<Element> chunk = Chunk<Element>::load(from + first, rest);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) at[first + i] = chunk[i];
    }
  }
  __device__ void load_rows(const Element* from, size_t i, size_t left, size_t columns,
                            size_t stride) {
    if (columns % kCount == 0 || stride == columns) {
      load(from + place(i, columns, stride), left);
      return;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool is_there = static_cast<size_t>(k) < left;
      at[k] = is_there ? to_float(from[place(i + k, columns, stride)]) : 0.0f;
    }
  }
};

// Rounded to nearest even; a row of the copy may end anywhere.
template <typename Element, int kCount>
__device__ void store_copy(const TmTrainedTensor& t, const float (&values)[kCount], size_t i,
                           size_t left) {
  Element* const to = elements<Element>(t.copy);
  const bool is_whole = t.columns % kCount == 0 || t.copy_stride == t.columns;
  Element* const at = to + place(i, t.columns, t.copy_stride);
  const size_t bytes = kCount * sizeof(Element);
  if (is_whole && left >= kCount && reinterpret_cast<uintptr_t>(at) % bytes == 0) {
    struct alignas(kCount * sizeof(Element)) {
      Element at[kCount];
    } packed;
#pragma unroll
    for (int k = 0; k < kCount; ++k) packed.at[k] = from_float<Element>(values[k]);
    *reinterpret_cast<decltype(packed)*>(at) = packed;
    return;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if (static_cast<size_t>(k) >= left) continue;
    to[place(i + k, t.columns, t.copy_stride)] = from_float<Element>(values[k]);
  }
}

// Four neighbouring elements a lane: the warp's accesses are whole.
template <typename Element>
__device__ void update_floats(const TmAdamW& a, const TmTrainedTensor& t, size_t i,
                              const Scalars& s) {
  constexpr int kCount = 4;
  if (i >= t.n) return;
  const size_t left = t.n - i;
  Values<float, kCount> p, m, v, g;
  g.load(a.gradient + t.gradient_offset + i, left);
  p.load(static_cast<float*>(t.p) + i, left);
  m.load(static_cast<float*>(t.m) + i, left);
  v.load(static_cast<float*>(t.v) + i, left);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    update(p.at[k], m.at[k], v.at[k], g.at[k], t.decays && s.has_decay, s);
  }
  Chunk<float>::rounded(p.at).store(static_cast<float*>(t.p) + i, left);
  Chunk<float>::rounded(m.at).store(static_cast<float*>(t.m) + i, left);
  Chunk<float>::rounded(v.at).store(static_cast<float*>(t.v) + i, left);
  if (t.copy != nullptr) store_copy<Element>(t, p.at, i, left);
}

constexpr int kGroup = static_cast<int>(kRoundingGroup);

__device__ Chunk<Bfloat16> rounded(const float (&values)[kGroup], const PhiloxBlock& noise) {
  Chunk<Bfloat16> chunk;
#pragma unroll
  for (unsigned k = 0; k < kGroup; ++k) {
    chunk.at[k] = __ushort_as_bfloat16(
        stochastic_bfloat16(__float_as_uint(values[k]), rounding_noise(noise, k)));
  }
  return chunk;
}

struct HalfGradient {
  float at[kGroup];
  __device__ HalfGradient(const TmAdamW& a, const TmTrainedTensor& t, size_t i, size_t left) {
    const size_t first = t.gradient_offset + i;
    if (t.is_half_gradient) {
      copy(Values<Bfloat16, kGroup>(reinterpret_cast<const Bfloat16*>(a.half_gradient) + first,
                                    left));
    } else {
      copy(Values<float, kGroup>(a.gradient + first, left));
    }
  }
  template <typename Loaded>
  __device__ void copy(const Loaded& values) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) at[k] = values.at[k];
  }
};

// Eight neighbouring elements a lane: one group of the rounding's noise.
template <typename Element>
__device__ void update_half(const TmAdamW& a, const TmTrainedTensor& t, size_t i,
                            const Scalars& s) {
  if (i >= t.n) return;
  const size_t left = t.n - i;
  auto* const ps = static_cast<Bfloat16*>(t.p);
  auto* const ms = static_cast<Bfloat16*>(t.m) + i;
  auto* const vs = static_cast<Bfloat16*>(t.v) + i;
  Values<Bfloat16, kGroup> p, m, v;
  const HalfGradient g(a, t, i, left);
  p.load_rows(ps, i, left, t.columns, t.p_stride);
  m.load(ms, left);
  v.load(vs, left);
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    update(p.at[k], m.at[k], v.at[k], g.at[k], t.decays && s.has_decay, s);
  }
  const uint64_t group = (t.first_block * kBlockElements + i) / kRoundingGroup;
  const auto noise = [&](PhiloxStream stream) {
    return philox_block(a.seed, stream, group, a.step);
  };
  rounded(m.at, noise(PhiloxStream::kFirstMomentRounding)).store(ms, left);
  rounded(v.at, noise(PhiloxStream::kSecondMomentRounding)).store(vs, left);
  const Chunk<Bfloat16> weight = rounded(p.at, noise(PhiloxStream::kWeightRounding));
  if (t.columns % kGroup == 0 || t.p_stride == t.columns) {
    weight.store(ps + place(i, t.columns, t.p_stride), left);
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (static_cast<size_t>(k) < left) ps[place(i + k, t.columns, t.p_stride)] = weight.at[k];
    }
  }
  if (t.copy == nullptr) return;
  float kept[kGroup];
#pragma unroll
  for (int k = 0; k < kGroup; ++k) kept[k] = weight[k];
  store_copy<Element>(t, kept, i, left);
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) adamw_kernel(TmAdamW a, Scalars s) {
  const size_t block = size_t{blockIdx.x} * kBlocksOfGroup + threadIdx.x / kLanes;
  if (block >= a.num_blocks) return;
  const TmTrainedTensor t = tensor_of(a, block);
  const size_t first = (block - t.first_block) * kBlockElements;
  const size_t lane = threadIdx.x % kLanes;
  if (t.is_half) {
    update_half<Element>(a, t, first + lane * kGroup, s);
    return;
  }
#pragma unroll
  for (size_t half = 0; half < kBlockElements; half += kBlockElements / 2) {
    update_floats<Element>(a, t, first + half + lane * 4, s);
  }
}

}  // namespace

template <typename Element>
void adamw(const TmAdamW& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return;
  Scalars s{};
  s.clip = args.clip_factor;
  s.decay = args.learning_rate * args.weight_decay;
  s.one_minus_beta1 = static_cast<float>(1.0 - args.beta1);
  s.beta2 = static_cast<float>(args.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - args.beta2);
  s.correction2 = args.bias_correction2_sqrt;
  s.epsilon = args.epsilon;
  s.step_size = args.learning_rate / args.bias_correction1;
  s.has_decay = args.weight_decay != 0.0f;
  const size_t grid = (args.num_blocks + kBlocksOfGroup - 1) / kBlocksOfGroup;
  adamw_kernel<Element><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args, s);
  CUDA_CHECK_LAUNCH("adamw", stream);
}

template void adamw<float>(const TmAdamW&, cudaStream_t);
template void adamw<Bfloat16>(const TmAdamW&, cudaStream_t);

}  // namespace tunemesh::cuda
