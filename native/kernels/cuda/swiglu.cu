#include "kernels/cuda/block_reduce.cuh"
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

// A chunk's results, written; `in` and `outer` are its places in rows of gate and of out.
template <typename Element>
struct GradientChunks {
  using C = Chunk<Element>;
  C dgate, dup;

  __device__ GradientChunks() = default;
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
    dup.store(elements<Element>(a.dup) + in, left);
    dgate.store(elements<Element>(a.dgate) + in, left);
  }
};

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) backward_kernel(TmSwiGluBackward a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.d) return;
  GradientChunks<Element>(a, place.row * a.in_stride + column, place.row * a.out_stride + column,
                          a.d - column);
}

// Rows that are quantised too are a block's each, and stay in registers until their largest
// magnitude is known: kKept chunks of a thread, what is beyond is read again.
constexpr int kRowThreads = 256;

template <typename Element>
__device__ inline size_t row_column(size_t k) {
  return (k * kRowThreads + threadIdx.x) * Chunk<Element>::kWidth;
}

template <typename Element, int kKept>
__global__ void __launch_bounds__(kRowThreads) forward_row_kernel(TmSwiGlu a) {
  using C = Chunk<Element>;
  const size_t row = blockIdx.x;
  const Element* gate = elements<Element>(a.gate) + row * a.in_stride;
  const Element* up = elements<Element>(a.up) + row * a.in_stride;
  Element* out = elements<Element>(a.out) + row * a.out_stride;
  C kept[kKept];
  float largest = 0;
  const auto write = [&](size_t column) {
    const size_t left = a.d - column;
    const C result = gated(C::load(gate + column, left), C::load(up + column, left));
    result.store(out + column, left);
    largest = largest_of(result, largest);
    return result;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (row_column<Element>(k) < a.d) kept[k] = write(row_column<Element>(k));
  }
#pragma unroll 1
  for (size_t k = kKept; row_column<Element>(k) < a.d; ++k) write(row_column<Element>(k));
  const RowScale scale(block_reduce<kRowThreads>(largest, Max()));
  if (threadIdx.x == 0) a.quantised.scales[row] = scale.scale;
  uint8_t* const q = a.quantised.q + row * a.d;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const size_t column = row_column<Element>(k);
    if (column < a.d) store_e4m3(kept[k], scale.inverse, q + column, a.d - column);
  }
#pragma unroll 1
  for (size_t k = kKept; row_column<Element>(k) < a.d; ++k) {
    const size_t column = row_column<Element>(k), left = a.d - column;
    store_e4m3(C::load(out + column, left), scale.inverse, q + column, left);
  }
}

template <typename Element, int kKept>
__global__ void __launch_bounds__(kRowThreads) backward_row_kernel(TmSwiGluBackward a) {
  using C = Chunk<Element>;
  const size_t row = blockIdx.x, in = row * a.in_stride, outer = row * a.out_stride;
  GradientChunks<Element> kept[kKept];
  float largest = 0;
  const auto write = [&](size_t column) {
    const GradientChunks<Element> result(a, in + column, outer + column, a.d - column);
    largest = largest_of(result.dgate, largest_of(result.dup, largest));
    return result;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (row_column<Element>(k) < a.d) kept[k] = write(row_column<Element>(k));
  }
#pragma unroll 1
  for (size_t k = kKept; row_column<Element>(k) < a.d; ++k) write(row_column<Element>(k));
  const RowScale scale(block_reduce<kRowThreads>(largest, Max()));
  if (threadIdx.x == 0) a.quantised.scales[row] = scale.scale;
  uint8_t* const q = a.quantised.q + row * 2 * a.d;
  const auto quantise = [&](const C& dgate, const C& dup, size_t column) {
    store_e4m3(dgate, scale.inverse, q + column, a.d - column);
    store_e4m3(dup, scale.inverse, q + a.d + column, a.d - column);
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const size_t column = row_column<Element>(k);
    if (column < a.d) quantise(kept[k].dgate, kept[k].dup, column);
  }
#pragma unroll 1
  for (size_t k = kKept; row_column<Element>(k) < a.d; ++k) {
    const size_t column = row_column<Element>(k), left = a.d - column;
    quantise(C::load(elements<Element>(a.dgate) + in + column, left),
             C::load(elements<Element>(a.dup) + in + column, left), column);
  }
}

// Chunks of a thread that a row of d numbers keeps in registers.
template <typename Element>
bool is_narrow(size_t d) {
  return chunks_of<Element>(d) <= 2 * kRowThreads;
}

}  // namespace

template <typename Element>
void swiglu_forward(const TmSwiGlu& args, cudaStream_t stream) {
  if (args.n == 0 || args.d == 0) return;
  if (args.quantised.q != nullptr) {
    const auto kernel = is_narrow<Element>(args.d) ? forward_row_kernel<Element, 2>
                                                   : forward_row_kernel<Element, 8>;
    kernel<<<static_cast<unsigned>(args.n), kRowThreads, 0, stream>>>(args);
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
    const auto kernel = is_narrow<Element>(args.d) ? backward_row_kernel<Element, 2>
                                                   : backward_row_kernel<Element, 8>;
    kernel<<<static_cast<unsigned>(args.n), kRowThreads, 0, stream>>>(args);
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
