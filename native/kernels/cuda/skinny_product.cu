#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/skinny_product.cuh"
#include "kernels/cuda/tensor_tile.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 128;
constexpr unsigned kTokens = 64, kColumns = 64, kStep = 64;  // of x, of c, of the inner size
constexpr int kStages = 4;
constexpr int kPad = 8;         // elements behind a row: 8 rows lie in 8 different groups of banks
constexpr unsigned kWidth = 8;  // elements of 16 bytes
constexpr size_t kLeastTokens = 128;

// Of w [m, k] rows are columns of c; of w [k, m] they are of the inner size. Both 64 x 64.
struct alignas(16) Stage {
  Bfloat16 x[kTokens][kStep + kPad];
  Bfloat16 w[kStep][kColumns + kPad];
};
static_assert(kStep == kColumns && kStep == kTokens);
constexpr int kSharedBytes = kStages * static_cast<int>(sizeof(Stage));

struct Rows {
  const Bfloat16* first;
  size_t stride, rows, columns;
};

// 64 x 64 elements from (row, column) on; zeros where there are none.
__device__ inline void load_tile(Bfloat16 (&to)[kTokens][kStep + kPad], const Rows& from,
                                 size_t row, size_t column) {
#pragma unroll
  for (unsigned i = threadIdx.x; i < kTokens * (kStep / kWidth); i += kThreads) {
    const unsigned r = i / (kStep / kWidth), c = i % (kStep / kWidth) * kWidth;
    const bool is_there = row + r < from.rows && column + c < from.columns;
    const Bfloat16* source = from.first + (row + r) * from.stride + column + c;
    copy_async(&to[r][c], is_there ? source : from.first, is_there);
  }
}

// A warp's 16 tokens times all columns.
template <bool kTransposes>
__device__ inline void add_step(float (&sums)[kColumns / 8][4], const Stage& stage) {
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  const unsigned low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
#pragma unroll
  for (unsigned k = 0; k < kStep; k += 16) {
    unsigned a[4];
    load_matrices(a, &stage.x[first + low + second][k + third]);
#pragma unroll
    for (unsigned pair = 0; pair < kColumns / 16; ++pair) {
      unsigned b[4];
      if constexpr (kTransposes) {
        load_matrices(b, &stage.w[pair * 16 + low + third][k + second]);
      } else {
        load_transposed(b, &stage.w[k + low + second][pair * 16 + third]);
      }
      multiply_add(sums[pair * 2], a, b[0], b[1]);
      multiply_add(sums[pair * 2 + 1], a, b[2], b[3]);
    }
  }
}

template <bool kTransposes>
__global__ void __launch_bounds__(kThreads)
    skinny_kernel(const __grid_constant__ SkinnyProduct args) {
  extern __shared__ Stage stages[];
  const size_t token = size_t{blockIdx.x} * kTokens;
  const Rows x = {args.x, args.x_stride, args.n, args.k};
  const Rows w = {args.w, args.w_stride, kTransposes ? args.m : args.k,
                  kTransposes ? args.k : args.m};
  const unsigned num_steps = static_cast<unsigned>((args.k + kStep - 1) / kStep);
  const auto load = [&](unsigned step) {
    Stage& stage = stages[step % kStages];
    const size_t inner = size_t{step} * kStep;
    load_tile(stage.x, x, token, inner);
    load_tile(stage.w, w, kTransposes ? 0 : inner, kTransposes ? inner : 0);
  };
#pragma unroll
  for (unsigned step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) load(step);
    commit_copies();
  }
  float sums[kColumns / 8][4] = {};
  for (unsigned step = 0; step < num_steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // the step's tiles are there, and all have done with the stage loaded next
    if (step + kStages - 1 < num_steps) load(step + kStages - 1);
    commit_copies();
    add_step<kTransposes>(sums, stages[step % kStages]);
  }
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned block = 0; block < kColumns / 8; ++block) {
    const unsigned column = block * 8 + lane % 4 * 2;
#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
      const size_t row = token + threadIdx.x / 32 * 16 + lane / 4 + half * 8;
      if (row >= args.n || column >= args.m) continue;
      const __nv_bfloat162 pair = __floats2bfloat162_rn(sums[block][half * 2] * args.alpha,
                                                        sums[block][half * 2 + 1] * args.alpha);
      *reinterpret_cast<__nv_bfloat162*>(args.c + row * args.c_stride + column) = pair;
    }
  }
}

template <bool kTransposes>
void launch(const SkinnyProduct& args, cudaStream_t stream) {
  CUDA_CHECK(cudaFuncSetAttribute(skinny_kernel<kTransposes>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const unsigned grid = static_cast<unsigned>((args.n + kTokens - 1) / kTokens);
  skinny_kernel<kTransposes><<<grid, kThreads, kSharedBytes, stream>>>(args);
  CUDA_CHECK_LAUNCH("skinny_product", stream);
}

}  // namespace

bool skinny_product_fits(const SkinnyProduct& args) {
  const size_t odd = args.x_stride | args.w_stride | args.c_stride | args.m | args.k;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(args.x) |
                              reinterpret_cast<uintptr_t>(args.w) |
                              reinterpret_cast<uintptr_t>(args.c);
  return args.m <= kColumns && args.n >= kLeastTokens && args.k > 0 && odd % kWidth == 0 &&
         addresses % 16 == 0;
}

void skinny_product(const SkinnyProduct& args, cudaStream_t stream) {
  args.transposes_w ? launch<true>(args, stream) : launch<false>(args, stream);
}

}  // namespace tunemesh::cuda
