#include "kernels/cuda/fp8_gemm.h"

#include <string>

namespace tunemesh::cuda {

namespace {

void set_scales(const GemmPlan& plan, const Fp8Gemm::Product& product) {
  plan.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.a_scales);
  plan.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.b_scales);
}

std::string shape_text(const Fp8Gemm::Product& p) {
  return "m " + std::to_string(p.m) + " n " + std::to_string(p.n) + " k " + std::to_string(p.k);
}

}  // namespace

Fp8Gemm::Fp8Gemm(const Gemm& gemm, const std::string& card)
    : library_(gemm.library()), workspace_(gemm.workspace()) {
  // Pointers are only asked for their alignment here.
  Product probe = {};
  probe.a = probe.b = static_cast<const uint8_t*>(workspace_);
  probe.a_scales = probe.b_scales = static_cast<const float*>(workspace_);
  probe.c = workspace_;
  probe.m = probe.n = probe.k = probe.c_stride = 256;
  if (make_plan(probe) != nullptr) return;
  throw CudaFailure(TM_BAD_ARGUMENT,
                    "an fp8 base needs a card with row-scaled fp8 products in cuBLASLt 12.9 or "
                    "newer (Hopper: H100, H200); " +
                        card + " with cuBLASLt " + library_.version() +
                        " has none. Train in bf16 instead");
}
Fp8Gemm::~Fp8Gemm() = default;

bool Fp8Gemm::multiply(const Product& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return true;
  const GemmPlan* const plan = plan_for(p);
  const bool has_addend = p.addend != nullptr;
  if (plan == nullptr && has_addend) return false;
  if (plan == nullptr) {
    throw CudaFailure(TM_DEVICE_ERROR, "cuBLASLt " + library_.version() +
                                           " has no algorithm for an fp8 product of " +
                                           shape_text(p));
  }
  set_scales(*plan, p);
  const float alpha = 1.0f, beta = has_addend ? 1.0f : 0.0f;
  library_.check(
      library_.cublasLtMatmul(library_.handle(), plan->operation, &alpha, p.a, plan->a, p.b,
                              plan->b, &beta, has_addend ? p.addend : p.c, plan->added(), p.c,
                              plan->c, &plan->algorithm, workspace_, kGemmWorkspaceBytes, stream),
      "cublasLtMatmul of e4m3 rows");
  return true;
}

const GemmPlan* Fp8Gemm::plan_for(const Product& p) {
  // An addend of alignment 256 is told from none by the bit behind the alignments.
  const uint64_t kind = GemmOperands{p.a, p.b, p.addend, p.c}.alignments() |
                        (p.addend != nullptr ? uint64_t{1} << 36 : 0);
  const Key key{p.m, p.n, p.k, p.c_stride, p.addend_stride, kind};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second.get();
  if (plans_.size() >= kMostGemmPlans) plans_.clear();
  return plans_.emplace(key, make_plan(p)).first->second.get();
}

// Null where the library has no algorithm.
std::unique_ptr<GemmPlan> Fp8Gemm::make_plan(const Product& p) const {
  auto plan = std::make_unique<GemmPlan>(library_);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  plan->set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
  const cublasLtMatmulMatrixScale_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
  for (const auto attribute :
       {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE}) {
    // Older libraries do not know the mode.
    if (library_.cublasLtMatmulDescSetAttribute(plan->operation, attribute, &mode, sizeof mode) !=
        CUBLAS_STATUS_SUCCESS) {
      return nullptr;
    }
  }
  set_scales(*plan, p);
  plan->lay_out(&plan->a, CUDA_R_8F_E4M3, p.k, p.m, p.k);
  plan->lay_out(&plan->b, CUDA_R_8F_E4M3, p.k, p.n, p.k);
  plan->lay_out(&plan->c, CUDA_R_16BF, p.m, p.n, p.c_stride);
  if (p.addend != nullptr) plan->lay_out(&plan->addend, CUDA_R_16BF, p.m, p.n, p.addend_stride);
  const cublasStatus_t status = plan->choose_algorithm({p.a, p.b, p.addend, p.c});
  return status == CUBLAS_STATUS_SUCCESS ? std::move(plan) : nullptr;
}

}  // namespace tunemesh::cuda
