#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/fp8.cuh"
#include "kernels/cuda/fp8_rows.cuh"
#include "kernels/cuda/grid.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kBlock = 256;

// kThreads threads have one row, of which each keeps kKept chunks; what is beyond is read twice.
template <typename Element, int kThreads, int kKept>
__global__ void __launch_bounds__(kBlock) quantise_kernel(TmQuantiseRows a) {
  using C = Chunk<Element>;
  const size_t row = size_t{blockIdx.x} * (kBlock / kThreads) + threadIdx.x / kThreads;
  if (row >= a.n) return;  // whole warps, or no thread where the block has one row
  const size_t lane = threadIdx.x % kThreads;
  const Element* x = elements<Element>(a.x) + row * a.x_stride;
  const auto column_of = [&](int k) { return (size_t(k) * kThreads + lane) * C::kWidth; };
  C kept[kKept];
  float largest = 0;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const size_t column = column_of(k);
    if (column >= a.c) continue;
    kept[k] = C::load(x + column, a.c - column);
    largest = largest_of(kept[k], largest);
  }
  for (size_t column = column_of(kKept); column < a.c; column += size_t{kThreads} * C::kWidth) {
    largest = largest_of(C::load(x + column, a.c - column), largest);
  }
  if constexpr (kThreads == kWarpSize) {
    largest = warp_reduce<kWarpSize>(largest, Max());
  } else {
    largest = block_reduce<kBlock>(largest, Max());
  }
  const RowScale scale(largest);
  if (lane == 0) a.scales[row] = scale.scale;
  uint8_t* const q = a.q + row * a.c;
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const size_t column = column_of(k);
    if (column < a.c) store_e4m3(kept[k], scale.inverse, q + column, a.c - column);
  }
  for (size_t column = column_of(kKept); column < a.c; column += size_t{kThreads} * C::kWidth) {
    store_e4m3(C::load(x + column, a.c - column), scale.inverse, q + column, a.c - column);
  }
}

template <typename Element, int kThreads, int kKept>
void launch_quantise(const TmQuantiseRows& args, cudaStream_t stream) {
  constexpr size_t kRows = kBlock / kThreads;
  const auto grid = static_cast<unsigned>((args.n + kRows - 1) / kRows);
  quantise_kernel<Element, kThreads, kKept><<<grid, kBlock, 0, stream>>>(args);
}

constexpr int kTile = 32;
constexpr int kTileRows = 8;  // of threads

template <typename Element>
__global__ void __launch_bounds__(kTile* kTileRows) transpose_kernel(Transpose<Element> a) {
  __shared__ Element tile[kTile][kTile + 2];
  const size_t row = size_t{blockIdx.x} * kTile, column = size_t{blockIdx.y} * kTile;
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    if (row + i < a.rows && column + threadIdx.x < a.columns) {
      tile[i][threadIdx.x] = a.from[(row + i) * a.stride + column + threadIdx.x];
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTile; i += kTileRows) {
    if (column + i < a.columns && row + threadIdx.x < a.rows) {
      a.to[(column + i) * a.rows + row + threadIdx.x] = tile[threadIdx.x][i];
    }
  }
}

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) add_kernel(AddToRows<Element> a) {
  using C = Chunk<Element>;
  const ChunkPlace place;
  const size_t column = place.chunk * C::kWidth;
  if (place.row >= a.n || column >= a.c) return;
  const size_t left = a.c - column;
  Element* const y = a.y + place.row * a.y_stride + column;
  const C old = C::load(y, left);
  C residual{}, bias{};
  if (a.residual != nullptr) {
    residual = C::load(a.residual + place.row * a.residual_stride + column, left);
  }
  if (a.bias != nullptr) bias = C::load(a.bias + column, left);
  float sum[C::kWidth];
#pragma unroll
  for (int i = 0; i < C::kWidth; ++i) sum[i] = old[i] + (residual[i] + bias[i]);
  C::rounded(sum).store(y, left);
}

}  // namespace

template <typename Element>
void quantise_rows(const TmQuantiseRows& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  const size_t chunks = chunks_of<Element>(args.c);
  if (chunks <= 4 * kWarpSize) {
    launch_quantise<Element, kWarpSize, 4>(args, stream);
  } else if (chunks <= 2 * kBlock) {
    launch_quantise<Element, kBlock, 2>(args, stream);
  } else if (chunks <= 4 * kBlock) {
    launch_quantise<Element, kBlock, 4>(args, stream);
  } else if (chunks <= 8 * kBlock) {
    launch_quantise<Element, kBlock, 8>(args, stream);
  } else {
    launch_quantise<Element, kBlock, 16>(args, stream);
  }
  CUDA_CHECK_LAUNCH("quantise_rows", stream);
}

template <typename Element>
void transpose(const Transpose<Element>& args, cudaStream_t stream) {
  if (args.rows == 0 || args.columns == 0) return;
  const auto tiles = [](size_t count) {
    return static_cast<unsigned>((count + kTile - 1) / kTile);
  };
  const dim3 grid(tiles(args.rows), tiles(args.columns)), block(kTile, kTileRows);
  transpose_kernel<Element><<<grid, block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("transpose", stream);
}

template <typename Element>
void add_to_rows(const AddToRows<Element>& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  const ChunkLaunch launch(args.n, chunks_of<Element>(args.c));
  add_kernel<Element><<<launch.grid, launch.block, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("add_to_rows", stream);
}

template void quantise_rows<float>(const TmQuantiseRows&, cudaStream_t);
template void quantise_rows<Bfloat16>(const TmQuantiseRows&, cudaStream_t);
template void transpose<Bfloat16>(const Transpose<Bfloat16>&, cudaStream_t);
template void add_to_rows<Bfloat16>(const AddToRows<Bfloat16>&, cudaStream_t);

}  // namespace tunemesh::cuda
