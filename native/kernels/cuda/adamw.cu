#include "kernels/byte_moments.h"
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

constexpr int kRun = 4;  // canonical blocks a warp updates one after another

struct Scalars {
  float clip, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon, step_size;
  bool has_decay;
  bool is_usual;  // of a size for which usual_update() is right
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

// The same bits without a branch, so that the elements of a lane overlap: root and quotients by
// Newton's steps with exact remainders, right to the last bit where nothing leaves float's normal
// range on the way. That holds if `s.is_usual`, and m and v afterwards are zero or of a magnitude
// within [kSmallest, kLargest]; `extremes` collects what tells.
constexpr float kSmallest = 0x1p-100f, kLargest = 0x1p+20f;
struct Extremes {
  uint32_t largest = 0;              // magnitude's bits
  uint32_t smallest = ~uint32_t{0};  // magnitude's bits less one, so that zero is the largest
  __device__ void take(uint32_t magnitude) {
    largest = max(largest, magnitude);
    smallest = min(smallest, magnitude - 1);
  }
  __device__ bool are_usual() const {
    return largest <= __float_as_uint(kLargest) && smallest >= __float_as_uint(kSmallest) - 1;
  }
};

__device__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// 1 / b almost to the last bit, and a / b by it: what __fdiv_rn does for usual numbers.
__device__ float inverse_of(float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return fused(fused(-b, inverse, 1.0f), inverse, inverse);
}
__device__ float quotient(float a, float b, float inverse) {
  const float q = multiply(a, inverse);
  return fused(fused(-b, q, a), inverse, q);
}

__device__ void usual_update(float& p, float& m, float& v, float gradient, bool decays,
                             const Scalars& s, Extremes& extremes) {
  const float g = multiply(gradient, s.clip);
  if (decays) p = minus(p, multiply(p, s.decay));
  m = plus(m, multiply(minus(g, m), s.one_minus_beta1));
  v = plus(multiply(v, s.beta2), multiply(multiply(g, g), s.one_minus_beta2));
  extremes.take(__float_as_uint(m) & 0x7fffffffu);
  extremes.take(__float_as_uint(v));  // below zero: too large
  float inverse_root;                 // as __fsqrt_rn does
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse_root) : "f"(fmaxf(v, kSmallest)));
  const float near_root = multiply(v, inverse_root);
  const float rest = fused(-near_root, near_root, v);
  const float root = fused(rest, multiply(inverse_root, 0.5f), near_root);
  const float denominator =
      plus(quotient(root, s.correction2, inverse_of(s.correction2)), s.epsilon);
  const float move = quotient(m, denominator, inverse_of(denominator));
  // Of a negative zero the steps lose the sign.
  const uint32_t signed_move = __float_as_uint(move) | (__float_as_uint(m) & 0x80000000u);
  p = minus(p, multiply(s.step_size, __uint_as_float(signed_move)));
  extremes.largest = max(extremes.largest, __float_as_uint(p) & 0x7fffffffu);
}

// The last tensor that starts at or before the block.
__device__ size_t tensor_of(const TmAdamW& a, size_t block) {
  size_t low = 0, high = a.num_tensors;
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    if (a.tensors[middle].first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
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
  const Chunk<float> g = Chunk<float>::load(a.gradient + t.gradient_offset + i, left);
  Chunk<float> p = Chunk<float>::load(static_cast<float*>(t.p) + i, left);
  Chunk<float> m = Chunk<float>::load(static_cast<float*>(t.m) + i, left);
  Chunk<float> v = Chunk<float>::load(static_cast<float*>(t.v) + i, left);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    update(p.at[k], m.at[k], v.at[k], g.at[k], t.decays && s.has_decay, s);
  }
  p.store(static_cast<float*>(t.p) + i, left);
  m.store(static_cast<float*>(t.m) + i, left);
  v.store(static_cast<float*>(t.v) + i, left);
  if (t.copy != nullptr) store_copy<Element>(t, p.at, i, left);
}

constexpr int kGroup = static_cast<int>(kRoundingGroup);

// Half tensors lie in the device's memory: plain global accesses.
template <typename T>
__device__ T* global(T* at) {
  __builtin_assume(__isGlobal(at));
  return at;
}

struct HalfPlaces {
  Bfloat16 *p, *m, *v;
  __device__ HalfPlaces(const TmTrainedTensor& t, size_t i)
      : p(global(static_cast<Bfloat16*>(t.p) + place(i, t.columns, t.p_stride))),
        m(global(static_cast<Bfloat16*>(t.m) + i)),
        v(global(static_cast<Bfloat16*>(t.v) + i)) {}
};

__device__ PhiloxBlock noise_of(const TmAdamW& a, const TmTrainedTensor& t, size_t i) {
  return rounding_block(a.seed, (t.first_block * kBlockElements + i) / kRoundingGroup, a.step);
}

__device__ Bfloat16 rounded(float value, const PhiloxBlock& noise, Rounded what, unsigned k) {
  return __ushort_as_bfloat16(
      stochastic_bfloat16(__float_as_uint(value), rounding_noise(noise, what, k)));
}

// A lane's elements one by one: any addresses, any values.
template <typename Element>
__device__ void update_half_slowly(const TmAdamW& a, const TmTrainedTensor& t, size_t first,
                                   const Scalars& s) {
  const PhiloxBlock noise = noise_of(a, t, first);
  const auto* const gradients = reinterpret_cast<const Bfloat16*>(a.half_gradient);
#pragma unroll 1
  for (unsigned k = 0; k < kGroup && first + k < t.n; ++k) {
    const size_t i = first + k, g = t.gradient_offset + i;
    const HalfPlaces at(t, i);
    const float gradient = t.is_half_gradient ? to_float(gradients[g]) : a.gradient[g];
    float p = to_float(*at.p), m = to_float(*at.m), v = to_float(*at.v);
    update(p, m, v, gradient, t.decays && s.has_decay, s);
    *at.p = rounded(p, noise, Rounded::kWeight, k);
    *at.m = rounded(m, noise, Rounded::kFirstMoment, k);
    *at.v = rounded(v, noise, Rounded::kSecondMoment, k);
    if (t.copy == nullptr) continue;
    elements<Element>(t.copy)[place(i, t.columns, t.copy_stride)] =
        from_float<Element>(to_float(*at.p));
  }
}

// Eight values of 16 bytes, or of 32.
struct HalfGroup {
  float at[kGroup];
  __device__ explicit HalfGroup(const Bfloat16* from) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      at[k] = __uint_as_float(k % 2 == 0 ? words[k / 2] << 16 : words[k / 2] & 0xffff0000u);
    }
  }
  __device__ explicit HalfGroup(const float* from) {
#pragma unroll
    for (int k = 0; k < kGroup; k += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + k);
      at[k] = four.x;
      at[k + 1] = four.y;
      at[k + 2] = four.z;
      at[k + 3] = four.w;
    }
  }
};

// Of finite values: stochastic_bfloat16() of pairs, 16 bytes.
__device__ void store_rounded(const float (&values)[kGroup], Bfloat16* to, const PhiloxBlock& noise,
                              Rounded what) {
  uint32_t words[kGroup / 2];
#pragma unroll
  for (int k = 0; k < kGroup; k += 2) {
    const uint32_t even = __float_as_uint(values[k]) + rounding_noise(noise, what, k);
    const uint32_t odd = __float_as_uint(values[k + 1]) + rounding_noise(noise, what, k + 1);
    words[k / 2] = __byte_perm(even, odd, 0x7632);
  }
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// False, with nothing written, where values or addresses are not usual.
__device__ bool update_half_group(const TmAdamW& a, const TmTrainedTensor& t, size_t i,
                                  const Scalars& s) {
  const HalfPlaces at(t, i);
  const size_t first = t.gradient_offset + i;
  const auto* const half_gradient =
      global(reinterpret_cast<const Bfloat16*>(a.half_gradient) + first);
  const float* const gradient = global(a.gradient + first);
  const bool is_whole = t.columns % kGroup == 0 || t.p_stride == t.columns;
  const bool is_near = is_aligned(t.is_half_gradient ? static_cast<const void*>(half_gradient)
                                                     : static_cast<const void*>(gradient));
  if (!s.is_usual || !is_whole || t.n - i < kGroup || t.copy != nullptr || !is_near ||
      !is_aligned(at.p) || !is_aligned(at.m) || !is_aligned(at.v)) {
    return false;
  }
  HalfGroup p(at.p), m(at.m), v(at.v);
  const HalfGroup g = t.is_half_gradient ? HalfGroup(half_gradient) : HalfGroup(gradient);
  const bool decays = t.decays && s.has_decay;
  Extremes extremes;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    usual_update(p.at[k], m.at[k], v.at[k], g.at[k], decays, s, extremes);
  }
  if (!extremes.are_usual()) return false;
  const PhiloxBlock noise = noise_of(a, t, i);
  store_rounded(p.at, at.p, noise, Rounded::kWeight);
  store_rounded(m.at, at.m, noise, Rounded::kFirstMoment);
  store_rounded(v.at, at.v, noise, Rounded::kSecondMoment);
  return true;
}

// --- moments of bytes ---

// A lane's eight elements of a block, in registers; those that are not there are zero.
struct ByteLane {
  float p[kGroup] = {}, m[kGroup] = {}, v[kGroup] = {};

  template <bool kIsUsual>
  __device__ void run(const float (&g)[kGroup], bool decays, const Scalars& s, Extremes& extremes) {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if constexpr (kIsUsual) {
        usual_update(p[k], m[k], v[k], g[k], decays, s, extremes);
      } else {
        update(p[k], m[k], v[k], g[k], decays, s);
      }
    }
  }
};

struct BytePlace {
  const TmAdamW& a;
  const TmTrainedTensor& t;
  size_t i;     // the lane's first element
  size_t left;  // from there on, in the tensor

  __device__ bool is_near() const {
    const bool is_row = t.columns % kGroup == 0 || t.p_stride == t.columns;
    const size_t g = t.gradient_offset + i;
    const void* const gradient = t.is_half_gradient ? static_cast<const void*>(a.half_gradient + g)
                                                    : static_cast<const void*>(a.gradient + g);
    return is_row && left >= kGroup && is_aligned(weight(0)) && is_aligned(gradient) &&
           reinterpret_cast<uintptr_t>(codes(t.m)) % kGroup == 0 &&
           reinterpret_cast<uintptr_t>(codes(t.v)) % kGroup == 0;
  }
  __device__ Bfloat16* weight(size_t k) const {
    return global(static_cast<Bfloat16*>(t.p) + place(i + k, t.columns, t.p_stride));
  }
  __device__ uint8_t* codes(void* of) const { return global(static_cast<uint8_t*>(of) + i); }
  __device__ float gradient(size_t k) const {
    const size_t g = t.gradient_offset + i + k;
    if (!t.is_half_gradient) return a.gradient[g];
    return to_float(reinterpret_cast<const Bfloat16*>(a.half_gradient)[g]);
  }
};

// Eight bytes in and out.
struct Codes {
  uint32_t words[2] = {};
  __device__ uint8_t at(int k) const { return static_cast<uint8_t>(words[k / 4] >> (k % 4 * 8)); }
  __device__ void put(int k, uint8_t code) { words[k / 4] |= uint32_t{code} << (k % 4 * 8); }
  __device__ void load(const uint8_t* from) {
    const uint2 both = *reinterpret_cast<const uint2*>(from);
    words[0] = both.x;
    words[1] = both.y;
  }
  __device__ void store(uint8_t* to, bool is_near, size_t left) const {
    if (is_near) {
      *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (static_cast<size_t>(k) < left) to[k] = at(k);
    }
  }
};

__device__ void load_lane(const BytePlace& at, bool is_near, ByteLane& lane, float (&g)[kGroup]) {
  const size_t block = at.i / kBlockElements;
  const uint32_t m_exponent = at.t.m_exponents[block], v_exponent = at.t.v_exponents[block];
  const uint8_t *const m_codes = at.codes(at.t.m), *const v_codes = at.codes(at.t.v);
  Codes m, v;
  if (is_near) {
    m.load(m_codes);
    v.load(v_codes);
    const HalfGroup p(at.weight(0));
    const size_t first = at.t.gradient_offset + at.i;
    const HalfGroup gradient =
        at.t.is_half_gradient
            ? HalfGroup(global(reinterpret_cast<const Bfloat16*>(at.a.half_gradient) + first))
            : HalfGroup(global(at.a.gradient + first));
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      lane.p[k] = p.at[k];
      g[k] = gradient.at[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const bool is_there = static_cast<size_t>(k) < at.left;
      lane.p[k] = is_there ? to_float(*at.weight(k)) : 0.0f;
      g[k] = is_there ? at.gradient(k) : 0.0f;
      if (is_there) m.put(k, m_codes[k]);
      if (is_there) v.put(k, v_codes[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    lane.m[k] = first_moment_value(m.at(k), m_exponent);
    lane.v[k] = second_moment_value(v.at(k), v_exponent);
  }
}

template <typename Element>
__device__ void store_weights(const BytePlace& at, bool is_near, const ByteLane& lane,
                              const PhiloxBlock& noise) {
  bool is_finite = true;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    is_finite &= (__float_as_uint(lane.p[k]) & 0x7fffffffu) < 0x7f800000u;
  }
  if (is_near && is_finite && at.t.copy == nullptr) {
    store_rounded(lane.p, at.weight(0), noise, Rounded::kWeight);
    return;
  }
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (static_cast<size_t>(k) >= at.left) continue;
    const Bfloat16 weight = rounded(lane.p[k], noise, Rounded::kWeight, k);
    *at.weight(k) = weight;
    if (at.t.copy == nullptr) continue;
    elements<Element>(at.t.copy)[place(at.i + k, at.t.columns, at.t.copy_stride)] =
        from_float<Element>(to_float(weight));
  }
}

// The block's exponent, of all lanes.
__device__ uint32_t warp_exponent(const float (&values)[kGroup], const PhiloxBlock& noise,
                                  Rounded what) {
  uint32_t largest = 0;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const uint32_t magnitude = __float_as_uint(values[k]) & 0x7fffffffu;
    largest = max(largest, noisy_magnitude(magnitude, rounding_noise(noise, what, k)));
  }
  return block_exponent(__reduce_max_sync(0xffffffffu, largest));
}

// A warp's block; all of its lanes come here.
template <typename Element>
__device__ void update_byte_block(const TmAdamW& a, const TmTrainedTensor& t, size_t first,
                                  const Scalars& s) {
  const size_t lane_first = first + threadIdx.x % kLanes * kGroup;
  const BytePlace at = {a, t, lane_first, lane_first < t.n ? t.n - lane_first : 0};
  const bool is_near = at.is_near(), decays = t.decays && s.has_decay;
  ByteLane lane;
  float g[kGroup];
  Extremes extremes;
  load_lane(at, is_near, lane, g);
  lane.run<true>(g, decays, s, extremes);
  if (!s.is_usual || !extremes.are_usual()) {
    load_lane(at, false, lane, g);
    lane.run<false>(g, decays, s, extremes);
  }
  const PhiloxBlock noise = noise_of(a, t, lane_first);
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    if (static_cast<size_t>(k) >= at.left) lane.m[k] = lane.v[k] = 0.0f;
  }
  const uint32_t m_exponent = warp_exponent(lane.m, noise, Rounded::kFirstMoment);
  const uint32_t v_exponent = warp_exponent(lane.v, noise, Rounded::kSecondMoment);
  Codes m, v;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    const uint32_t m_noise = rounding_noise(noise, Rounded::kFirstMoment, k);
    const uint32_t v_noise = rounding_noise(noise, Rounded::kSecondMoment, k);
    m.put(k, first_moment_code(lane.m[k], m_noise, m_exponent));
    v.put(k, second_moment_code(lane.v[k], v_noise, v_exponent));
  }
  m.store(at.codes(t.m), is_near, at.left);
  v.store(at.codes(t.v), is_near, at.left);
  if (threadIdx.x % kLanes == 0) {
    t.m_exponents[first / kBlockElements] = static_cast<uint8_t>(m_exponent);
    t.v_exponents[first / kBlockElements] = static_cast<uint8_t>(v_exponent);
  }
  store_weights<Element>(at, is_near, lane, noise);
}

template <typename Element, bool kHasBytes>
__device__ void update_block(const TmAdamW& a, const TmTrainedTensor& t, size_t first,
                             const Scalars& s) {
  const size_t lane = threadIdx.x % kLanes;
  if constexpr (kHasBytes) {
    if (t.m_exponents != nullptr) {
      update_byte_block<Element>(a, t, first, s);
      return;
    }
  }
  if (t.is_half) {
    // Eight neighbouring elements a lane: one group of the rounding's noise.
    const size_t i = first + lane * kGroup;
    if (i < t.n && !update_half_group(a, t, i, s)) update_half_slowly<Element>(a, t, i, s);
    return;
  }
#pragma unroll
  for (size_t half = 0; half < kBlockElements; half += kBlockElements / 2) {
    update_floats<Element>(a, t, first + half + lane * 4, s);
  }
}

// Apart for tables without moments of bytes, which then take no registers.
template <typename Element, bool kHasBytes>
__global__ void __launch_bounds__(kThreads, kHasBytes ? 2 : 3) adamw_kernel(TmAdamW a, Scalars s) {
  size_t block = size_t{blockIdx.x} * kBlocksOfGroup * kRun + threadIdx.x / kLanes;
  size_t end = 0;  // of the tensor's blocks
  TmTrainedTensor t;
#pragma unroll 1
  for (int run = 0; run < kRun && block < a.num_blocks; ++run, block += kBlocksOfGroup) {
    if (block >= end) {
      const size_t index = tensor_of(a, block);
      t = a.tensors[index];
      end = index + 1 < a.num_tensors ? a.tensors[index + 1].first_block : a.num_blocks;
    }
    update_block<Element, kHasBytes>(a, t, (block - t.first_block) * kBlockElements, s);
  }
}

// Are the steps of usual_update() exact with these?
bool are_usual(const Scalars& s) {
  return s.correction2 >= 0x1p-10f && s.correction2 <= 1.0f && s.epsilon >= 0x1p-60f &&
         s.epsilon <= 1.0f;
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
  s.is_usual = are_usual(s);
  constexpr size_t kBlocks = size_t{kBlocksOfGroup} * kRun;
  const size_t grid = (args.num_blocks + kBlocks - 1) / kBlocks;
  bool has_bytes = false;
  for (size_t i = 0; i < args.num_tensors; ++i) {
    has_bytes = has_bytes || args.host_tensors[i].m_exponents != nullptr;
  }
  const auto kernel = has_bytes ? adamw_kernel<Element, true> : adamw_kernel<Element, false>;
  kernel<<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(args, s);
  CUDA_CHECK_LAUNCH("adamw", stream);
}

template void adamw<float>(const TmAdamW&, cudaStream_t);
template void adamw<Bfloat16>(const TmAdamW&, cudaStream_t);

}  // namespace tunemesh::cuda
