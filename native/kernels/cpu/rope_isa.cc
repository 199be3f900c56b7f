// Rotary positions in place: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (i, i + F/2) of
// each head.
//
//   shapes  x [n, heads * F] in rows of x_stride; cos, sin [max_position, F/2]; F even.
//           `inverse` negates sin
//   order   a' = fnma(b, sin, a cos), b' = fma(a, sin, b cos)
//   floor   8 bytes an element: bound by memory
//   source  Su et al. 2021, in the split-half form of the Hugging Face Llama code
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

void rope(const TmRope& a, Range rows) {
  const size_t half = a.head_size / 2;
  for (size_t i = rows.begin; i < rows.end; ++i) {
    const float* cos = a.cos + static_cast<size_t>(a.positions[i]) * half;
    const float* sin = a.sin + static_cast<size_t>(a.positions[i]) * half;
    for (size_t j = 0; j < half; j += 16) {
      const size_t left = half - j;
      const Vec16 c = load_up_to(cos + j, left);
      const Vec16 plain = load_up_to(sin + j, left);
      const Vec16 s = a.inverse ? neg(plain) : plain;
      for (size_t h = 0; h < a.heads; ++h) {
        float* low = a.x + i * a.x_stride + h * a.head_size + j;
        float* high = low + half;
        const Vec16 x = load_up_to(low, left), y = load_up_to(high, left);
        store_up_to(low, fnma(y, s, x * c), left);
        store_up_to(high, fma(x, s, y * c), left);
      }
    }
  }
}

}  // namespace

void register_rope(OpsKernels& kernels) { kernels.rope = rope; }

}  // namespace TM_ISA
}  // namespace tunemesh
