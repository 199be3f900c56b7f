#include "kernels/cuda/fp8_gemm.h"

#include <string>

namespace tunemesh::cuda {

struct Fp8Plan {
  explicit Fp8Plan(const CublasLt& owner) : library(owner) {}
  ~Fp8Plan() {
    for (cublasLtMatrixLayout_t layout : {a, b, c, addend}) {
      if (layout != nullptr) library.cublasLtMatrixLayoutDestroy(layout);
    }
    if (operation != nullptr) library.cublasLtMatmulDescDestroy(operation);
  }
  Fp8Plan(const Fp8Plan&) = delete;
  Fp8Plan& operator=(const Fp8Plan&) = delete;

  template <typename Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) const {
    library.check(
        library.cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value),
        "cublasLtMatmulDescSetAttribute");
  }
  void set_scales(const Fp8Gemm::Product& product) const {
    set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.a_scales);
    set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.b_scales);
  }

  const CublasLt& library;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatrixLayout_t addend = nullptr;  // null: as c
  cublasLtMatmulAlgo_t algorithm = {};
};

namespace {

// Shapes of one run are few; a caller with ever new ones starts over here.
constexpr size_t kMostPlans = 4096;

// The largest power of two up to 256 that divides an address.
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

void set_preferences(const Preference& preference, const Fp8Gemm::Product& p) {
  const void* const added = p.addend != nullptr ? p.addend : p.c;
  preference.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kGemmWorkspaceBytes});
  preference.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                 static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(p.a));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(p.b));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(added));
  preference.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(p.c));
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
  const Fp8Plan* const plan = plan_for(p);
  const bool has_addend = p.addend != nullptr;
  if (plan == nullptr && has_addend) return false;
  if (plan == nullptr) {
    throw CudaFailure(TM_DEVICE_ERROR, "cuBLASLt " + library_.version() +
                                           " has no algorithm for an fp8 product of " +
                                           shape_text(p));
  }
  plan->set_scales(p);
  const float alpha = 1.0f, beta = has_addend ? 1.0f : 0.0f;
  library_.check(library_.cublasLtMatmul(library_.handle(), plan->operation, &alpha, p.a, plan->a,
                                         p.b, plan->b, &beta, has_addend ? p.addend : p.c,
                                         has_addend ? plan->addend : plan->c, p.c, plan->c,
                                         &plan->algorithm, workspace_, kGemmWorkspaceBytes, stream),
                 "cublasLtMatmul of e4m3 rows");
  return true;
}

const Fp8Plan* Fp8Gemm::plan_for(const Product& p) {
  // Alignments of at most 256, a power of two each: nine bits apiece.
  const uint64_t alignments = uint64_t{alignment_of(p.a)} | uint64_t{alignment_of(p.b)} << 9 |
                              uint64_t{alignment_of(p.c)} << 18 |
                              uint64_t{alignment_of(p.addend)} << 27;
  const uint64_t kind = alignments | (p.addend != nullptr ? uint64_t{1} << 36 : 0);
  const Key key{p.m, p.n, p.k, p.c_stride, p.addend_stride, kind};
  const auto known = plans_.find(key);
  if (known != plans_.end()) return known->second.get();
  if (plans_.size() >= kMostPlans) plans_.clear();
  return plans_.emplace(key, make_plan(p)).first->second.get();
}

// Null where the library has no algorithm.
std::unique_ptr<Fp8Plan> Fp8Gemm::make_plan(const Product& p) const {
  auto plan = std::make_unique<Fp8Plan>(library_);
  library_.check(
      library_.cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
      "cublasLtMatmulDescCreate");
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
  plan->set_scales(p);
  const auto layout = [&](cublasLtMatrixLayout_t* out, cudaDataType_t type, size_t rows,
                          size_t columns, size_t stride) {
    library_.check(
        library_.cublasLtMatrixLayoutCreate(out, type, rows, columns, static_cast<int64_t>(stride)),
        "cublasLtMatrixLayoutCreate");
  };
  layout(&plan->a, CUDA_R_8F_E4M3, p.k, p.m, p.k);
  layout(&plan->b, CUDA_R_8F_E4M3, p.k, p.n, p.k);
  layout(&plan->c, CUDA_R_16BF, p.m, p.n, p.c_stride);
  if (p.addend != nullptr) layout(&plan->addend, CUDA_R_16BF, p.m, p.n, p.addend_stride);
  const Preference preference(library_);
  set_preferences(preference, p);
  cublasLtMatmulHeuristicResult_t best = {};
  int num_found = 0;
  const cublasStatus_t status =
      library_.cublasLtMatmulAlgoGetHeuristic(library_.handle(), plan->operation, plan->a, plan->b,
                                              p.addend != nullptr ? plan->addend : plan->c, plan->c,
                                              preference.get(), 1, &best, &num_found);
  if (status != CUBLAS_STATUS_SUCCESS || num_found == 0) return nullptr;
  plan->algorithm = best.algo;
  return plan;
}

}  // namespace tunemesh::cuda
