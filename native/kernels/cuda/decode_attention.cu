#include <math_constants.h>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/decode_attention.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// Scores of all keys, scaled; answers their maximum.
template <typename Element>
__device__ float scores_of(const TmDecodeAttention& a, const Element* k, float* scores) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Element* q = elements<Element>(a.q) + size_t{blockIdx.x} * a.head_size;
  float largest = -CUDART_INF_F;
  for (size_t j = warp; j < a.end - a.first; j += kWarps) {
    const Element* key = k + j * a.k_stride;
    float dot = 0;
    for (size_t f = lane; f < a.head_size; f += kWarpSize) {
      dot = fmaf(to_float(q[f]), to_float(key[f]), dot);
    }
    dot = warp_reduce<kWarpSize>(dot, Sum()) * a.scale;
    if (lane == 0) scores[j] = dot;
    largest = fmaxf(largest, dot);
  }
  return block_reduce<kThreads>(largest, Max());  // its barriers publish the scores
}

// Scores become exp(score - largest); answers their sum.
__device__ float weights_of(float* scores, size_t num_keys, float largest) {
  float sum = 0;
  for (size_t j = threadIdx.x; j < num_keys; j += kThreads) {
    scores[j] = expf(scores[j] - largest);
    sum += scores[j];
  }
  return block_reduce<kThreads>(sum, Sum());
}

template <typename Element>
__global__ void decode_kernel(TmDecodeAttention a, int width) {
  __shared__ float parts[kThreads];
  const size_t head = blockIdx.x, group = head / (a.num_heads / a.num_kv_heads);
  const size_t num_keys = a.end - a.first;
  float* scores = a.scores + head * a.score_stride;
  const Element* k = elements<Element>(a.k) + a.first * a.k_stride + group * a.head_size;
  const Element* v = elements<Element>(a.v) + a.first * a.v_stride + group * a.head_size;
  const float largest = scores_of(a, k, scores);
  const float sum = weights_of(scores, num_keys, largest);
  const int num_parts = kThreads / width;
  const int part = static_cast<int>(threadIdx.x) / width;
  for (size_t base = 0; base < a.head_size; base += width) {
    const size_t f = base + threadIdx.x % width;
    float total = 0;
    for (size_t j = part; f < a.head_size && j < num_keys; j += num_parts) {
      total = fmaf(scores[j], to_float(v[j * a.v_stride + f]), total);
    }
    __syncthreads();  // the last columns' parts are used
    parts[threadIdx.x] = total;
    __syncthreads();
    if (part != 0 || f >= a.head_size) continue;
    for (int other = 1; other < num_parts; ++other) total += parts[threadIdx.x + other * width];
    elements<Element>(a.out)[head * a.head_size + f] = from_float<Element>(total / sum);
  }
}

}  // namespace

template <typename Element>
void decode_attention(const TmDecodeAttention& args, cudaStream_t stream) {
  if (args.num_heads == 0) return;
  int width = kWarpSize;
  while (width < kThreads && static_cast<size_t>(width) < args.head_size) width *= 2;
  const unsigned grid = static_cast<unsigned>(args.num_heads);
  decode_kernel<Element><<<grid, kThreads, 0, stream>>>(args, width);
  CUDA_CHECK_LAUNCH("decode_attention", stream);
}

template void decode_attention<float>(const TmDecodeAttention&, cudaStream_t);
template void decode_attention<Bfloat16>(const TmDecodeAttention&, cudaStream_t);

}  // namespace tunemesh::cuda
