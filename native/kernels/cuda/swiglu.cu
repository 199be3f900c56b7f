#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/fp8_rows.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace tunemesh::cuda {
namespace {

template <typename Element>
__device__ inline Chunk<Element> gated(const Chunk<Element>& gate, const Chunk<Element>& up) {
  using C = Chunk<Element>;
  float out[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) out[i] = gate[i] * sigmoid_of<Element>(gate[i]) * up[i];
  return C::rounded(out);
}

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) forward_kernel(TmSwiGlu a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.d) return;
  const size_t in = place.row * a.in_stride + column, left = a.d - column;
  const C gate = C::load(elements<Element>(a.gate) + in, left);
  const C up = C::load(elements<Element>(a.up) + in, left);
  gated(gate, up).store(elements<Element>(a.out) + place.row * a.out_stride + column, left);
}

// A chunk's results; `in` and `outer` are its places in rows of gate and of out, which is written.
template <typename Element>
struct GradientChunks {
  using C = Chunk<Element>;
  C dgate, dup;

  __device__ GradientChunks(const TmSwiGluBackward& a, size_t in, size_t outer, size_t left) {
    const C gates = C::load(elements<Element>(a.gate) + in, left);
    const C ups = C::load(elements<Element>(a.up) + in, left);
    const C douts = C::load(elements<Element>(a.dout) + outer, left);
    float out[C::kWidth], of_gate[C::kWidth], of_up[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) {
      const float gate = gates[i], up = ups[i], dout = douts[i];
      const float sigmoid = sigmoid_of<Element>(gate);
      const float silu = gate * sigmoid;
      out[i] = silu * up;
      of_up[i] = dout * silu;
      of_gate[i] = dout * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
    }
    if (a.out != nullptr) C::rounded(out).store(elements<Element>(a.out) + outer, left);
    dup = C::rounded(of_up);
    dgate = C::rounded(of_gate);
  }
};

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) backward_kernel(TmSwiGluBackward a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.d) return;
  const size_t in = place.row * a.in_stride + column, left = a.d - column;
  const GradientChunks<Element> made(a, in, place.row * a.out_stride + column, left);
  made.dup.store(elements<Element>(a.dup) + in, left);
  made.dgate.store(elements<Element>(a.dgate) + in, left);
}

// The same with rows that are quantised too.
template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads, kRowBlocks<kThreads>)
    forward_row_kernel(TmSwiGlu a, bool fits) {
  using C = Chunk<Element>;
  const size_t row = blockIdx.x;
  const Element* gate = elements<Element>(a.gate) + row * a.in_stride;
  const Element* up = elements<Element>(a.up) + row * a.in_stride;
  MadeRow<Element, kThreads> out(elements<Element>(a.out) + row * a.out_stride, fits);
#pragma unroll 1
  for (size_t i = threadIdx.x * C::kWidth; i < a.d; i += size_t{kThreads} * C::kWidth) {
    const size_t left = a.d - i;
    out.write(gated(C::load(gate + i, left), C::load(up + i, left)), i, left);
  }
  out.quantise(a.quantised, row, a.d);
}

template <typename Element, int kThreads>
__global__ void __launch_bounds__(kThreads, kRowBlocks<kThreads>)
    backward_row_kernel(TmSwiGluBackward a, bool fits) {
  using C = Chunk<Element>;
  const size_t row = blockIdx.x, in = row * a.in_stride, outer = row * a.out_stride;
  MadeRow<Element, kThreads> both(elements<Element>(a.dgate) + in, fits);
#pragma unroll 1
  for (size_t i = threadIdx.x * C::kWidth; i < a.d; i += size_t{kThreads} * C::kWidth) {
    const GradientChunks<Element> made(a, in + i, outer + i, a.d - i);
    both.write(made.dgate, i, a.d - i);
    both.write(made.dup, a.d + i, a.d - i);
  }
  both.quantise(a.quantised, row, 2 * a.d);
}

template <typename Element>
bool is_wide(size_t d) {
  return chunks_of<Element>(d) > 4 * kNarrowRowThreads;
}

}  // namespace

template <typename Element>
void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  if (args.quantised.q != nullptr) {
    is_wide<Element>(args.d)
        ? launch_made_rows<Element, kWideRowThreads>(forward_row_kernel<Element, kWideRowThreads>,
                                                     args, args.d, stream)
        : launch_made_rows<Element, kNarrowRowThreads>(
              forward_row_kernel<Element, kNarrowRowThreads>, args, args.d, stream);
    return CUDA_CHECK_LAUNCH("swiglu_forward, quantised", stream);
  }
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.d));
  forward_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_forward", stream);
}

template <typename Element>
void swiglu_backward(const TmSwiGluBackward& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  if (args.quantised.q != nullptr) {
    is_wide<Element>(args.d)
        ? launch_made_rows<Element, kWideRowThreads>(backward_row_kernel<Element, kWideRowThreads>,
                                                     args, 2 * args.d, stream)
        : launch_made_rows<Element, kNarrowRowThreads>(
              backward_row_kernel<Element, kNarrowRowThreads>, args, 2 * args.d, stream);
    return CUDA_CHECK_LAUNCH("swiglu_backward, quantised", stream);
  }
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.d));
  backward_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("swiglu_backward", stream);
}

template void swiglu_forward<float>(const TmSwiGlu&, cudaStream_t);
template void swiglu_forward<Bfloat16>(const TmSwiGlu&, cudaStream_t);
template void swiglu_backward<float>(const TmSwiGluBackward&, cudaStream_t);
template void swiglu_backward<Bfloat16>(const TmSwiGluBackward&, cudaStream_t);

}  // namespace tunemesh::cuda
