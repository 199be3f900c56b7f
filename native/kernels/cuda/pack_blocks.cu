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

static_assert(kThreads == kBlockElements, "words are packed with an element a thread");

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

__global__ void total_chunks_kernel(TmPackBlocks a) {
  const size_t first = blockIdx.x * a.chunk_blocks;
  const size_t end = min(first + a.chunk_blocks, a.num_blocks);
  Word digest = 0, width = 0;
  for (size_t block = first + threadIdx.x; block < end; block += kThreads) {
    digest += a.block_digests[block];
    width += a.shapes[2 * block + 1];
  }
  digest = block_reduce<kThreads>(digest, Sum());
  width = block_reduce<kThreads>(width, Sum());
  if (threadIdx.x != 0) return;
  a.told[1 + 2 * size_t{blockIdx.x}] = digest;
  a.told[2 + 2 * size_t{blockIdx.x}] = width * kRowBytes;
  if (blockIdx.x == 0) a.told[0] = a.outcome != nullptr ? *a.outcome : 0;
}

// Where the block's words start.
__device__ size_t words_before(const TmPackBlocks& a, size_t block) {
  const size_t chunk = block / a.chunk_blocks;
  Word bytes = 0;
  for (size_t i = threadIdx.x; i < chunk; i += kThreads) bytes += a.told[2 + 2 * i];
  for (size_t i = chunk * a.chunk_blocks + threadIdx.x; i < block; i += kThreads) {
    bytes += a.shapes[2 * i + 1] * kRowBytes;
  }
  return block_reduce<kThreads>(bytes, Sum());
}

// The low `width` (1..32) bits of each value from bit `from` on. Word k of a lane holds bits 32 k
// to 32 k + 31 of its 32 values, one after the other.
__device__ void write_words(const Word* values, int from, int width, uint32_t* out) {
  const uint32_t mask = width == 32 ? ~0u : (1u << width) - 1;
  for (int i = threadIdx.x; i < kLanes * width; i += kThreads) {
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
  __shared__ Word values[kBlockElements];
  const size_t block = blockIdx.x;
  const int shift = a.shapes[2 * block], width = a.shapes[2 * block + 1];
  if (width == 0) return;
  values[threadIdx.x] = static_cast<Word>(a.values[block * kBlockElements + threadIdx.x]) >> shift;
  auto* const out = reinterpret_cast<uint32_t*>(a.words + words_before(a, block));
  __syncthreads();
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
  write_words_kernel<<<grid(1), kThreads, 0, stream>>>(args);
  CUDA_CHECK_LAUNCH("pack_blocks: words", stream);
}

}  // namespace tunemesh::cuda
