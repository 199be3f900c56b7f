#include "kernels/cuda/gemm_plan.h"

namespace tunemesh::cuda {
namespace {

// The largest power of two up to 256 that divides an address; the heuristic takes it into account.
uint32_t alignment_of(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<uint32_t>(address & (~address + 1));
}

class Preference {
 public:
  explicit Preference(const CublasLt& library) : library_(library) {
    library.check(library.cublasLtMatmulPreferenceCreate(&handle_),
                  "cublasLtMatmulPreferenceCreate");
  }
  ~Preference() { library_.cublasLtMatmulPreferenceDestroy(handle_); }
  Preference(const Preference&) = delete;
  Preference& operator=(const Preference&) = delete;

  template <typename Value>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, Value value) const {
    library_.check(
        library_.cublasLtMatmulPreferenceSetAttribute(handle_, attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
  }
  cublasLtMatmulPreference_t get() const { return handle_; }

 private:
  const CublasLt& library_;
  cublasLtMatmulPreference_t handle_ = nullptr;
};

}  // namespace

uint64_t GemmOperands::alignments() const {
  return uint64_t{alignment_of(a)} | uint64_t{alignment_of(b)} << 9 |
         uint64_t{alignment_of(c)} << 18 | uint64_t{alignment_of(addend)} << 27;
}

GemmPlan::GemmPlan(const CublasLt& owner) : library(owner) {
  library.check(library.cublasLtMatmulDescCreate(&operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                "cublasLtMatmulDescCreate");
}

GemmPlan::~GemmPlan() {
  for (cublasLtMatrixLayout_t layout : {a, b, c, addend}) {
    if (layout != nullptr) library.cublasLtMatrixLayoutDestroy(layout);
  }
  library.cublasLtMatmulDescDestroy(operation);
}

void GemmPlan::lay_out(cublasLtMatrixLayout_t* out, cudaDataType_t type, size_t rows,
                       size_t columns, size_t stride) const {
  library.check(
      library.cublasLtMatrixLayoutCreate(out, type, rows, columns, static_cast<int64_t>(stride)),
      "cublasLtMatrixLayoutCreate");
}

cublasStatus_t GemmPlan::choose_algorithm(const GemmOperands& operands) {
  const Preference preference(library);
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kGemmWorkspaceBytes});
  preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(operands.a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(operands.b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                 alignment_of(operands.addend != nullptr ? operands.addend : operands.c));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(operands.c));
  cublasLtMatmulHeuristicResult_t best = {};
  int num_found = 0;
  const cublasStatus_t status = library.cublasLtMatmulAlgoGetHeuristic(
      library.handle(), operation, a, b, added(), c, preference.get(), 1, &best, &num_found);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  if (num_found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  algorithm = best.algo;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace tunemesh::cuda
