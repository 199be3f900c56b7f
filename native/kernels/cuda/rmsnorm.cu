#include <algorithm>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/fp8_rows.cuh"
#include "kernels/cuda/rmsnorm.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kKept = 4;  // chunks of a thread that stay in registers between the two passes
constexpr int kMiddleRow = 128, kWideRow = 256;  // threads of a row
constexpr size_t kMostGainParts = 264;  // blocks of the backward where it sums the gain's gradient

// A row is a warp's (8 rows a block of 256), or a whole block's.
template <int kThreads>
constexpr int kBlock = kThreads == kWarpSize ? 256 : kThreads;
template <int kThreads>
constexpr int kRows = kBlock<kThreads> / kThreads;
// At least so many blocks on a multiprocessor: 1,024 threads with 64 bytes under way each in the
// forward, 512 with up to 192 in the backward, 384 where that sums the gain's gradient too; more
// would have too few registers.
template <int kThreads>
constexpr int kForwardBlocks = 1024 / kBlock<kThreads>;
template <int kThreads>
constexpr int kBackwardBlocks = 512 / kBlock<kThreads>;
template <int kThreads>
constexpr int kGainBlocks = 384 / kBlock<kThreads>;

template <typename Element, int kThreads>
struct Lane {
  using C = Chunk<Element>;
  unsigned team, index;  // of the block's rows; of the row's threads
  __device__ Lane() : team(threadIdx.x / kThreads), index(threadIdx.x % kThreads) {}
  __device__ float sum(float value) const {
    if constexpr (kThreads == kWarpSize) return warp_reduce<kWarpSize>(value, Sum());
    return block_reduce<kThreads>(value, Sum());
  }
  __device__ float largest(float value) const {
    if constexpr (kThreads == kWarpSize) return warp_reduce<kWarpSize>(value, Max());
    return block_reduce<kThreads>(value, Max());
  }
  // First column of the thread's chunk k.
  __device__ size_t column(size_t k) const { return (k * kThreads + index) * C::kWidth; }
};

// Where row `index` starts: rows may be heads inside wider rows.
template <typename Args>
__device__ inline size_t start_of(const Args& a, size_t index, size_t stride) {
  if (a.heads == 0) return index * stride;
  return index / a.heads * stride + index % a.heads * a.c;
}

// A row that is read once: its first chunks are kept, the others read again by the second pass.
template <typename Element, int kThreads>
struct KeptRow {
  using C = Chunk<Element>;
  const Element* data;
  C kept[kKept];

  __device__ KeptRow(const Element* row, size_t c, const Lane<Element, kThreads>& lane)
      : data(row) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if (lane.column(k) < c) kept[k] = C::load(data + lane.column(k), c - lane.column(k));
    }
  }
  __device__ C at(int k, size_t column, size_t left) const {
    return k < kKept ? kept[k] : C::load(data + column, left);
  }
  // Between the passes: else the compiler keeps the chunks as floats, in twice the registers.
  __device__ void keep_packed() {
#pragma unroll
    for (C& chunk : kept) {
      uint4& words = *reinterpret_cast<uint4*>(&chunk);
      asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
  }
};

// visit(k, column, left) for the thread's chunks: k below kKept, or kKept for those not kept.
template <typename Element, int kThreads, typename Visit>
__device__ inline void for_each_chunk(const Lane<Element, kThreads>& lane, size_t c, Visit visit) {
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    if (lane.column(k) < c) visit(k, lane.column(k), c - lane.column(k));
  }
#pragma unroll 1
  for (size_t k = kKept; lane.column(k) < c; ++k) visit(kKept, lane.column(k), c - lane.column(k));
}

// A result's row on its way to e4m3: what a thread has written of it, in the place of what it kept.
template <typename Element, int kThreads>
struct WrittenRow {
  using C = Chunk<Element>;
  KeptRow<Element, kThreads>& kept;
  const Element* data;
  float largest = 0;

  __device__ void add(int k, const C& chunk) {
    largest = largest_of(chunk, largest);
    if (k < kKept) kept.kept[k] = chunk;
  }
  __device__ void quantise(const TmQuantised& to, size_t row, size_t c,
                           const Lane<Element, kThreads>& lane) const {
    const RowScale scale(lane.largest(largest));
    if (lane.index == 0) to.scales[row] = scale.scale;
    uint8_t* const q = to.q + row * c;
    for_each_chunk(lane, c, [&](int k, size_t column, size_t left) {
      const C chunk = k < kKept ? kept.kept[k] : C::load(data + column, left);
      store_e4m3(chunk, scale.inverse, q + column, left);
    });
  }
};

template <typename Element, int kThreads, bool kQuantises>
__global__ void __launch_bounds__(kBlock<kThreads>, kForwardBlocks<kThreads>)
    forward_kernel(TmRmsNorm a) {
  using C = Chunk<Element>;
  const Lane<Element, kThreads> lane;
  const size_t row = size_t{blockIdx.x} * kRows<kThreads> + lane.team;
  if (row >= a.n) return;  // whole warps, or no thread where the block has one row
  KeptRow<Element, kThreads> x(elements<Element>(a.x) + start_of(a, row, a.x_stride), a.c, lane);
  float squares = 0;
  for_each_chunk(lane, a.c, [&](int k, size_t column, size_t left) {
    const C chunk = x.at(k, column, left);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) squares = fmaf(chunk[i], chunk[i], squares);
  });
  const double mean = static_cast<double>(lane.sum(squares)) / static_cast<double>(a.c);
  const float rstd = static_cast<float>(1.0 / sqrt(mean + static_cast<double>(a.epsilon)));
  if (a.rstd != nullptr && lane.index == 0) a.rstd[row] = rstd;
  x.keep_packed();
  Element* y = elements<Element>(a.y) + start_of(a, row, a.y_stride);
  WrittenRow<Element, kThreads> written = {x, y};
  for_each_chunk(lane, a.c, [&](int k, size_t column, size_t left) {
    const C chunk = x.at(k, column, left);
    const FloatsBeside<C::kWidth> gain(a.gain + column, left);
    float out[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) out[i] = chunk[i] * rstd * gain[i];
    const C result = C::rounded(out);
    result.store(y + column, left);
    if constexpr (kQuantises) written.add(k, result);
  });
  if constexpr (kQuantises) written.quantise(a.quantised, row, a.c, lane);
}

// The gain's gradient of a thread's columns over the rows of its team.
template <typename Element>
struct GainSums {
  float at[kKept][Chunk<Element>::kWidth] = {};
};

// dx of one row. With kSumsGain also the row's terms of the gain's gradient, where all chunks are
// kept.
template <typename Element, int kThreads, bool kSumsGain, bool kQuantises = false>
__device__ inline void row_backward(const TmRmsNormBackward& a, size_t row,
                                    const Lane<Element, kThreads>& lane, GainSums<Element>& sums) {
  using C = Chunk<Element>;
  Element* dx = elements<Element>(a.dx) + start_of(a, row, a.dx_stride);
  KeptRow<Element, kThreads> x(elements<Element>(a.x) + start_of(a, row, a.x_stride), a.c, lane);
  KeptRow<Element, kThreads> dy(elements<Element>(a.dy) + start_of(a, row, a.dy_stride), a.c, lane);
  // All loads are under way before the row's sum is waited for.
  const KeptRow<Element, kThreads> old(dx, a.dx_add ? a.c : 0, lane);
  const float rstd = a.rstd[row];
  float dot = 0;
  for_each_chunk(lane, a.c, [&](int k, size_t column, size_t left) {
    const C xs = x.at(k, column, left), dys = dy.at(k, column, left);
    const FloatsBeside<C::kWidth> gain(a.gain + column, left);
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) {
      dot = fmaf(dys[i] * gain[i], xs[i], dot);
      if (kSumsGain && k < kKept) sums.at[k][i] = fmaf(dys[i], xs[i] * rstd, sums.at[k][i]);
    }
  });
  const double wide = static_cast<double>(rstd);
  const double mean = static_cast<double>(lane.sum(dot)) / static_cast<double>(a.c);
  const float factor = static_cast<float>(wide * wide * mean);
  x.keep_packed();
  dy.keep_packed();
  WrittenRow<Element, kThreads> written = {x, dx};
  for_each_chunk(lane, a.c, [&](int k, size_t column, size_t left) {
    const C xs = x.at(k, column, left), dys = dy.at(k, column, left);
    const FloatsBeside<C::kWidth> gain(a.gain + column, left);
    C before{};
    if (a.dx_add) before = old.at(k, column, left);
    float out[C::kWidth];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) {
      const float inner = fmaf(-xs[i], factor, dys[i] * gain[i]);
      out[i] = a.dx_add ? fmaf(inner, rstd, before[i]) : inner * rstd;
    }
    const C result = C::rounded(out);
    result.store(dx + column, left);
    if constexpr (kQuantises) written.add(k, result);
  });
  if constexpr (kQuantises) written.quantise(a.quantised, row, a.c, lane);
}

template <typename Element, int kThreads, bool kQuantises>
__global__ void __launch_bounds__(kBlock<kThreads>, kBackwardBlocks<kThreads>)
    backward_kernel(TmRmsNormBackward a) {
  const Lane<Element, kThreads> lane;
  const size_t row = size_t{blockIdx.x} * kRows<kThreads> + lane.team;
  if (row >= a.n) return;
  GainSums<Element> none;
  row_backward<Element, kThreads, false, kQuantises>(a, row, lane, none);
}

// A block has a.n / parts neighbouring rows, its teams in turn; teams are added ascending.
template <typename Element, int kThreads>
__global__ void __launch_bounds__(kBlock<kThreads>, kGainBlocks<kThreads>)
    backward_gain_kernel(TmRmsNormBackward a, size_t rows, float* partials) {
  using C = Chunk<Element>;
  constexpr int kTeams = kRows<kThreads>;
  const Lane<Element, kThreads> lane;
  const size_t begin = size_t{blockIdx.x} * rows, end = min(begin + rows, a.n);
  GainSums<Element> sums;
#pragma unroll 1
  for (size_t row = begin + lane.team; row < end; row += kTeams) {
    row_backward<Element, kThreads, true>(a, row, lane, sums);
  }
  float* to = partials + size_t{blockIdx.x} * a.c;
  if constexpr (kTeams == 1) {
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
#pragma unroll
      for (int i = 0; i < C::kWidth; ++i) {
        if (lane.column(k) + i < a.c) to[lane.column(k) + i] = sums.at[k][i];
      }
    }
  } else {
    __shared__ float teams[kTeams][kThreads * C::kWidth];
#pragma unroll 1
    for (int k = 0; k < kKept; ++k) {
      __syncthreads();  // the last chunks' readers are done
#pragma unroll
      for (int i = 0; i < C::kWidth; ++i) {
        float value = 0;
#pragma unroll
        for (int j = 0; j < kKept; ++j) value = j == k ? sums.at[j][i] : value;
        teams[lane.team][lane.index * C::kWidth + i] = value;
      }
      __syncthreads();
      const unsigned local = threadIdx.x;  // a block has as many threads as a chunk's columns
      const size_t column = size_t(k) * kThreads * C::kWidth + local;
      if (local >= kThreads * C::kWidth || column >= a.c) continue;
      float total = 0;
#pragma unroll
      for (int team = 0; team < kTeams; ++team) total += teams[team][local];
      to[column] = total;
    }
  }
}

// Rows beyond what a thread keeps: the gain's gradient in a pass of its own, before dx, which may
// overwrite dy.
template <typename Element>
__global__ void __launch_bounds__(32 * kColumnSumWarps)
    gain_grad_kernel(TmRmsNormBackward a, size_t rows, float* partials) {
  using C = Chunk<Element>;
  const Element* x = elements<Element>(a.x);
  const Element* dy = elements<Element>(a.dy);
  const auto add = [&](size_t row, size_t column, size_t left, float(&sums)[C::kWidth]) {
    const C xs = C::load(x + start_of(a, row, a.x_stride) + column, left);
    const C dys = C::load(dy + start_of(a, row, a.dy_stride) + column, left);
    const float rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < C::kWidth; ++i) sums[i] = fmaf(dys[i], xs[i] * rstd, sums[i]);
  };
  sum_part<Element>(a.n, a.c, rows, add, partials);
}

template <int kThreads>
unsigned grid_of(size_t n) {
  constexpr size_t kEach = kRows<kThreads>;
  return static_cast<unsigned>((n + kEach - 1) / kEach);
}

template <typename Element, int kThreads>
void launch_forward(const TmRmsNorm& args, cudaStream_t stream) {
  const auto kernel = args.quantised.q != nullptr ? forward_kernel<Element, kThreads, true>
                                                  : forward_kernel<Element, kThreads, false>;
  kernel<<<grid_of<kThreads>(args.n), kBlock<kThreads>, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("rms_norm_forward", stream);
}

// Are all chunks of a row kept?
template <typename Element, int kThreads>
bool is_kept(size_t c) {
  return c <= size_t{kKept} * kThreads * Chunk<Element>::kWidth;
}

template <typename Element, int kThreads>
void launch_backward(const TmRmsNormBackward& args, const Scratch& scratch, cudaStream_t stream) {
  if (args.dgain != nullptr && is_kept<Element, kThreads>(args.c)) {
    constexpr size_t kTeams = kRows<kThreads>;
    const size_t wanted = (args.n + kTeams - 1) / kTeams;
    size_t parts = std::min({wanted, kMostGainParts, scratch.num_floats / args.c});
    const size_t rows = (wanted + parts - 1) / parts * kTeams;
    parts = (args.n + rows - 1) / rows;
    backward_gain_kernel<Element, kThreads>
        <<<static_cast<unsigned>(parts), kBlock<kThreads>, 0, stream>>>(args, rows, scratch.data);
    CUDA_CHECK_LAUNCH("rms_norm_backward with its gain", stream);
    add_partial_sums({scratch.data, parts, args.c, args.dgain}, stream);
    return;
  }
  if (args.dgain != nullptr) {
    const ColumnParts parts = column_parts(args.n, args.c, scratch);
    gain_grad_kernel<Element>
        <<<partial_sums_grid<Element>(args.c, parts), partial_sums_block(), 0, stream>>>(
            args, parts.rows, scratch.data);
    CUDA_CHECK_LAUNCH("rms_norm_gain_grad", stream);
    add_partial_sums({scratch.data, parts.parts, args.c, args.dgain}, stream);
  }
  const auto kernel = args.quantised.q != nullptr ? backward_kernel<Element, kThreads, true>
                                                  : backward_kernel<Element, kThreads, false>;
  kernel<<<grid_of<kThreads>(args.n), kBlock<kThreads>, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("rms_norm_backward", stream);
}

}  // namespace

template <typename Element>
void rms_norm_forward(const TmRmsNorm& args, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (is_kept<Element, kWarpSize>(args.c)) return launch_forward<Element, kWarpSize>(args, stream);
  if (is_kept<Element, kMiddleRow>(args.c)) {
    return launch_forward<Element, kMiddleRow>(args, stream);
  }
  launch_forward<Element, kWideRow>(args, stream);
}

template <typename Element>
void rms_norm_backward(const TmRmsNormBackward& args, const Scratch& scratch, cudaStream_t stream) {
  if (args.n == 0 || args.c == 0) return;
  if (is_kept<Element, kWarpSize>(args.c)) {
    return launch_backward<Element, kWarpSize>(args, scratch, stream);
  }
  if (is_kept<Element, kMiddleRow>(args.c)) {
    return launch_backward<Element, kMiddleRow>(args, scratch, stream);
  }
  launch_backward<Element, kWideRow>(args, scratch, stream);
}

template void rms_norm_forward<float>(const TmRmsNorm&, cudaStream_t);
template void rms_norm_forward<Bfloat16>(const TmRmsNorm&, cudaStream_t);
template void rms_norm_backward<float>(const TmRmsNormBackward&, const Scratch&, cudaStream_t);
template void rms_norm_backward<Bfloat16>(const TmRmsNormBackward&, const Scratch&, cudaStream_t);

}  // namespace tunemesh::cuda
