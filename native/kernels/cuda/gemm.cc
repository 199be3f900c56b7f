#include "kernels/cuda/gemm.h"

#include <algorithm>

#include "kernels/cuda/skinny_product.cuh"

namespace tunemesh::cuda {

namespace {

std::string stated(const char* name, size_t value) {
  return std::string(" ") + name + " " + std::to_string(value);
}

void check_linear(const char* operation, const TmLinear& args) {
  const auto refuse = [&](const std::string& why) {
    throw CudaFailure(TM_BAD_ARGUMENT, std::string(operation) + ": " + why);
  };
  if (args.w.rows == nullptr && args.w.packed == nullptr) refuse("the weight has no data");
  if (args.x_stride < args.w.in || args.y_stride < args.w.out) {
    refuse("strides" + stated("x", args.x_stride) + stated("y", args.y_stride) +
           " are below the widths" + stated("in", args.w.in) + stated("out", args.w.out));
  }
}

size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_16BF ? 2 : 4; }

}  // namespace

Gemm::Gemm(TmPrecision precision, const std::string& library_folder)
    : element_(precision == TM_BF16 ? CUDA_R_16BF : CUDA_R_32F),
      library_(library_folder),
      workspace_(kGemmWorkspaceBytes) {}
Gemm::~Gemm() = default;

// Packed weights are plain rows of elements here; rows of floats serve where elements are floats.
const void* Gemm::operand_of(const TmWeight& weight) const {
  if (weight.packed != nullptr) return weight.packed;
  if (element_ == CUDA_R_32F) return weight.rows;
  throw CudaFailure(TM_BAD_ARGUMENT,
                    "a product of bf16 elements got a weight of floats; pack it first");
}

void Gemm::forward(const TmLinear& args, cudaStream_t stream) {
  check_linear("linear_forward", args);
  const size_t in = args.w.in, out = args.w.out;
  multiply({operand_of(args.w), args.x, args.y, true, false, out, args.n, in, in, args.x_stride,
            args.y_stride, args.alpha, args.accumulate != 0, element_},
           stream);
}

void Gemm::backward_input(const TmLinear& args, cudaStream_t stream) {
  check_linear("linear_backward_input", args);
  const size_t in = args.w.in, out = args.w.out;
  multiply({operand_of(args.w), args.y, const_cast<TmElement*>(args.x), false, false, in, args.n,
            out, in, args.y_stride, args.x_stride, args.alpha, args.accumulate != 0, element_},
           stream);
}

void Gemm::weight_grad(const TmLinearWeightGrad& args, cudaStream_t stream) {
  if (args.x_stride < args.in || args.dy_stride < args.out) {
    throw CudaFailure(TM_BAD_ARGUMENT, "linear_weight_grad: strides" + stated("x", args.x_stride) +
                                           stated("dy", args.dy_stride) + " are below the widths" +
                                           stated("in", args.in) + stated("out", args.out));
  }
  multiply({args.x, args.dy, args.dw, false, true, args.in, args.out, args.n, args.x_stride,
            args.dy_stride, args.in, args.alpha, args.accumulate != 0,
            args.is_element ? element_ : CUDA_R_32F},
           stream);
}

bool Gemm::multiply_skinny(const Product& p, cudaStream_t stream) const {
  if (element_ != CUDA_R_16BF || p.result != element_ || p.transposes_b || p.accumulates ||
      p.addend != nullptr || p.bias != nullptr) {
    return false;
  }
  const SkinnyProduct product = {static_cast<const Bfloat16*>(p.b),
                                 static_cast<const Bfloat16*>(p.a),
                                 static_cast<Bfloat16*>(p.c),
                                 p.b_stride,
                                 p.a_stride,
                                 p.c_stride,
                                 p.n,
                                 p.m,
                                 p.k,
                                 p.transposes_a,
                                 p.alpha};
  if (!skinny_product_fits(product)) return false;
  skinny_product(product, stream);
  return true;
}

void Gemm::multiply(const Product& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return;
  if (multiply_skinny(p, stream)) return;
  if (p.k == 0) {
    if (p.addend != nullptr || p.bias != nullptr) {
      throw CudaFailure(TM_BAD_ARGUMENT, "a product without inner size can't add anything");
    }
    if (p.accumulates) return;
    const size_t bytes = bytes_of(p.result);
    CUDA_CHECK(cudaMemset2DAsync(p.c, p.c_stride * bytes, 0, p.m * bytes, p.n, stream));
    return;
  }
  const GemmPlan& plan = plan_for(p);
  const bool has_addend = p.addend != nullptr;
  const float beta = p.accumulates || has_addend ? 1.0f : 0.0f;
  if (p.bias != nullptr) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  library_.check(
      library_.cublasLtMatmul(library_.handle(), plan.operation, &p.alpha, p.a, plan.a, p.b, plan.b,
                              &beta, has_addend ? p.addend : p.c, plan.added(), p.c, plan.c,
                              &plan.algorithm, workspace_.data(), workspace_.bytes(), stream),
      "cublasLtMatmul");
}

const GemmPlan& Gemm::plan_for(const Product& p) {
  const int kind = (p.transposes_a ? 1 : 0) | (p.transposes_b ? 2 : 0) |
                   (p.result == element_ ? 4 : 0) | (p.bias != nullptr ? 8 : 0) |
                   (p.addend != nullptr ? 16 : 0);
  const Key key{kind,
                p.m,
                p.n,
                p.k,
                p.a_stride,
                p.b_stride,
                p.c_stride,
                p.addend_stride,
                GemmOperands{p.a, p.b, p.addend, p.c}.alignments()};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return *known->second;
  if (plans_.size() >= kMostGemmPlans) plans_.clear();
  return *plans_.emplace(key, make_plan(p)).first->second;
}

std::unique_ptr<GemmPlan> Gemm::make_plan(const Product& p) const {
  auto plan = std::make_unique<GemmPlan>(library_);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSA, p.transposes_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  plan->set(CUBLASLT_MATMUL_DESC_TRANSB, p.transposes_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  plan->lay_out(&plan->a, element_, p.transposes_a ? p.k : p.m, p.transposes_a ? p.m : p.k,
                p.a_stride);
  plan->lay_out(&plan->b, element_, p.transposes_b ? p.n : p.k, p.transposes_b ? p.k : p.n,
                p.b_stride);
  plan->lay_out(&plan->c, p.result, p.m, p.n, p.c_stride);
  if (p.addend != nullptr) plan->lay_out(&plan->addend, p.result, p.m, p.n, p.addend_stride);
  if (p.bias != nullptr) plan->set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
  const cublasStatus_t status = plan->choose_algorithm({p.a, p.b, p.addend, p.c});
  if (status == CUBLAS_STATUS_SUCCESS) return plan;
  throw CudaFailure(TM_DEVICE_ERROR, "cuBLASLt " + library_.version() +
                                         " has no algorithm for a product of" + stated("m", p.m) +
                                         stated("n", p.n) + stated("k", p.k) + ": " +
                                         library_.cublasLtGetStatusString(status));
}

}  // namespace tunemesh::cuda
