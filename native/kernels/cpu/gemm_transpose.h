// Transposes blocks of at most 16 x 16 floats in registers. Included by gemm_isa.cc only.
#pragma once

#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {

#if defined(TM_ISA_avx512)

inline void transpose_registers(__m512 (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
  // r[4q + j] holds column j of each 4-lane group, for rows 4q .. 4q + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512 a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Writes dst[j * dst_stride + i] = scale * src[i * src_stride + j] for i < num_rows, j <
// num_columns (both at most 16). Each j writes 16 lanes, in ascending order: what lies beyond
// num_rows is overwritten by the next j, and up to 16 floats after the last one are spoilt.
inline void transpose_block(const float* src, size_t src_stride, size_t num_rows,
                            size_t num_columns, float scale, float* dst, size_t dst_stride) {
  __m512 r[16];
  const __mmask16 lanes = first_lanes(num_columns);
  const __m512 factor = _mm512_set1_ps(scale);
#pragma GCC unroll 16
  for (size_t i = 0; i < 16; i++) {
    const __mmask16 row_lanes = i < num_rows ? lanes : static_cast<__mmask16>(0);
    r[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(row_lanes, src + i * src_stride), factor);
  }
  transpose_registers(r);
#pragma GCC unroll 16
  for (size_t j = 0; j < 16; j++) {
    if (j < num_columns) _mm512_storeu_ps(dst + j * dst_stride, r[j]);
  }
}

#elif defined(TM_ISA_avx2)

inline void transpose_registers(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
    t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

// As on the AVX-512 path, in blocks of 8 x 8; where num_rows <= 8 each j writes 8 lanes.
inline void transpose_block(const float* src, size_t src_stride, size_t num_rows,
                            size_t num_columns, float scale, float* dst, size_t dst_stride) {
  const __m256 factor = _mm256_set1_ps(scale);
  for (size_t row = 0; row < num_rows; row += 8) {
    for (size_t column = 0; column < num_columns; column += 8) {
      const size_t left = num_columns - column;
      const __m256i lanes = first_lanes(left < 8 ? left : 8, 0);
      __m256 r[8];
#pragma GCC unroll 8
      for (size_t i = 0; i < 8; i++) {
        const float* from = src + (row + i) * src_stride + column;
        r[i] = row + i < num_rows ? _mm256_mul_ps(_mm256_maskload_ps(from, lanes), factor)
                                  : _mm256_setzero_ps();
      }
      transpose_registers(r);
#pragma GCC unroll 8
      for (size_t j = 0; j < 8; j++) {
        if (column + j < num_columns) _mm256_storeu_ps(dst + (column + j) * dst_stride + row, r[j]);
      }
    }
  }
}

#else

inline void transpose_block(const float* src, size_t src_stride, size_t num_rows,
                            size_t num_columns, float scale, float* dst, size_t dst_stride) {
  for (size_t i = 0; i < num_rows; i++) {
    for (size_t j = 0; j < num_columns; j++) {
      dst[j * dst_stride + i] = src[i * src_stride + j] * scale;
    }
  }
}

#endif

}  // namespace TM_ISA
}  // namespace tunemesh
