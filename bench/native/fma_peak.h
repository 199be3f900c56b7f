// The multiply-add peak of a pool's threads: a register-only loop, for benchmarks to compare with.
#pragma once
#include <chrono>
#include <vector>

#include "kernels/cpu/thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tunemesh::bench {

inline volatile float fma_sink;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline double spin_avx512(size_t steps) {
  constexpr size_t kChains = 16;
  __m512 x[kChains];
  for (size_t i = 0; i < kChains; i++) x[i] = _mm512_set1_ps(1.0f + static_cast<float>(i));
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kChains; i++) x[i] = _mm512_fmadd_ps(x[i], a, b);
  }
  for (size_t i = 1; i < kChains; i++) x[0] = _mm512_add_ps(x[0], x[i]);
  fma_sink = _mm512_cvtss_f32(x[0]);
  return static_cast<double>(steps * kChains * 32);
}

__attribute__((target("avx2,fma"))) inline double spin_avx2(size_t steps) {
  constexpr size_t kChains = 12;
  __m256 x[kChains];
  for (size_t i = 0; i < kChains; i++) x[i] = _mm256_set1_ps(1.0f + static_cast<float>(i));
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  for (size_t s = 0; s < steps; s++) {
#pragma GCC unroll 12
    for (size_t i = 0; i < kChains; i++) x[i] = _mm256_fmadd_ps(x[i], a, b);
  }
  for (size_t i = 1; i < kChains; i++) x[0] = _mm256_add_ps(x[0], x[i]);
  fma_sink = _mm256_cvtss_f32(x[0]);
  return static_cast<double>(steps * kChains * 16);
}
#endif

constexpr size_t kSpinSteps = 200000;  // about 0.6 ms on a core with two AVX-512 units at 2.6 GHz

// One thread's loop; the floating-point operations it made.
inline double spin(bool is_avx512, size_t steps) {
#if defined(__x86_64__)
  return is_avx512 ? spin_avx512(steps) : spin_avx2(steps);
#else
  (void)is_avx512;
  (void)steps;
  return 1.0;
#endif
}

// flop/s of all threads, over some 40 ms.
inline double fma_peak(ThreadPool& pool, bool is_avx512) {
#if defined(__x86_64__)
  const size_t tasks = 64 * static_cast<size_t>(pool.num_threads());
  std::vector<double> flops(tasks);
  const auto start = std::chrono::steady_clock::now();
  pool.parallel_for(tasks, [&](size_t task, int) { flops[task] = spin(is_avx512, kSpinSteps); });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return flops[0] * static_cast<double>(tasks) / elapsed.count();
#else
  (void)pool;
  (void)is_avx512;
  return 1.0;
#endif
}

}  // namespace tunemesh::bench
