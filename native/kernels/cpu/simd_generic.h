// Vec16 as an array: the path for any CPU, and the plain statement of what the others do.
// Included by simd.h only.
#pragma once

namespace tunemesh {
namespace TM_ISA {

struct Vec16 {
  float v[16];
};
struct VecI16 {
  int32_t v[16];
};
struct Mask16 {
  bool m[16];
};

template <typename F>
inline Vec16 each_lane(F f) {
  Vec16 r;
  for (int i = 0; i < 16; i++) r.v[i] = f(i);
  return r;
}
template <typename F>
inline VecI16 each_int_lane(F f) {
  VecI16 r;
  for (int i = 0; i < 16; i++) r.v[i] = f(i);
  return r;
}
template <typename F>
inline Mask16 each_mask_lane(F f) {
  Mask16 r;
  for (int i = 0; i < 16; i++) r.m[i] = f(i);
  return r;
}

inline Vec16 zero() { return Vec16{}; }
inline Vec16 set1(float x) {
  return each_lane([&](int) { return x; });
}
inline Vec16 load(const float* p) {
  Vec16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, const Vec16& a) { memcpy(p, a.v, sizeof a.v); }
inline Vec16 load_tail(const float* p, size_t n) {
  Vec16 r{};
  memcpy(r.v, p, n * sizeof(float));
  return r;
}
inline void store_tail(float* p, const Vec16& a, size_t n) { memcpy(p, a.v, n * sizeof(float)); }

inline Vec16 add(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec16 sub(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec16 mul(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec16 div(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
inline Vec16 fma(const Vec16& a, const Vec16& b, const Vec16& c) {
  return each_lane([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Vec16 fnma(const Vec16& a, const Vec16& b, const Vec16& c) {
  return each_lane([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
}
inline Vec16 sqrt(const Vec16& a) {
  return each_lane([&](int i) { return std::sqrt(a.v[i]); });
}
inline Vec16 max(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec16 min(const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec16 abs(const Vec16& a) {
  return each_lane([&](int i) { return std::fabs(a.v[i]); });
}
inline Vec16 neg(const Vec16& a) {
  return each_lane([&](int i) { return -a.v[i]; });
}

inline Mask16 less(const Vec16& a, const Vec16& b) {
  return each_mask_lane([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask16 less_equal(const Vec16& a, const Vec16& b) {
  return each_mask_lane([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Mask16 equal(const Vec16& a, const Vec16& b) {
  return each_mask_lane([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask16 is_nan(const Vec16& a) {
  return each_mask_lane([&](int i) { return a.v[i] != a.v[i]; });
}
inline Vec16 select(const Mask16& m, const Vec16& a, const Vec16& b) {
  return each_lane([&](int i) { return m.m[i] ? a.v[i] : b.v[i]; });
}
inline uint32_t mask_bits(const Mask16& m) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= static_cast<uint32_t>(m.m[i]) << i;
  return bits;
}

inline VecI16 set1_int(int32_t x) {
  return each_int_lane([&](int) { return x; });
}
inline VecI16 load_int(const int32_t* p) {
  VecI16 r;
  memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_int(int32_t* p, const VecI16& a) { memcpy(p, a.v, sizeof a.v); }

// Integer lanes wrap around, as the vector instructions do.
inline int32_t wrap(uint32_t x) { return static_cast<int32_t>(x); }
inline uint32_t bits32(int32_t x) { return static_cast<uint32_t>(x); }
inline VecI16 add(const VecI16& a, const VecI16& b) {
  return each_int_lane([&](int i) { return wrap(bits32(a.v[i]) + bits32(b.v[i])); });
}
inline VecI16 sub(const VecI16& a, const VecI16& b) {
  return each_int_lane([&](int i) { return wrap(bits32(a.v[i]) - bits32(b.v[i])); });
}
inline VecI16 bit_and(const VecI16& a, const VecI16& b) {
  return each_int_lane([&](int i) { return a.v[i] & b.v[i]; });
}
inline VecI16 bit_or(const VecI16& a, const VecI16& b) {
  return each_int_lane([&](int i) { return a.v[i] | b.v[i]; });
}
template <int kBits>
inline VecI16 shift_left(const VecI16& a) {
  return each_int_lane([&](int i) { return wrap(bits32(a.v[i]) << kBits); });
}
template <int kBits>
inline VecI16 shift_right_logical(const VecI16& a) {
  return each_int_lane([&](int i) { return wrap(bits32(a.v[i]) >> kBits); });
}
template <int kBits>
inline VecI16 shift_right(const VecI16& a) {
  return each_int_lane([&](int i) { return a.v[i] >> kBits; });
}
inline VecI16 to_int(const Vec16& a) {
  return each_int_lane([&](int i) { return static_cast<int32_t>(std::lrint(a.v[i])); });
}
inline Vec16 to_float(const VecI16& a) {
  return each_lane([&](int i) { return static_cast<float>(a.v[i]); });
}
inline VecI16 to_bits(const Vec16& a) {
  VecI16 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline Vec16 from_bits(const VecI16& a) {
  Vec16 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline Vec16 round_even(const Vec16& a) {
  return each_lane([&](int i) { return std::nearbyint(a.v[i]); });
}

inline float sum(Vec16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}
inline float max_across(Vec16 a) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; i++) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  }
  return a.v[0];
}

// 16 floats to int64, rounded to nearest even (|x| < 2^63), and back, rounded once.
inline void store_int64(int64_t* p, const Vec16& a) {
  for (int i = 0; i < 16; i++) p[i] = std::llrint(a.v[i]);
}
inline Vec16 load_int64(const int64_t* p) {
  return each_lane([&](int i) { return static_cast<float>(p[i]); });
}

}  // namespace TM_ISA
}  // namespace tunemesh
