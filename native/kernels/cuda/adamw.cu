#include "kernels/cuda/adamw.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/grid.cuh"

namespace tunemesh::cuda {
namespace {

struct Scalars {
  float clip, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon, step_size;
  bool decays;
};

__device__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ float minus(float a, float b) { return __fsub_rn(a, b); }

__global__ void adamw_kernel(TmAdamW a, Scalars s) {
  for_each_element(a.n, [&](size_t i) {
    const float g = multiply(a.gradient[i], s.clip);
    float p = a.p[i];
    if (s.decays) p = minus(p, multiply(p, s.decay));
    const float m = plus(a.m[i], multiply(minus(g, a.m[i]), s.one_minus_beta1));
    const float squared = multiply(multiply(g, g), s.one_minus_beta2);
    const float v = plus(multiply(a.v[i], s.beta2), squared);
    const float denominator = plus(__fdiv_rn(__fsqrt_rn(v), s.correction2), s.epsilon);
    a.p[i] = minus(p, multiply(s.step_size, __fdiv_rn(m, denominator)));
    a.m[i] = m;
    a.v[i] = v;
  });
}

}  // namespace

void adamw(const TmAdamW& args, cudaStream_t stream) {
  if (args.n == 0) return;
  Scalars s{};
  s.clip = args.clip_factor;
  s.decay = args.learning_rate * args.weight_decay;
  s.one_minus_beta1 = static_cast<float>(1.0 - args.beta1);
  s.beta2 = static_cast<float>(args.beta2);
  s.one_minus_beta2 = static_cast<float>(1.0 - args.beta2);
  s.correction2 = args.bias_correction2_sqrt;
  s.epsilon = args.epsilon;
  s.step_size = args.learning_rate / args.bias_correction1;
  s.decays = args.weight_decay != 0.0f;
  adamw_kernel<<<vector_grid(args.n), kElementThreads, 0, stream>>>(args, s);
  CUDA_CHECK_LAUNCH("adamw", stream);
}

}  // namespace tunemesh::cuda
