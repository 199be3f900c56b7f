#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

__device__ void check_documents(const TmAttention& a, DeviceFault* fault) {
  const int32_t* starts = a.document_starts;
  const long long n = static_cast<long long>(a.n);
  const size_t last = a.num_documents;
  if (threadIdx.x == 0 && (starts[0] != 0 || starts[last] != n)) {
    raise_fault(fault,
                {FaultKind::kDocumentSpan, FaultOperation::kAttention, starts[0], starts[last], n});
  }
  for (size_t d = threadIdx.x; d < last; d += kAttentionThreads) {
    if (starts[d + 1] >= starts[d]) continue;
    raise_fault(fault, {FaultKind::kDocumentOrder, FaultOperation::kAttention,
                        static_cast<long long>(d), starts[d + 1], starts[d]});
  }
}

// The running maximum and sum of exp of a thread's rows; 16 neighbouring lanes share a row.
template <typename Shape>
struct OnlineSoftmax {
  float largest[Shape::kRows], sum[Shape::kRows];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      largest[i] = -CUDART_INF_F;
      sum[i] = 0;
    }
  }

  // Scores become exp(score - largest); what was summed before is rescaled, `acc` with it.
  __device__ void add(Scores<Shape>& s, Accumulator<Shape>& acc) {
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      float top = s.at[i][0];
#pragma unroll
      for (int j = 1; j < Shape::kRows; ++j) top = fmaxf(top, s.at[i][j]);
      top = fmaxf(largest[i], warp_reduce<kSide>(top, Max()));
      // A row that has seen no key yet: exp of (-inf - 0) is 0.
      const float base = top == -CUDART_INF_F ? 0.0f : top;
      const float rescale = expf(largest[i] - base);
      float part = 0;
#pragma unroll
      for (int j = 0; j < Shape::kRows; ++j) {
        s.at[i][j] = expf(s.at[i][j] - base);
        part += s.at[i][j];
      }
      sum[i] = fmaf(sum[i], rescale, warp_reduce<kSide>(part, Sum()));
      largest[i] = top;
#pragma unroll
      for (int j = 0; j < Shape::kOutColumns; ++j) acc.at[i][j] *= rescale;
    }
  }
};

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads)
    forward_kernel(TmAttention a, DeviceFault* fault) {
  extern __shared__ float4 shared[];
  float* queries = reinterpret_cast<float*>(shared);
  float* keys = queries + Shape::kTileFloats;  // then the values
  float* weights = keys + Shape::kTileFloats;
  __shared__ size_t first_keys[Shape::kTile];

  if (blockIdx.x == 0 && blockIdx.y == 0) check_documents(a, fault);
  const ThreadPlace place;
  const size_t head = blockIdx.y, group = head / (a.num_heads / a.num_kv_heads);
  // Long rows first: the last tiles of a document have the most keys.
  const size_t tile = gridDim.x - 1 - blockIdx.x;
  const size_t first_query = tile * Shape::kTile;
  const size_t last_query = min(first_query + Shape::kTile, a.n) - 1;
  const auto q = head_rows<Element>(a.q, head * a.head_size, a.q_stride, a);
  const auto k = head_rows<Element>(a.k, group * a.head_size, a.k_stride, a);
  const auto v = head_rows<Element>(a.v, group * a.head_size, a.v_stride, a);
  const Visibility sight = visibility_of(a);
  if (threadIdx.x < Shape::kTile) {
    first_keys[threadIdx.x] = sight.first_key(min(first_query + threadIdx.x, last_query));
  }
  load_tile<Shape>(q, first_query, queries);
  __syncthreads();

  Accumulator<Shape> out;
  OnlineSoftmax<Shape> softmax;
  for (size_t t = first_keys[0] / Shape::kTile; t <= last_query / Shape::kTile; ++t) {
    const size_t first_key = t * Shape::kTile;
    __syncthreads();  // the last tile's values and weights are used
    load_tile<Shape>(k, first_key, keys);
    __syncthreads();
    Scores<Shape> s = tile_product<Shape>(queries, keys);
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      const int row = place.y * Shape::kRows + i;
#pragma unroll
      for (int j = 0; j < Shape::kRows; ++j) {
        const size_t key = first_key + static_cast<size_t>(place.x + kSide * j);
        const bool is_seen = key <= first_query + row && key >= first_keys[row] && key < a.n;
        s.at[i][j] = is_seen ? s.at[i][j] * a.scale : -CUDART_INF_F;
      }
    }
    softmax.add(s, out);
    store_scores<Shape>(s, weights);
    __syncthreads();  // all have used the keys
    load_tile<Shape>(v, first_key, keys);
    __syncthreads();
    out.add_product(weights, keys);
  }

  float factors[Shape::kRows];
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    factors[i] = 1.0f / softmax.sum[i];
    const size_t query = first_query + static_cast<size_t>(place.y * Shape::kRows + i);
    if (place.x == 0 && query < a.n) {
      a.lse[query * a.num_heads + head] = softmax.largest[i] + logf(softmax.sum[i]);
    }
  }
  out.store(head_rows<Element>(a.out, head * a.head_size, a.out_stride, a), first_query, factors);
}

template <typename Element, typename Shape>
void launch(const TmAttention& a, DeviceFault* fault, cudaStream_t stream) {
  constexpr int kBytes = (2 * Shape::kTileFloats + Shape::kScoreFloats) * int{sizeof(float)};
  CUDA_CHECK(cudaFuncSetAttribute(forward_kernel<Element, Shape>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(num_tiles(a.n, Shape::kTile), static_cast<unsigned>(a.num_heads));
  forward_kernel<Element, Shape><<<grid, kAttentionThreads, kBytes, stream>>>(a, fault);
  CUDA_CHECK_LAUNCH("attention_forward", stream);
}

}  // namespace

template <typename Element>
void attention_forward(const TmAttention& args, DeviceFault* fault, cudaStream_t stream) {
  if (args.n == 0 || args.num_heads == 0) return;
  if (args.head_size <= 32) return launch<Element, TileShape<32, 64>>(args, fault, stream);
  if (args.head_size <= 64) return launch<Element, TileShape<64, 64>>(args, fault, stream);
  if (args.head_size <= 128) return launch<Element, TileShape<128, 64>>(args, fault, stream);
  launch<Element, TileShape<256, 32>>(args, fault, stream);
}

template void attention_forward<float>(const TmAttention&, DeviceFault*, cudaStream_t);
template void attention_forward<Bfloat16>(const TmAttention&, DeviceFault*, cudaStream_t);

}  // namespace tunemesh::cuda
