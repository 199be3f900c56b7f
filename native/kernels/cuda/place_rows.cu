#include <algorithm>

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/grid.cuh"
#include "kernels/cuda/place_rows.cuh"

namespace tunemesh::cuda {
namespace {

constexpr size_t kMostBlocks = 1024;  // of one matrix; each goes on by the whole grid

template <typename Element>
__global__ void __launch_bounds__(kElementThreads) place_kernel(PlaceRows<Element> a) {
  using C = Chunk<Element>;
  const PlacedRows<Element> m = a.at[blockIdx.y];
  const size_t chunks = (m.columns + C::kWidth - 1) / C::kWidth;
  const size_t step = size_t{gridDim.x} * kElementThreads;
  for (size_t i = size_t{blockIdx.x} * kElementThreads + threadIdx.x; i < m.rows * chunks;
       i += step) {
    const size_t row = i / chunks, column = i % chunks * C::kWidth, left = m.columns - column;
    const FloatsBeside<C::kWidth> values(m.from + row * m.columns + column, left);
    C::rounded(values.at).store(m.to + row * m.to_stride + column, left);
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kElementThreads) copy_kernel(TmCopyRows a) {
  const size_t units = a.row_bytes / sizeof(Unit);
  const size_t step = size_t{gridDim.x} * kElementThreads;
  for (size_t i = size_t{blockIdx.x} * kElementThreads + threadIdx.x; i < a.n * units; i += step) {
    const size_t row = i / units, unit = i % units;
    const char* from = static_cast<const char*>(a.from) + row * a.from_stride;
    char* to = static_cast<char*>(a.to) + row * a.to_stride;
    reinterpret_cast<Unit*>(to)[unit] = reinterpret_cast<const Unit*>(from)[unit];
  }
}

unsigned blocks_of(size_t threads) {
  const size_t blocks = (threads + kElementThreads - 1) / kElementThreads;
  return static_cast<unsigned>(std::min(blocks, kMostBlocks));
}

}  // namespace

template <typename Element>
void place_rows(const PlaceRows<Element>& args, cudaStream_t stream) {
  if (args.count == 0) return;
  size_t most = 0;
  for (int i = 0; i < args.count; ++i) {
    most = std::max(most, args.at[i].rows * chunks_of<Element>(args.at[i].columns));
  }
  const dim3 grid(blocks_of(most), static_cast<unsigned>(args.count));
  place_kernel<Element><<<grid, kElementThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("place_rows", stream);
}

void copy_rows(const TmCopyRows& args, cudaStream_t stream) {
  if (args.n * args.row_bytes == 0) return;
  const size_t odd = reinterpret_cast<size_t>(args.to) | reinterpret_cast<size_t>(args.from) |
                     args.row_bytes | (args.n > 1 ? args.to_stride | args.from_stride : 0);
  if (odd % 16 == 0) {
    const unsigned blocks = blocks_of(args.n * (args.row_bytes / 16));
    copy_kernel<uint4><<<blocks, kElementThreads, 0, stream>>>(args);
  } else {
    const unsigned blocks = blocks_of(args.n * args.row_bytes);
    copy_kernel<char><<<blocks, kElementThreads, 0, stream>>>(args);
  }
  CUDA_CHECK_LAUNCH("copy_rows", stream);
}

template void place_rows<float>(const PlaceRows<float>&, cudaStream_t);
template void place_rows<Bfloat16>(const PlaceRows<Bfloat16>&, cudaStream_t);

}  // namespace tunemesh::cuda
