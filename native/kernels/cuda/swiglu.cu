#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace tunemesh::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) forward_kernel(TmSwiGlu a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.d) return;
  const size_t in = place.row * a.in_stride + column, left = a.d - column;
  const C gate = C::load(elements<Element>(a.gate) + in, left);
  const C up = C::load(elements<Element>(a.up) + in, left);
  float out[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) out[i] = gate[i] * sigmoid_of<Element>(gate[i]) * up[i];
  C::rounded(out).store(elements<Element>(a.out) + place.row * a.out_stride + column, left);
}

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) backward_kernel(TmSwiGluBackward a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.d) return;
  const size_t in = place.row * a.in_stride + column, left = a.d - column;
  const size_t outer = place.row * a.out_stride + column;
  const C gates = C::load(elements<Element>(a.gate) + in, left);
  const C ups = C::load(elements<Element>(a.up) + in, left);
  const C douts = C::load(elements<Element>(a.dout) + outer, left);
  float out[C::kWidth], dgate[C::kWidth], dup[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) {
    const float gate = gates[i], up = ups[i], dout = douts[i];
    const float sigmoid = sigmoid_of<Element>(gate);
    const float silu = gate * sigmoid;
    out[i] = silu * up;
    dup[i] = dout * silu;
    dgate[i] = dout * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
  }
  if (a.out != nullptr) C::rounded(out).store(elements<Element>(a.out) + outer, left);
  C::rounded(dup).store(elements<Element>(a.dup) + in, left);
  C::rounded(dgate).store(elements<Element>(a.dgate) + in, left);
}

}  // namespace

template <typename Element>
void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.d));
  forward_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_forward", stream);
}

template <typename Element>
void swiglu_backward(const TmSwiGluBackward& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.d));
  backward_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_backward", stream);
}

template void swiglu_forward<float>(const TmSwiGlu&, cudaStream_t);
template void swiglu_forward<Bfloat16>(const TmSwiGlu&, cudaStream_t);
template void swiglu_backward<float>(const TmSwiGluBackward&, cudaStream_t);
template void swiglu_backward<Bfloat16>(const TmSwiGluBackward&, cudaStream_t);

}  // namespace tunemesh::cuda
