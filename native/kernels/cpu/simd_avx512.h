// Vec16 as one zmm register. Included by simd.h only.
#pragma once

// GCC 12 warns about _mm512_undefined_* inside its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace tunemesh {
namespace TM_ISA {

struct Vec16 {
  __m512 v;
};
struct VecI16 {
  __m512i v;
};
struct Mask16 {
  __mmask16 m;
};

inline __mmask16 first_lanes(size_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec16 zero() { return {_mm512_setzero_ps()}; }
inline Vec16 set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec16 a) { _mm512_storeu_ps(p, a.v); }
inline Vec16 load_tail(const float* p, size_t n) {
  return {_mm512_maskz_loadu_ps(first_lanes(n), p)};
}
inline void store_tail(float* p, Vec16 a, size_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a.v);
}

inline Vec16 add(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec16 sub(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec16 mul(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec16 div(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec16 fnma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Vec16 sqrt(Vec16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec16 abs(Vec16 a) { return {_mm512_abs_ps(a.v)}; }
inline Vec16 neg(Vec16 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }

inline Mask16 less(Vec16 a, Vec16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask16 less_equal(Vec16 a, Vec16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask16 equal(Vec16 a, Vec16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask16 is_nan(Vec16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline Vec16 select(Mask16 m, Vec16 a, Vec16 b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
inline uint32_t mask_bits(Mask16 m) { return m.m; }

inline VecI16 set1_int(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline VecI16 load_int(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_int(int32_t* p, VecI16 a) { _mm512_storeu_si512(p, a.v); }
inline VecI16 add(VecI16 a, VecI16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline VecI16 sub(VecI16 a, VecI16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline VecI16 bit_and(VecI16 a, VecI16 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline VecI16 bit_or(VecI16 a, VecI16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
inline VecI16 shift_left(VecI16 a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
inline VecI16 shift_right_logical(VecI16 a) {
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
inline VecI16 shift_right(VecI16 a) {
  return {_mm512_srai_epi32(a.v, kBits)};
}
inline VecI16 to_int(Vec16 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vec16 to_float(VecI16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline VecI16 to_bits(Vec16 a) { return {_mm512_castps_si512(a.v)}; }
inline Vec16 from_bits(VecI16 a) { return {_mm512_castsi512_ps(a.v)}; }
inline Vec16 round_even(Vec16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline float sum(Vec16 a) {
  const __m256 x8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_add_ss(x2, _mm_movehdup_ps(x2)));
}
inline float max_across(Vec16 a) {
  const __m256 x8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_max_ss(x2, _mm_movehdup_ps(x2)));
}

// 16 floats to int64, rounded to nearest even (|x| < 2^63), and back, rounded once.
inline void store_int64(int64_t* p, Vec16 a) {
  _mm512_storeu_si512(p, _mm512_cvtps_epi64(_mm512_castps512_ps256(a.v)));
  _mm512_storeu_si512(p + 8, _mm512_cvtps_epi64(_mm512_extractf32x8_ps(a.v, 1)));
}
inline Vec16 load_int64(const int64_t* p) {
  const __m256 low = _mm512_cvtepi64_ps(_mm512_loadu_si512(p));
  const __m256 high = _mm512_cvtepi64_ps(_mm512_loadu_si512(p + 8));
  return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
}

}  // namespace TM_ISA
}  // namespace tunemesh
