// What the attention kernels share: tiles in shared memory, their products, and who sees whom.
//
// 256 threads work as 16 x 16: thread (y, x) owns rows y*R .. y*R + R - 1 (R = tile / 16) and
// columns x, x + 16, ... of a tile of scores or of a tile of outputs [tile, head]. Rows of a tile
// in shared memory are floats whatever the elements, with 4 of padding, so that reads of 16 bytes
// meet no bank twice.
#pragma once
#include <math_constants.h>
#include <stdint.h>

#include "kernels/backend.h"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/element.cuh"

namespace tunemesh::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kSide = 16;

// kHead: the head size rounded up to what kernels are made for; columns from F on hold zeros.
template <int kHeadSize, int kTileSize>
struct TileShape {
  static constexpr int kHead = kHeadSize;
  static constexpr int kTile = kTileSize;
  static constexpr int kRows = kTileSize / kSide;        // of a thread
  static constexpr int kOutColumns = kHeadSize / kSide;  // of a thread
  static constexpr int kRowStride = kHeadSize + 4;       // floats
  static constexpr int kScoreStride = kTileSize + 4;     // floats
  static constexpr int kTileFloats = kTileSize * kRowStride;
  static constexpr int kScoreFloats = kTileSize * kScoreStride;
};

struct ThreadPlace {
  int x, y;
  __device__ ThreadPlace()
      : x(static_cast<int>(threadIdx.x) % kSide), y(static_cast<int>(threadIdx.x) / kSide) {}
};

// One head's rows of a matrix [n, heads * F].
template <typename Element>
struct HeadRows {
  const Element* data;  // row 0, the head's first column
  size_t stride, n, size;
};
template <typename Element>
__device__ inline HeadRows<Element> head_rows(const TmElement* data, size_t column, size_t stride,
                                              const TmAttention& a) {
  return {elements<Element>(data) + column, stride, a.n, a.head_size};
}

template <typename Shape, typename Element>
__device__ inline void load_tile(const HeadRows<Element>& rows, size_t first, float* tile) {
  for (int i = threadIdx.x; i < Shape::kTile * Shape::kHead; i += kAttentionThreads) {
    const int row = i / Shape::kHead, column = i % Shape::kHead;
    const size_t at = first + static_cast<size_t>(row);
    const bool is_inside = at < rows.n && static_cast<size_t>(column) < rows.size;
    tile[row * Shape::kRowStride + column] =
        is_inside ? to_float(rows.data[at * rows.stride + column]) : 0.0f;
  }
}

template <typename Shape>
struct Scores {
  float at[Shape::kRows][Shape::kRows];  // [row i][column x + 16 j]
};

// s = a b^T over the head: one fma chain an element, ascending.
template <typename Shape>
__device__ inline Scores<Shape> tile_product(const float* a, const float* b) {
  constexpr int R = Shape::kRows;
  const ThreadPlace place;
  Scores<Shape> s{};
#pragma unroll 4
  for (int f = 0; f < Shape::kHead; f += 4) {
    float4 left[R], right[R];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      left[i] = *reinterpret_cast<const float4*>(a + (place.y * R + i) * Shape::kRowStride + f);
      right[i] =
          *reinterpret_cast<const float4*>(b + (place.x + kSide * i) * Shape::kRowStride + f);
    }
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < R; ++j) {
        float& sum = s.at[i][j];
        sum = fmaf(left[i].x, right[j].x, sum);
        sum = fmaf(left[i].y, right[j].y, sum);
        sum = fmaf(left[i].z, right[j].z, sum);
        sum = fmaf(left[i].w, right[j].w, sum);
      }
    }
  }
  return s;
}

template <typename Shape>
__device__ inline void store_scores(const Scores<Shape>& s, float* tile) {
  const ThreadPlace place;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Shape::kRows; ++j) {
      tile[(place.y * Shape::kRows + i) * Shape::kScoreStride + place.x + kSide * j] = s.at[i][j];
    }
  }
}

// A thread's part of a tile [tile, head] in registers.
template <typename Shape>
struct Accumulator {
  float at[Shape::kRows][Shape::kOutColumns] = {};  // [row i][column x + 16 j]

  // += scores b, columns of scores ascending.
  __device__ void add_product(const float* scores, const float* b) {
    const ThreadPlace place;
#pragma unroll 2
    for (int k = 0; k < Shape::kTile; k += 4) {
      float4 weights[Shape::kRows];
#pragma unroll
      for (int i = 0; i < Shape::kRows; ++i) {
        const int row = place.y * Shape::kRows + i;
        weights[i] = *reinterpret_cast<const float4*>(scores + row * Shape::kScoreStride + k);
      }
#pragma unroll
      for (int j = 0; j < Shape::kOutColumns; ++j) {
        const float* column = b + k * Shape::kRowStride + place.x + kSide * j;
        const float b0 = column[0], b1 = column[Shape::kRowStride];
        const float b2 = column[2 * Shape::kRowStride], b3 = column[3 * Shape::kRowStride];
#pragma unroll
        for (int i = 0; i < Shape::kRows; ++i) {
          float& sum = at[i][j];
          sum = fmaf(weights[i].x, b0, sum);
          sum = fmaf(weights[i].y, b1, sum);
          sum = fmaf(weights[i].z, b2, sum);
          sum = fmaf(weights[i].w, b3, sum);
        }
      }
    }
  }

  // Rows below n, columns below the head size; row i is multiplied by factors[i].
  template <typename Element>
  __device__ void store(const HeadRows<Element>& rows, size_t first, const float* factors) const {
    const ThreadPlace place;
    Element* out = const_cast<Element*>(rows.data);
#pragma unroll
    for (int i = 0; i < Shape::kRows; ++i) {
      const size_t row = first + static_cast<size_t>(place.y * Shape::kRows + i);
      if (row >= rows.n) return;
#pragma unroll
      for (int j = 0; j < Shape::kOutColumns; ++j) {
        const size_t column = static_cast<size_t>(place.x + kSide * j);
        if (column >= rows.size) continue;
        out[row * rows.stride + column] = from_float<Element>(at[i][j] * factors[i]);
      }
    }
  }
};

// Documents as the kernels see them. Safe for any content of document_starts.
struct Visibility {
  const int32_t* starts;
  size_t num_documents, n, window;

  // The document that holds a token: the last one that starts at or before it.
  __device__ size_t document_of(size_t token) const {
    size_t low = 0, high = num_documents;
    while (high - low > 1) {
      const size_t middle = low + (high - low) / 2;
      if (starts[middle] <= static_cast<int32_t>(token)) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ size_t first_key(size_t query) const {
    const int32_t start = max(0, starts[document_of(query)]);
    const size_t own = min(static_cast<size_t>(start), query);
    const size_t seen = window > 0 && query >= window ? query + 1 - window : 0;
    return max(own, seen);
  }
  // One past the last query that sees `key`.
  __device__ size_t end_query(size_t key) const {
    const int32_t end = max(0, starts[document_of(key) + 1]);
    const size_t own = min(max(static_cast<size_t>(end), key + 1), n);
    return window > 0 ? min(own, key + window) : own;
  }
};

__host__ __device__ inline Visibility visibility_of(const TmAttention& a) {
  return {a.document_starts, a.num_documents, a.n, a.window};
}

inline unsigned num_tiles(size_t n, int tile) {
  return static_cast<unsigned>((n + static_cast<size_t>(tile) - 1) / static_cast<size_t>(tile));
}

}  // namespace tunemesh::cuda
