// Products of e4m3 rows with a scale each, by cuBLASLt (outer-vector scaling): on Hopper, from
// cuBLASLt 12.9 on. Results are bfloat16.
//
//   c[i, j] = a_scales[j] b_scales[i] sum_k a[j, k] b[i, k] + addend[i, j]
//
//   shapes  row-major: a [m, k] (a weight), b [n, k], both dense; c, addend [n, m] in rows of their
//           own. m, k and strides are multiples of TM_FP8_MULTIPLE, pointers of 16 bytes
//   numbers products exact; sums in the tensor cores' own accumulator ("fast accumulation", some 14
//           bits, as DeepSeek-V3's report 3.5.2 found on Hopper): an error below e4m3's own.
//           Scales, alpha and the addend in float32, one rounding to bfloat16
//   order   as gemm.h: one algorithm for each shape, no atomics
//   memory  the workspace of Gemm, whose calls are on the same stream
//   floor   2 n m k flops at some 1.3 PFLOP/s (bench/peers/ceilings.py measures it)
#pragma once
#include <map>
#include <memory>
#include <tuple>

#include "kernels/cuda/gemm.h"

namespace tunemesh::cuda {

class Fp8Gemm {
 public:
  // Throws TM_BAD_ARGUMENT where the library has no such products for this card, which it names.
  Fp8Gemm(const Gemm& gemm, const std::string& card);
  ~Fp8Gemm();

  struct Product {
    const uint8_t *a, *b;
    const float *a_scales, *b_scales;
    void* c;
    size_t m, n, k, c_stride;
    const void* addend = nullptr;
    size_t addend_stride = 0;
  };
  // False, and nothing done, where there is an addend and the library has no algorithm that adds.
  bool multiply(const Product& product, cudaStream_t stream);

 private:
  using Key = std::tuple<size_t, size_t, size_t, size_t, size_t, uint64_t>;

  const GemmPlan* plan_for(const Product& product);
  std::unique_ptr<GemmPlan> make_plan(const Product& product) const;

  const CublasLt& library_;
  void* const workspace_;
  std::map<Key, std::unique_ptr<GemmPlan>> plans_;  // null: no algorithm
};

}  // namespace tunemesh::cuda
