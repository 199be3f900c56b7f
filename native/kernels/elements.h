// Part of the backend's table (backend.h): the type of its elements, and rows of them as 8-bit
// numbers.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Opaque to the engine, which computes no address from it but through element_bytes(). A backend
// whose elements are always float says so before it includes this header.
#ifdef TM_ELEMENT_IS_FLOAT
typedef float TmElement;
#else
typedef struct TmElement TmElement;
#endif

// Rows as e4m3 numbers (sign, 4 exponent, 3 mantissa bits; largest 448, no infinity) with one scale
// each, to the bit the same on every backend; all operations in float32:
//
//   largest   = max |x[j]| of the row, NaNs left out, but 2^-100 at least: a row of zeros is zeros
//   scales[i] = largest / 448
//   q[j]      = x[j] * (448 / largest), to the nearest e4m3, ties to even, at most 448; NaN is 0x7f
//
// x[j] is then about q[j] * scales[i]: within 1/16 of it, or 2^-10 scales[i] where that is more.
typedef struct {
  const TmElement* x;
  size_t x_stride;  // [n, c]
  uint8_t* q;       // [n, c], dense
  float* scales;    // [n]
  size_t n, c;
} TmQuantiseRows;

// A result's rows once more as e4m3 numbers (TmQuantiseRows), as the operation has rounded them to
// elements: q [n, c] dense, scales [n]. A null q: not wanted.
typedef struct {
  uint8_t* q;
  float* scales;
} TmQuantised;

#ifdef __cplusplus
}
#endif
