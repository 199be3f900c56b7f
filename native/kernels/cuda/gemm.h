// Matrix products by cuBLASLt, of float32 or bfloat16 elements, with sums in float32.
//   forward         y = alpha x w^T          x [n, in], w [out, in], y [n, out]
//   backward_input  x_grad = alpha y_grad w
//   weight_grad     dw = alpha dy^T x        float32 whatever the elements
//
//   layout  row-major here is column-major there with rows and columns exchanged, so each product
//           is asked for as its transpose. Strides are leading dimensions
//   numbers CUBLAS_COMPUTE_32F: products and sums in float32, no tf32. A bfloat16 result is rounded
//           once, after alpha and what is added to it
//   skinny  bfloat16 products of up to 64 columns that add nothing, as a group's tails are: by the
//           plugin's own kernel (skinny_product.cuh)
//   order   one algorithm for each shape (gemm_plan.h), kept as long as the context lives. The same
//           library on the same kind of card gives the same bits
//   memory  one workspace, made with the context; calls follow each other on one stream
//   floor   2 n in out flops
#pragma once
#include <map>
#include <memory>
#include <tuple>

#include "kernels/backend.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/gemm_plan.h"

namespace tunemesh::cuda {

class Gemm {
 public:
  Gemm(TmPrecision precision, const std::string& library_folder);
  ~Gemm();

  void forward(const TmLinear& args, cudaStream_t stream);
  void backward_input(const TmLinear& args, cudaStream_t stream);
  void weight_grad(const TmLinearWeightGrad& args, cudaStream_t stream);
  const CublasLt& library() const { return library_; }
  size_t workspace_bytes() const { return workspace_.bytes(); }

  // c [m, n] = alpha op(a) op(b) + what is added, column-major, inner size k.
  struct Product {
    const void *a, *b;
    void* c;
    bool transposes_a, transposes_b;
    size_t m, n, k, a_stride, b_stride, c_stride;
    float alpha;
    bool accumulates;
    cudaDataType_t result;  // of c; a and b are elements
    // Null, or of c's type: a matrix [m, n], and a vector [m] added to each column.
    const void* addend = nullptr;
    size_t addend_stride = 0;
    const void* bias = nullptr;
  };
  void multiply(const Product& product, cudaStream_t stream);
  cudaDataType_t element() const { return element_; }
  // kGemmWorkspaceBytes of scratch for whatever runs on the same stream.
  void* workspace() const { return workspace_.data(); }

 private:
  // False, and nothing done, where the product is not one of few columns (skinny_product.cuh).
  bool multiply_skinny(const Product& product, cudaStream_t stream) const;

  using Key = std::tuple<int, size_t, size_t, size_t, size_t, size_t, size_t, size_t, uint64_t>;

  const GemmPlan& plan_for(const Product& product);
  std::unique_ptr<GemmPlan> make_plan(const Product& product) const;

  // The rows of a weight that products read: elements, row-major.
  const void* operand_of(const TmWeight& weight) const;

  cudaDataType_t element_;
  CublasLt library_;
  DeviceBuffer workspace_;
  std::map<Key, std::unique_ptr<GemmPlan>> plans_;
};

}  // namespace tunemesh::cuda
