#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

// Queries, their gradients, keys, values, and one tile of p or ds.
template <typename Shape>
struct SharedTiles {
  static constexpr int kBytes = (4 * Shape::kTileFloats + Shape::kScoreFloats) * int{sizeof(float)};
  float *queries, *gradients, *keys, *values, *scores;
  __device__ explicit SharedTiles(float4* memory) {
    queries = reinterpret_cast<float*>(memory);
    gradients = queries + Shape::kTileFloats;
    keys = gradients + Shape::kTileFloats;
    values = keys + Shape::kTileFloats;
    scores = values + Shape::kTileFloats;
  }
};

// What backward needs to know of each query of a tile.
template <typename Shape>
struct QueryFacts {
  float lse[Shape::kTile], delta[Shape::kTile];
  size_t first_key[Shape::kTile];
};

// Fills the facts of a tile whose gradients lie in shared memory: delta = dout out, by 16 lanes a
// row (columns ascending by 16, then their tree). Queries from n on see no key.
template <typename Element, typename Shape>
__device__ void learn_queries(const TmAttention& a, size_t head, size_t first_query,
                              const float* gradients, QueryFacts<Shape>& facts) {
  const ThreadPlace place;
  const Visibility sight = visibility_of(a);
  for (int row = place.y; row < Shape::kTile; row += kSide) {
    const size_t query = first_query + static_cast<size_t>(row);
    const bool is_inside = query < a.n;
    const Element* out = elements<Element>(a.out) + query * a.out_stride + head * a.head_size;
    float delta = 0;
    for (size_t f = place.x; is_inside && f < a.head_size; f += kSide) {
      delta = fmaf(gradients[row * Shape::kRowStride + f], to_float(out[f]), delta);
    }
    delta = warp_reduce<kSide>(delta, Sum());
    if (place.x != 0) continue;
    facts.delta[row] = delta;
    facts.lse[row] = is_inside ? a.lse[query * a.num_heads + head] : 0.0f;
    facts.first_key[row] = is_inside ? sight.first_key(query) : SIZE_MAX;
  }
}

__device__ inline float weight_of(float score, float scale, float lse, bool is_seen) {
  return is_seen ? expf(fmaf(score, scale, -lse)) : 0.0f;
}

template <typename Shape>
__device__ inline void fill(float (&factors)[Shape::kRows], float value) {
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) factors[i] = value;
}

template <typename Element, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads) query_grad_kernel(TmAttentionBackward b) {
  extern __shared__ float4 shared[];
  const SharedTiles<Shape> tiles(shared);
  __shared__ QueryFacts<Shape> facts;
  const TmAttention& a = b.forward;
  const ThreadPlace place;
  const size_t head = blockIdx.y, group = head / (a.num_heads / a.num_kv_heads);
  const size_t first_query = (gridDim.x - 1 - size_t{blockIdx.x}) * Shape::kTile;
  const size_t last_query = min(first_query + Shape::kTile, a.n) - 1;
  const size_t column = head * a.head_size, kv_column = group * a.head_size;
  load_tile<Shape>(head_rows<Element>(a.q, column, a.q_stride, a), first_query, tiles.queries);
  load_tile<Shape>(head_rows<Element>(b.dout, column, b.dout_stride, a), first_query,
                   tiles.gradients);
  __syncthreads();
  learn_queries<Element, Shape>(a, head, first_query, tiles.gradients, facts);
  __syncthreads();

  Accumulator<Shape> dq;
  for (size_t t = facts.first_key[0] / Shape::kTile; t <= last_query / Shape::kTile; ++t) {
    const size_t first_key = t * Shape::kTile;
    __syncthreads();  // the last tile's keys and scores are used
    load_tile<Shape>(head_rows<Element>(a.k, kv_column, a.k_stride, a), first_key, tiles.keys);
    load_tile<Shape>(head_rows<Element>(a.v, kv_column, a.v_stride, a), first_key, tiles.values);
    __syncthreads();
    Scores<Shape> s = tile_product<Shape>(tiles.queries, tiles.keys);
    const Scores<Shape> dp = tile_product<Shape>(tiles.gradients, tiles.values);
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      const int row = place.y * Shape::kRows + i;
#pragma unroll
      for (int j = 0; j < Shape::kRows; ++j) {
        const size_t key = first_key + static_cast<size_t>(place.x + kSide * j);
        const bool is_seen = key <= first_query + row && key >= facts.first_key[row];
        const float p = weight_of(s.at[i][j], a.scale, facts.lse[row], is_seen);
        s.at[i][j] = p * (dp.at[i][j] - facts.delta[row]);
      }
    }
    store_scores<Shape>(s, tiles.scores);
    __syncthreads();
    dq.add_product(tiles.scores, tiles.keys);
  }
  float factors[Shape::kRows];
  fill<Shape>(factors, a.scale);
  dq.store(head_rows<Element>(b.dq, column, b.dq_stride, a), first_query, factors);
}

// Rows of a tile of scores are keys here, columns are queries.
template <typename Element, typename Shape>
__global__ void __launch_bounds__(kAttentionThreads) key_grad_kernel(TmAttentionBackward b) {
  extern __shared__ float4 shared[];
  const SharedTiles<Shape> tiles(shared);
  __shared__ QueryFacts<Shape> facts;
  const TmAttention& a = b.forward;
  const ThreadPlace place;
  const size_t group = blockIdx.y, num_members = a.num_heads / a.num_kv_heads;
  const size_t first_key = size_t{blockIdx.x} * Shape::kTile;
  const size_t last_key = min(first_key + Shape::kTile, a.n) - 1;
  const size_t end_query = visibility_of(a).end_query(last_key);
  const size_t kv_column = group * a.head_size;
  load_tile<Shape>(head_rows<Element>(a.k, kv_column, a.k_stride, a), first_key, tiles.keys);
  load_tile<Shape>(head_rows<Element>(a.v, kv_column, a.v_stride, a), first_key, tiles.values);

  Accumulator<Shape> dk, dv;
  for (size_t head = group * num_members; head < (group + 1) * num_members; ++head) {
    const size_t column = head * a.head_size;
    for (size_t first_query = first_key; first_query < end_query; first_query += Shape::kTile) {
      __syncthreads();  // the last tile's queries, gradients, scores and facts are used
      load_tile<Shape>(head_rows<Element>(a.q, column, a.q_stride, a), first_query, tiles.queries);
      load_tile<Shape>(head_rows<Element>(b.dout, column, b.dout_stride, a), first_query,
                       tiles.gradients);
      __syncthreads();
      learn_queries<Element, Shape>(a, head, first_query, tiles.gradients, facts);
      __syncthreads();
      Scores<Shape> p = tile_product<Shape>(tiles.keys, tiles.queries);
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
        const size_t key = first_key + static_cast<size_t>(place.y * Shape::kRows + i);
#pragma unroll
        for (int j = 0; j < Shape::kRows; ++j) {
          const int query = place.x + kSide * j;
          const bool is_seen = key <= first_query + query && key >= facts.first_key[query];
          p.at[i][j] = weight_of(p.at[i][j], a.scale, facts.lse[query], is_seen);
        }
      }
      store_scores<Shape>(p, tiles.scores);
      __syncthreads();
      dv.add_product(tiles.scores, tiles.gradients);
      const Scores<Shape> dp = tile_product<Shape>(tiles.values, tiles.gradients);
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Shape::kRows; ++j) {
          p.at[i][j] *= dp.at[i][j] - facts.delta[place.x + kSide * j];
        }
      }
      __syncthreads();  // all have used p
      store_scores<Shape>(p, tiles.scores);
      __syncthreads();
      dk.add_product(tiles.scores, tiles.queries);
    }
  }
  float factors[Shape::kRows];
  fill<Shape>(factors, a.scale);
  dk.store(head_rows<Element>(b.dk, kv_column, b.dk_stride, a), first_key, factors);
  fill<Shape>(factors, 1.0f);
  dv.store(head_rows<Element>(b.dv, kv_column, b.dv_stride, a), first_key, factors);
}

template <typename Element, typename Shape>
void launch(const TmAttentionBackward& b, cudaStream_t stream) {
  constexpr int kBytes = SharedTiles<Shape>::kBytes;
  CUDA_CHECK(cudaFuncSetAttribute(key_grad_kernel<Element, Shape>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  CUDA_CHECK(cudaFuncSetAttribute(query_grad_kernel<Element, Shape>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const unsigned tiles = num_tiles(b.forward.n, Shape::kTile);
  const dim3 key_grid(tiles, static_cast<unsigned>(b.forward.num_kv_heads));
  key_grad_kernel<Element, Shape><<<key_grid, kAttentionThreads, kBytes, stream>>>(b);
  CUDA_CHECK_LAUNCH("attention_backward, keys and values", stream);
  const dim3 query_grid(tiles, static_cast<unsigned>(b.forward.num_heads));
  query_grad_kernel<Element, Shape><<<query_grid, kAttentionThreads, kBytes, stream>>>(b);
  CUDA_CHECK_LAUNCH("attention_backward, queries", stream);
}

}  // namespace

template <typename Element>
void attention_backward(const TmAttentionBackward& args, cudaStream_t stream) {
  const TmAttention& a = args.forward;
  if (a.n == 0 || a.num_heads == 0) return;
  if (a.head_size <= 32) return launch<Element, TileShape<32, 64>>(args, stream);
  if (a.head_size <= 64) return launch<Element, TileShape<64, 64>>(args, stream);
  if (a.head_size <= 128) return launch<Element, TileShape<128, 32>>(args, stream);
  launch<Element, TileShape<256, 16>>(args, stream);
}

template void attention_backward<float>(const TmAttentionBackward&, cudaStream_t);
template void attention_backward<Bfloat16>(const TmAttentionBackward&, cudaStream_t);

}  // namespace tunemesh::cuda
