#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/pack_blocks.cuh"

namespace tunemesh::cuda {
namespace {

using Word = unsigned long long;

constexpr size_t kBlockElements = 256;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLanes = 8;                        // of packed words
constexpr size_t kRowBytes = 32;                 // of words, for each bit of width
constexpr size_t kLowWords = 256;                // of a block wider than 32 bits: its low halves
constexpr Word kBlockSeed = 0x74756e656d657368;  // "tunemesh"

struct Or {
  __device__ Word operator()(Word a, Word b) const { return a | b; }
};

// As in engine/codec.cc.
__device__ Word splitmix64(Word x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

struct Measure {
  Word any = 0, magnitude = 0, digest = 0;
  __device__ void add(int element, long long value) {
    const Word bits = static_cast<Word>(value);
    any |= bits;
    magnitude |= value < 0 ? ~bits : bits;
    digest += bits * (splitmix64(element) | 1);
  }
};

__global__ void measure_blocks_kernel(TmPackBlocks a) {
  const size_t block = size_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (block >= a.num_blocks) return;  // a whole warp
  const int lane = threadIdx.x % kWarpSize;
  const auto* const values = reinterpret_cast<const longlong2*>(a.values + block * kBlockElements);
  Measure measure;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = i * kWarpSize + lane;
    const longlong2 pair = values[at];
    measure.add(2 * at, pair.x);
    measure.add(2 * at + 1, pair.y);
  }
  const Word any = warp_reduce<kWarpSize>(measure.any, Or());
  const Word magnitude = warp_reduce<kWarpSize>(measure.magnitude, Or());
  const Word digest = warp_reduce<kWarpSize>(measure.digest, Sum());
  if (lane != 0) return;
  const int shift = any == 0 ? 0 : __ffsll(static_cast<long long>(any)) - 1;
  const int width = any == 0 ? 0 : 65 - __clzll(static_cast<long long>(magnitude >> shift));
  a.shapes[2 * block] = static_cast<uint8_t>(shift);
  a.shapes[2 * block + 1] = static_cast<uint8_t>(width);
  a.block_digests[block] = digest * (splitmix64(kBlockSeed ^ (a.first_block + block)) | 1);
}

// The sum over the threads before this one, and over all.
struct Scanned {
  Word before, total;
};
__device__ Scanned scan_block(Word value) {
  __shared__ Word totals[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  Word sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const Word other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();  // the last call's readers are done
  if (lane == kWarpSize - 1) totals[warp] = sum;
  __syncthreads();
  Scanned scanned = {sum - value, 0};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp) scanned.before += totals[i];
    scanned.total += totals[i];
  }
  return scanned;
}

// The digests of a chunk's blocks give way to where the blocks' words start within the chunk's.
__global__ void total_chunks_kernel(TmPackBlocks a) {
  const size_t first = blockIdx.x * a.chunk_blocks;
  const size_t end = min(first + a.chunk_blocks, a.num_blocks);
  Word digest = 0, bytes = 0;
  for (size_t tile = first; tile < end; tile += kThreads) {
    const size_t block = tile + threadIdx.x;
    const bool is_there = block < end;
    const Scanned scanned = scan_block(is_there ? a.shapes[2 * block + 1] * kRowBytes : 0);
    if (is_there) {
      digest += a.block_digests[block];
      a.block_digests[block] = bytes + scanned.before;
    }
    bytes += scanned.total;
  }
  digest = block_reduce<kThreads>(digest, Sum());
  if (threadIdx.x != 0) return;
  a.told[1 + 2 * size_t{blockIdx.x}] = digest;
  a.told[2 + 2 * size_t{blockIdx.x}] = bytes;
  if (blockIdx.x == 0) a.told[0] = a.outcome != nullptr ? *a.outcome : 0;
}

// Where a block's words start. For a whole warp.
__device__ size_t words_before(const TmPackBlocks& a, size_t block) {
  const size_t chunk = block / a.chunk_blocks;
  Word bytes = 0;
  for (size_t i = threadIdx.x % kWarpSize; i < chunk; i += kWarpSize) bytes += a.told[2 + 2 * i];
  return warp_reduce<kWarpSize>(bytes, Sum()) + a.block_digests[block];
}

// The low `width` (1..32) bits of each value from bit `from` on. Word k of a lane holds bits 32 k
// to 32 k + 31 of its 32 values, one after the other.
__device__ void write_words(const Word* values, int from, int width, uint32_t* out) {
  const uint32_t mask = width == 32 ? ~0u : (1u << width) - 1;
  for (int i = threadIdx.x % kWarpSize; i < kLanes * width; i += kWarpSize) {
    const int lane = i % kLanes, first_bit = i / kLanes * 32;
    int row = first_bit / width;
    const int skipped = first_bit - row * width;
    uint32_t word = (static_cast<uint32_t>(values[row * kLanes + lane] >> from) & mask) >> skipped;
    for (int filled = width - skipped; filled < 32; filled += width) {
      ++row;
      word |= (static_cast<uint32_t>(values[row * kLanes + lane] >> from) & mask) << filled;
    }
    out[i] = word;
  }
}

__global__ void write_words_kernel(TmPackBlocks a) {
  __shared__ Word shifted[kWarps][kBlockElements];
  const size_t block = size_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (block >= a.num_blocks) return;  // a whole warp
  const int shift = a.shapes[2 * block], width = a.shapes[2 * block + 1];
  if (width == 0) return;
  const int lane = threadIdx.x % kWarpSize;
  Word* const values = shifted[threadIdx.x / kWarpSize];
  const auto* const from = reinterpret_cast<const longlong2*>(a.values + block * kBlockElements);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = i * kWarpSize + lane;
    const longlong2 pair = from[at];
    values[2 * at] = static_cast<Word>(pair.x) >> shift;
    values[2 * at + 1] = static_cast<Word>(pair.y) >> shift;
  }
  auto* const out = reinterpret_cast<uint32_t*>(a.words + words_before(a, block));
  __syncwarp();
  write_words(values, 0, min(width, 32), out);
  if (width > 32) write_words(values, 32, width - 32, out + kLowWords);
}

}  // namespace

void pack_blocks(const TmPackBlocks& args, cudaStream_t stream) {
  if (args.num_blocks == 0) return;
  const auto grid = [&](size_t blocks) {
    return static_cast<unsigned>((args.num_blocks + blocks - 1) / blocks);
  };
  measure_blocks_kernel<<<grid(kWarps), kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("pack_blocks: measure", stream);
  total_chunks_kernel<<<grid(args.chunk_blocks), kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("pack_blocks: totals", stream);
  write_words_kernel<<<grid(kWarps), kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("pack_blocks: words", stream);
}

}  // namespace tunemesh::cuda
