#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace tunemesh::cuda {
namespace {

__global__ void forward_kernel(TmSwiGlu a) {
  const size_t in = size_t{blockIdx.x} * a.in_stride, out = size_t{blockIdx.x} * a.out_stride;
  for_each_column(a.d, [&](size_t j) {
    const float gate = a.gate[in + j];
    a.out[out + j] = gate / (1.0f + expf(-gate)) * a.up[in + j];
  });
}

__global__ void backward_kernel(TmSwiGluBackward a) {
  const size_t in = size_t{blockIdx.x} * a.in_stride, out = size_t{blockIdx.x} * a.out_stride;
  for_each_column(a.d, [&](size_t j) {
    const float gate = a.gate[in + j], up = a.up[in + j], dout = a.dout[out + j];
    const float sigmoid = 1.0f / (1.0f + expf(-gate));
    const float silu = gate * sigmoid;
    if (a.out != nullptr) a.out[out + j] = silu * up;
    a.dup[in + j] = dout * silu;
    a.dgate[in + j] = dout * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
  });
}

}  // namespace

void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  forward_kernel<<<element_grid(args.n, args.d), kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_forward", stream);
}

void swiglu_backward(const TmSwiGluBackward& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  backward_kernel<<<element_grid(args.n, args.d), kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_backward", stream);
}

}  // namespace tunemesh::cuda
