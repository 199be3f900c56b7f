#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/pack.cuh"

namespace tunemesh::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kElementThreads)
    pack_kernel(const float* rows, size_t n, Element* out) {
  using C = Chunk<Element>;
  const size_t at = (size_t{blockIdx.x} * kElementThreads + threadIdx.x) * C::kWidth;
  if (at >= n) return;
  const FloatsBeside<C::kWidth> values(rows + at, n - at);
  C::rounded(values.at).store(out + at, n - at);
}

}  // namespace

template <typename Element>
void pack_rows(const float* rows, size_t n, Element* out, cudaStream_t stream) {
  if (n == 0) return;
  const size_t chunks = chunks_of<Element>(n);
  const unsigned grid = static_cast<unsigned>((chunks + kElementThreads - 1) / kElementThreads);
  pack_kernel<Element><<<grid, kElementThreads, 0, stream>>>(rows, n, out);
  CUDA_CHECK_LAUNCH("pack_rows", stream);
}

template void pack_rows<float>(const float*, size_t, float*, cudaStream_t);
template void pack_rows<Bfloat16>(const float*, size_t, Bfloat16*, cudaStream_t);

}  // namespace tunemesh::cuda
