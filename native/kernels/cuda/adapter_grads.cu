#include <algorithm>

#include "kernels/cuda/adapter_grads.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/tensor_tile.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kTileWidth = 128, kTileRanks = 64, kStepTokens = 32;
constexpr int kStages = 3;
constexpr int kPad = 8;         // elements behind a row: 8 rows lie in 8 different banks' groups
constexpr unsigned kWidth = 8;  // elements of 16 bytes
constexpr unsigned kWantedBlocks = 512;
constexpr size_t kLeastSpan = 128;  // tokens
constexpr int kSumThreads = 256;

struct alignas(16) Stage {
  Bfloat16 wide[kStepTokens][kTileWidth + kPad];
  Bfloat16 narrow[kStepTokens][kTileRanks + kPad];
};
static_assert(kStages * sizeof(Stage) <= 48 * 1024);

// A block's tile of one product, and its tokens [begin, end).
struct Tile {
  const Bfloat16* wide;
  const Bfloat16* narrow;
  size_t wide_stride, narrow_stride;
  unsigned width, ranks;  // of the tile: up to 128 and 64
  size_t begin, end;

  __device__ void load(Stage& stage, unsigned step) const {
    const size_t first = begin + size_t{step} * kStepTokens;
#pragma unroll
    for (unsigned i = threadIdx.x; i < kStepTokens * (kTileWidth / kWidth); i += kThreads) {
      const unsigned row = i / (kTileWidth / kWidth), column = i % (kTileWidth / kWidth) * kWidth;
      const bool is_there = first + row < end && column < width;
      const Bfloat16* from = wide + (first + row) * wide_stride + column;
      copy_async(&stage.wide[row][column], is_there ? from : wide, is_there);
    }
#pragma unroll
    for (unsigned i = threadIdx.x; i < kStepTokens * (kTileRanks / kWidth); i += kThreads) {
      const unsigned row = i / (kTileRanks / kWidth), column = i % (kTileRanks / kWidth) * kWidth;
      const bool is_there = first + row < end && column < ranks;
      const Bfloat16* from = narrow + (first + row) * narrow_stride + column;
      copy_async(&stage.narrow[row][column], is_there ? from : narrow, is_there);
    }
  }
};

// A warp's 32 columns of the wide matrix times 64 of the narrow one.
struct WarpSums {
  float at[2][kTileRanks / 8][4] = {};

  __device__ void add(const Stage& stage, unsigned ranks) {
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32;
    const unsigned low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
#pragma unroll
    for (unsigned k = 0; k < kStepTokens; k += 16) {
      unsigned a[2][4];
#pragma unroll
      for (unsigned m = 0; m < 2; ++m) {
        load_transposed(a[m], &stage.wide[k + low + third][first + m * 16 + second]);
      }
#pragma unroll
      for (unsigned pair = 0; pair < kTileRanks / 16; ++pair) {
        if (pair * 16 >= ranks) break;
        unsigned b[4];
        load_transposed(b, &stage.narrow[k + low + second][pair * 16 + third]);
#pragma unroll
        for (unsigned m = 0; m < 2; ++m) {
          multiply_add(at[m][pair * 2], a[m], b[0], b[1]);
          multiply_add(at[m][pair * 2 + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // visit(column of the wide matrix, column of the narrow one, sum)
  template <typename Visit>
  __device__ void for_each(Visit visit) const {
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 * 32;
#pragma unroll
    for (unsigned m = 0; m < 2; ++m) {
#pragma unroll
      for (unsigned block = 0; block < kTileRanks / 8; ++block) {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
          visit(first + m * 16 + lane / 4 + i / 2 * 8, block * 8 + lane % 4 * 2 + i % 2,
                at[m][block][i]);
        }
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads, 4)
    products_kernel(const __grid_constant__ AdapterProducts a) {
  __shared__ Stage stages[kStages];
  int index = 0;
  unsigned tile_index = blockIdx.x;
  while (tile_index >= a.at[index].num_tiles) tile_index -= a.at[index++].num_tiles;
  const AdapterProduct& product = a.at[index];
  const unsigned wide_tiles = (product.width + kTileWidth - 1) / kTileWidth;
  const unsigned column = tile_index % wide_tiles * kTileWidth;
  const unsigned rank = tile_index / wide_tiles * kTileRanks;
  const size_t begin = size_t{blockIdx.y} * a.span_tokens;
  const Tile tile = {product.wide + column,
                     product.narrow + rank,
                     product.wide_stride,
                     product.narrow_stride,
                     min(kTileWidth, product.width - column),
                     min(kTileRanks, product.ranks - rank),
                     begin,
                     min(begin + a.span_tokens, a.n)};
  const unsigned num_steps =
      static_cast<unsigned>((tile.end - begin + kStepTokens - 1) / kStepTokens);
#pragma unroll
  for (unsigned step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) tile.load(stages[step], step);
    commit_copies();
  }
  WarpSums sums;
  for (unsigned step = 0; step < num_steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step's rows are there, and all have done with the stage loaded next
    const unsigned next = step + kStages - 1;
    if (next < num_steps) tile.load(stages[next % kStages], next);
    commit_copies();
    sums.add(stages[step % kStages], tile.ranks);
  }
  float* const to = a.partials + product.first_partial +
                    size_t{blockIdx.y} * product.ranks * product.width +
                    size_t{rank} * product.width + column;
  sums.for_each([&](unsigned w, unsigned r, float sum) {
    if (w < tile.width && r < tile.ranks) to[size_t{r} * product.width + w] = sum;
  });
}

__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(const __grid_constant__ AdapterProducts a) {
  unsigned element = blockIdx.x * kSumThreads + threadIdx.x;
  int index = 0;
  while (index < a.count && element >= a.at[index].width * a.at[index].ranks) {
    element -= a.at[index].width * a.at[index].ranks;
    ++index;
  }
  if (index == a.count) return;
  const AdapterProduct& product = a.at[index];
  const unsigned size = product.width * product.ranks;
  const float* from = a.partials + product.first_partial + element;
  float sum = 0;
#pragma unroll 8
  for (unsigned span = 0; span < a.num_spans; ++span) sum += from[size_t{span} * size];
  const unsigned r = element / product.width, w = element % product.width;
  float* to = product.to[0] + size_t{w} * product.ranks + r;
  if (product.part_ranks > 0) {
    const unsigned row = r % product.part_ranks;
    to = product.to[r / product.part_ranks] + size_t{row} * product.width + w;
  }
  *to = a.accumulate ? *to + sum : sum;
}

bool is_fit(const AdapterProduct& product) {
  const size_t odd = product.wide_stride | product.narrow_stride | product.width | product.ranks;
  return odd % kWidth == 0 && reinterpret_cast<uintptr_t>(product.wide) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(product.narrow) % 16 == 0;
}

size_t results_of(const AdapterProducts& products) {
  size_t results = 0;
  for (int i = 0; i < products.count; ++i) {
    results += size_t{products.at[i].width} * products.at[i].ranks;
  }
  return results;
}

unsigned tiles_of(const AdapterProduct& product) {
  return (product.width + kTileWidth - 1) / kTileWidth *
         ((product.ranks + kTileRanks - 1) / kTileRanks);
}

// As many spans as give enough blocks, of kLeastSpan tokens at least, and with room for their sums.
void cut_spans(AdapterProducts& products) {
  unsigned tiles = 0;
  for (int i = 0; i < products.count; ++i) tiles += tiles_of(products.at[i]);
  const size_t wanted = std::max(1u, (kWantedBlocks + tiles - 1) / tiles);
  const size_t room = products.num_partials / results_of(products);
  const size_t spans =
      std::max<size_t>(1, std::min({wanted, (products.n + kLeastSpan - 1) / kLeastSpan, room}));
  const size_t tokens = (products.n + spans - 1) / spans;
  products.span_tokens =
      static_cast<unsigned>((tokens + kStepTokens - 1) / kStepTokens * kStepTokens);
  products.num_spans =
      static_cast<unsigned>((products.n + products.span_tokens - 1) / products.span_tokens);
}

}  // namespace

bool adapter_grads_fit(const AdapterProducts& products) {
  for (int i = 0; i < products.count; ++i) {
    if (!is_fit(products.at[i])) return false;
  }
  const size_t results = results_of(products);
  return products.n > 0 && products.count > 0 && results <= products.num_partials &&
         results < size_t{1} << 31;
}

void adapter_grads(AdapterProducts products, cudaStream_t stream) {
  cut_spans(products);
  unsigned tiles = 0;
  size_t partials = 0;
  for (int i = 0; i < products.count; ++i) {
    AdapterProduct& product = products.at[i];
    product.num_tiles = tiles_of(product);
    product.first_partial = partials;
    tiles += product.num_tiles;
    partials += size_t{products.num_spans} * product.width * product.ranks;
  }
  products_kernel<<<dim3(tiles, products.num_spans), kThreads, 0, stream>>>(products);
  CUDA_CHECK_LAUNCH("adapter_grads, products", stream);
  const unsigned blocks =
      static_cast<unsigned>((results_of(products) + kSumThreads - 1) / kSumThreads);
  sums_kernel<<<blocks, kSumThreads, 0, stream>>>(products);
  CUDA_CHECK_LAUNCH("adapter_grads, sums", stream);
}

}  // namespace tunemesh::cuda
