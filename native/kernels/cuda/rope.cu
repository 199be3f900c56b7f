#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/fp8_rows.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/rope.cuh"

namespace tunemesh::cuda {
namespace {

// 16 bytes of a head's first half and of its second, rotated. `chunk` counts through the row's
// heads.
template <typename Element>
struct RotatedChunks {
  using C = Chunk<Element>;
  C low, high;
  size_t column, left;  // of `low` in its row; of it are there

  __device__ RotatedChunks(const TmRope& a, size_t row, unsigned chunk, unsigned chunks_of_head) {
    const size_t half = a.head_size / 2;
    const size_t first = size_t{chunk % chunks_of_head} * C::kWidth;
    left = half - first;
    column = chunk / chunks_of_head * a.head_size + first;
    const Element* x = elements<Element>(a.x) + row * a.x_stride + column;
    const size_t angle = static_cast<size_t>(a.positions[row]) * half + first;
    const C lows = C::load(x, left), highs = C::load(x + half, left);
    const FloatsBeside<C::kWidth> cosines(a.cos + angle, left), sines(a.sin + angle, left);
    float of_low[C::kWidth], of_high[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) {
      const float sine = a.inverse ? -sines[i] : sines[i];
      of_low[i] = lows[i] * cosines[i] - highs[i] * sine;
      of_high[i] = highs[i] * cosines[i] + lows[i] * sine;
    }
    low = C::rounded(of_low);
    high = C::rounded(of_high);
  }
};

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) rope_kernel(TmRope a, unsigned chunks_of_head) {
  const ChunkPlace place;
  const unsigned chunk = static_cast<unsigned>(place.chunk);
  if (place.row >= a.n || chunk / chunks_of_head >= a.heads) return;
  const RotatedChunks<Element> made(a, place.row, chunk, chunks_of_head);
  Element* x = elements<Element>(a.x) + place.row * a.x_stride + made.column;
  made.low.store(x, made.left);
  made.high.store(x + a.head_size / 2, made.left);
}

template <typename Element>
__global__ void __launch_bounds__(kNarrowRowThreads, 4)  // with more blocks its angles spill
    rope_row_kernel(TmRope a, bool fits, unsigned chunks_of_head) {
  using C = Chunk<Element>;
  const size_t row = blockIdx.x, half = a.head_size / 2, width = a.quantised_width;
  Element* const x = elements<Element>(a.x) + row * a.x_stride;
  MadeRow<Element, kNarrowRowThreads> made(x, fits);
  const unsigned num_chunks = static_cast<unsigned>(a.heads) * chunks_of_head;
#pragma unroll 1
  for (unsigned chunk = threadIdx.x; chunk < num_chunks; chunk += kNarrowRowThreads) {
    const RotatedChunks<Element> both(a, row, chunk, chunks_of_head);
    made.write(both.low, both.column, both.left);
    made.write(both.high, both.column + half, both.left);
  }
  const size_t first = a.heads * a.head_size + threadIdx.x * C::kWidth;
#pragma unroll 1
  for (size_t i = first; i < width; i += size_t{kNarrowRowThreads} * C::kWidth) {
    made.add(C::load(x + i, width - i), i, width - i);
  }
  made.quantise(a.quantised, row, width);
}

}  // namespace

template <typename Element>
void rope(const TmRope& args, cudaStream_t stream) {
  if (args.n == 0 || args.heads == 0 || args.head_size == 0) return;
  const size_t chunks_of_head = chunks_of<Element>(args.head_size / 2);
  if (args.quantised.q != nullptr) {
    launch_made_rows<Element, kNarrowRowThreads>(rope_row_kernel<Element>, args,
                                                 args.quantised_width, stream,
                                                 static_cast<unsigned>(chunks_of_head));
    return CUDA_CHECK_LAUNCH("rope, quantised", stream);
  }
  const ChunkLaunch launch(args.n, args.heads * chunks_of_head);
  rope_kernel<Element>
      <<<launch.grid, launch.block, 0, stream>>>(args, static_cast<unsigned>(chunks_of_head));
  CUDA_CHECK_LAUNCH("rope", stream);
}

template void rope<float>(const TmRope&, cudaStream_t);
template void rope<Bfloat16>(const TmRope&, cudaStream_t);

}  // namespace tunemesh::cuda
