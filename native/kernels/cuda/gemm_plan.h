// What products by cuBLASLt share, whatever their elements: descriptors and algorithm of one shape.
//
//   order   the first algorithm that the library's heuristic gives for the shape, strides,
//           alignments and a workspace of kGemmWorkspaceBytes. Sums split over the inner size are
//           added by a second kernel in a fixed order, never by atomics
#pragma once
#include <cstdint>

#include "kernels/cuda/cublaslt.h"

namespace tunemesh::cuda {

constexpr size_t kGemmWorkspaceBytes = size_t{32} << 20;
// Shapes of one run are few; a caller with ever new ones starts over here.
constexpr size_t kMostGemmPlans = 4096;

// Column-major: c = op(a) op(b) + addend; addend null: none, or c itself.
struct GemmOperands {
  const void *a, *b, *addend, *c;
  // For keys of plans: at most 256 each, a power of two, so nine bits apiece and 36 in all.
  uint64_t alignments() const;
};

struct GemmPlan {
  // Sums in float32, and no algorithm yet.
  explicit GemmPlan(const CublasLt& library);
  ~GemmPlan();
  GemmPlan(const GemmPlan&) = delete;
  GemmPlan& operator=(const GemmPlan&) = delete;

  template <typename Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) const {
    library.check(
        library.cublasLtMatmulDescSetAttribute(operation, attribute, &value, sizeof value),
        "cublasLtMatmulDescSetAttribute");
  }
  void lay_out(cublasLtMatrixLayout_t* out, cudaDataType_t type, size_t rows, size_t columns,
               size_t stride) const;
  // Of what is added: c's own where there is no other.
  cublasLtMatrixLayout_t added() const { return addend != nullptr ? addend : c; }
  // Sets the algorithm. Not CUBLAS_STATUS_SUCCESS: the library has none.
  cublasStatus_t choose_algorithm(const GemmOperands& operands);

  const CublasLt& library;
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr;
  cublasLtMatrixLayout_t addend = nullptr;  // null: as c
  cublasLtMatmulAlgo_t algorithm = {};
};

}  // namespace tunemesh::cuda
