// AdamW, to the bit as backend.h writes it; test/native/adamw_vectors.json has its test vectors.
//
//   order   every operation is one IEEE 754 float32 operation, rounded to nearest even: + - * and
//           also / and sqrt are the correctly rounded ones (divps and sqrtps; __fdiv_rn and
//           __fsqrt_rn on a GPU). Nothing is fused, subnormal numbers are kept
//   scalars learning_rate * weight_decay and learning_rate / bias_correction1 are float32
//   operations
//           done once; 1 - beta1 and 1 - beta2 are float64 ones, then rounded to float32
//   floor   28 bytes an element: bound by memory
//   source  Loshchilov & Hutter 2019, in the order of PyTorch's single-tensor AdamW
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/simd.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

void adamw(const TmAdamW& a, Range elements) {
  const Vec16 decay = set1(a.learning_rate * a.weight_decay);
  const Vec16 one_minus_beta1 = set1(static_cast<float>(1.0 - a.beta1));
  const Vec16 one_minus_beta2 = set1(static_cast<float>(1.0 - a.beta2));
  const Vec16 beta2 = set1(static_cast<float>(a.beta2)), clip = set1(a.clip_factor),
              epsilon = set1(a.epsilon);
  const Vec16 correction2 = set1(a.bias_correction2_sqrt);
  const Vec16 step_size = set1(a.learning_rate / a.bias_correction1);
  const bool decays = a.weight_decay != 0.0f;
  for (size_t i = elements.begin; i < elements.end; i += 16) {
    const size_t left = elements.end - i;
    const Vec16 g = load_up_to(a.gradient + i, left) * clip;
    Vec16 p = load_up_to(a.p + i, left);
    if (decays) p = p - p * decay;
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
