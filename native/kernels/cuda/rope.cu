#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/rope.cuh"

namespace tunemesh::cuda {
namespace {

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) rope_kernel(TmRope a, unsigned chunks_of_head) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const unsigned chunk = static_cast<unsigned>(place.chunk);
  const size_t head = chunk / chunks_of_head;
  if (place.row >= a.n || head >= a.heads) return;
  const size_t half = a.head_size / 2;
  const size_t column = size_t{chunk % chunks_of_head} * C::kWidth, left = half - column;
  Element* x = elements<Element>(a.x) + place.row * a.x_stride + head * a.head_size + column;
  const size_t angle = static_cast<size_t>(a.positions[place.row]) * half + column;
  const C lows = C::load(x, left), highs = C::load(x + half, left);
  const FloatsBeside<C::kWidth> cosines(a.cos + angle, left), sines(a.sin + angle, left);
  float low[C::kWidth], high[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) {
    const float sine = a.inverse ? -sines[i] : sines[i];
    low[i] = lows[i] * cosines[i] - highs[i] * sine;
    high[i] = highs[i] * cosines[i] + lows[i] * sine;
  }
  C::rounded(low).store(x, left);
  C::rounded(high).store(x + half, left);
}

}  // namespace

template <typename Element>
void rope(const TmRope& args, cudaStream_t stream) {
  if (args.n == 0 || args.heads == 0 || args.head_size == 0) return;
  const size_t chunks_of_head = chunks_of<Element>(args.head_size / 2);
  const ChunkLaunch launch(args.n, args.heads * chunks_of_head);
  rope_kernel<Element>
      <<<launch.grid, launch.block, 0, stream>>>(args, static_cast<unsigned>(chunks_of_head));
  CUDA_CHECK_LAUNCH("rope", stream);
}

template void rope<float>(const TmRope&, cudaStream_t);
template void rope<Bfloat16>(const TmRope&, cudaStream_t);

}  // namespace tunemesh::cuda
