// A logical vector of 16 floats, the same on every instruction path.
//
// Each *_isa.cc is compiled three times (native/CMakeLists.txt) in a namespace named by TM_ISA:
// isa_generic (plain loops and std::fma: slow, the same bits), isa_avx2 (two ymm), isa_avx512 (one
// zmm). Code written with Vec16 alone gives the same bits on all three: every operation is
// correctly rounded, and the horizontal sum and maximum are one fixed tree (i + i+8, +4, +2, +1).
//
//   max(a, b)   a > b ? a : b; min(a, b)   a < b ? a : b: b where one of them is NaN
//   *_tail      the first n < 16 lanes; the others are neither read nor written, and load as 0
//   to_int      rounds to nearest, ties to even; |x| < 2^31
//
// Beware: an *_isa.cc must not instantiate templates of the standard library or inline functions of
// shared headers in its loops: the linker keeps one copy, perhaps the AVX-512 one, for every path.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>

#if defined(TM_ISA_avx2) || defined(TM_ISA_avx512)
#include <immintrin.h>
#endif

#ifndef TM_ISA
#error "simd.h belongs in *_isa.cc files, which are compiled with TM_ISA"
#endif

#if defined(TM_ISA_avx512)
#include "kernels/cpu/simd_avx512.h"
#elif defined(TM_ISA_avx2)
#include "kernels/cpu/simd_avx2.h"
#else
#include "kernels/cpu/simd_generic.h"
#endif

namespace tunemesh {
namespace TM_ISA {

inline Vec16 operator+(Vec16 a, Vec16 b) { return add(a, b); }
inline Vec16 operator-(Vec16 a, Vec16 b) { return sub(a, b); }
inline Vec16 operator*(Vec16 a, Vec16 b) { return mul(a, b); }
inline Vec16 operator/(Vec16 a, Vec16 b) { return div(a, b); }

// 2^n for -126 <= n <= 127, by writing the exponent field.
inline Vec16 pow2(VecI16 n) { return from_bits(shift_left<23>(add(n, set1_int(127)))); }

// Loads 16 lanes or, at the end of a row, the n < 16 that are left.
inline Vec16 load_up_to(const float* p, size_t n) { return n >= 16 ? load(p) : load_tail(p, n); }
inline void store_up_to(float* p, Vec16 v, size_t n) {
  if (n >= 16) {
    store(p, v);
  } else {
    store_tail(p, v, n);
  }
}

}  // namespace TM_ISA
}  // namespace tunemesh
