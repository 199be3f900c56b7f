// AdamW, to the bit as backend.h writes it; test/native/adamw_vectors.json has its test vectors.
//
//   order   every operation is one IEEE 754 float32 operation, rounded to nearest even: + - * and
//           also / and sqrt are the correctly rounded ones (divps and sqrtps; __fdiv_rn and
//           __fsqrt_rn on a GPU). Nothing is fused, subnormal numbers are kept
//   scalars learning_rate * weight_decay and learning_rate / bias_correction1 are float32
//           operations done once; 1 - beta1 and 1 - beta2 are float64 ones, then rounded to float32
//   here    tensors of floats; optimizer.cc cuts the work and updates half ones
//   floor   28 bytes an element: bound by memory
//   source  Loshchilov & Hutter 2019, in the order of PyTorch's single-tensor AdamW
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

void adamw(const AdamWSpan& a, const AdamWScalars& s) {
  const Vec16 clip = set1(s.clip), decay = set1(s.decay), beta2 = set1(s.beta2);
  const Vec16 one_minus_beta1 = set1(s.one_minus_beta1);
  const Vec16 one_minus_beta2 = set1(s.one_minus_beta2);
  const Vec16 correction2 = set1(s.correction2), epsilon = set1(s.epsilon);
  const Vec16 step_size = set1(s.step_size);
  for (size_t i = 0; i < a.n; i += 16) {
    const size_t left = a.n - i;
    const Vec16 g = load_up_to(a.gradient + i, left) * clip;
    Vec16 p = load_up_to(a.p + i, left);
    if (a.decays) p = p - p * decay;
    Vec16 m = load_up_to(a.m + i, left);
    m = m + (g - m) * one_minus_beta1;
    Vec16 v = load_up_to(a.v + i, left);
    v = v * beta2 + (g * g) * one_minus_beta2;
    const Vec16 denominator = sqrt(v) / correction2 + epsilon;
    store_up_to(a.p + i, p - step_size * (m / denominator), left);
    store_up_to(a.m + i, m, left);
    store_up_to(a.v + i, v, left);
  }
}

}  // namespace

void register_optimizer(OpsKernels& kernels) { kernels.adamw = adamw; }

}  // namespace TM_ISA
}  // namespace tunemesh
