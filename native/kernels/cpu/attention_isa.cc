// Causal attention within documents; a task is one query head of one document.
//   forward   s = q (scale k)^T, p = softmax(s), out = p v, lse = log sum exp(s)
//   backward  p = exp(s - lse), ds = p (dout (scale v)^T - delta), delta[i] = scale (dout[i]
//   out[i])
//             dq = ds k, dk = ds^T q, dv = p^T dout
//
//   shapes  q, out, dout, dq [n, H*F], k, v, dk, dv [n, G*F], lse [n, H]; query head h reads
//           key/value head h / (H/G)
//   blocks  48 queries by 64 keys; keys and values are transposed, so that a vector is 16 keys.
//           What lies above the diagonal is skipped in steps of 6 queries by 16 keys
//   scratch of a thread: transposed keys and all scores of a query block (forward), blocks of
//           transposed keys and values, of p and of ds (backward); linear in the document's length
//   order   every sum is one fma chain, ascending: scores over f, out and dq over keys, dk and dv
//           over queries (a masked p is exactly 0 and changes nothing). A row's sum of p: 16
//           lanes, vectors of keys ascending, then the tree. delta: dot(). out is multiplied by
//           1 / sum at the end. dk and dv of a group: its query heads ascending, no fma
//   floor   2 F n^2 fma a head forward, 5 F n^2 backward, both halved by the mask
//   decode  one query over cached rows: scores are dot() times scale, then as forward. A task is a
//           range of heads
//   source  Vaswani et al. 2017; recomputation from lse as in Dao et al. 2022
#include "kernels/cpu/gemm_transpose.h"
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/tile_product.h"
#include "kernels/cpu/vector_math.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

constexpr size_t kQueries = kAttentionQueryBlock;
constexpr size_t kKeys = kAttentionKeyBlock;

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
inline size_t larger(size_t a, size_t b) { return a > b ? a : b; }
inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// One head of one document: row 0 is the document's first token.
struct Head {
  const float *q, *k, *v;
  size_t q_stride, k_stride, v_stride;
  size_t length, size, window;
  float scale;
};

Head head_of(const TmAttention& a, const AttentionHead& task) {
  const size_t start = task.document.begin;
  const size_t group = task.head / (a.num_heads / a.num_kv_heads);
  Head h;
  h.q = a.q + start * a.q_stride + task.head * a.head_size;
  h.k = a.k + start * a.k_stride + group * a.head_size;
  h.v = a.v + start * a.v_stride + group * a.head_size;
  h.q_stride = a.q_stride;
  h.k_stride = a.k_stride;
  h.v_stride = a.v_stride;
  h.length = task.document.end - start;
  h.size = a.head_size;
  h.window = a.window;
  h.scale = a.scale;
  return h;
}

// First key that query i sees.
inline size_t first_key(const Head& h, size_t i) {
  return h.window > 0 && i >= h.window ? i + 1 - h.window : 0;
}

// Rows of keys or values times `factor`, transposed to [size, kKeys]; rows past the end are zero.
struct KeyBlock {
  const float* rows;
  size_t stride, num_rows, size;
  float factor;
};

void transpose_keys(const KeyBlock& b, float* out) {
  for (size_t j = 0; j < kKeys; j += 16) {
    const size_t rows = j < b.num_rows ? smaller(16, b.num_rows - j) : 0;
    if (rows < 16) {
      for (size_t f = 0; f < b.size; ++f) store(out + f * kKeys + j, zero());
    }
    if (rows == 0) continue;
    for (size_t f = 0; f < b.size; f += 16) {
      transpose_block(b.rows + j * b.stride + f, b.stride, rows, smaller(16, b.size - f), b.factor,
                      out + f * kKeys + j, kKeys);
    }
  }
}

// Added to a vector of scores, kMask + 16 - n keeps lanes below n and kMask + 32 - n lanes from n
// on.
alignas(64) constexpr float kOut = -__builtin_inff();
alignas(64) constexpr float kMask[48] = {
    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,
    kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut, kOut,
    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0,    0};

// The mask of the vector of keys [j, j + 16) for a row that sees keys [first, last].
inline Vec16 mask_of(size_t j, size_t first, size_t last) {
  Vec16 mask = zero();
  if (j + 16 > last + 1) mask = mask + load(kMask + 16 - (last + 1 - j));
  if (j < first) mask = mask + load(kMask + 32 - (first - j));
  return mask;
}

// A block of queries against a block of keys: scores or dp, without what no row of a tile may see.
struct ScoreBlock {
  const float* queries;  // row `first_query`
  size_t query_stride;
  const float* keys;  // transposed, [size, kKeys]
  float* out;
  size_t out_stride;
  size_t first_query, num_queries, first_key, size;
};

void score_block(const ScoreBlock& s) {
  for (size_t r = 0; r < s.num_queries; r += kTileRows) {
    const size_t rows = smaller(kTileRows, s.num_queries - r);
    const size_t seen =
        s.first_query + r + rows;  // keys below this one are seen by the tile's last row
    if (seen <= s.first_key) continue;
    TileProduct t;
    t.a = s.queries + r * s.query_stride;
    t.a_row = s.query_stride;
    t.a_column = 1;
    t.b = s.keys;
    t.b_stride = kKeys;
    t.c = s.out + r * s.out_stride;
    t.c_stride = s.out_stride;
    t.k = s.size;
    t.accumulate = false;
    rows_product(t, rows, round_up(smaller(seen - s.first_key, kKeys), 16));
  }
}

struct RowSoftmax {
  float largest, sum;
};

// Scores of keys [first, last] become exp(s scale - max); the rest of [clear_from, clear_to)
// becomes 0.
RowSoftmax softmax_row(float* s, Range seen, Range clear) {
  const size_t first = seen.begin, last = seen.end - 1;
  const size_t begin = first / 16 * 16, end = round_up(last + 1, 16);
  Vec16 m = set1(kOut);
  for (size_t j = begin; j < end; j += 16) {
    Vec16 x = load(s + j);
    if (j < first || j + 16 > last + 1) {
      x = x + mask_of(j, first, last);
      store(s + j, x);
    }
    m = max(x, m);
  }
  RowSoftmax row;
  row.largest = max_across(m);
  const Vec16 top = set1(row.largest);
  Vec16 total = zero();
  for (size_t j = begin; j < end; j += 16) {
    const Vec16 e = exp_nonpositive(load(s + j) - top);
    store(s + j, e);
    total = total + e;
  }
  row.sum = sum(total);
  for (size_t j = clear.begin / 16 * 16; j < begin; j += 16) store(s + j, zero());
  for (size_t j = end; j < clear.end; j += 16) store(s + j, zero());
  return row;
}

// out rows of one query block: p [rows, keys] times the values.
struct ValueProduct {
  const float* p;
  size_t p_stride;
  float* out;
  size_t out_stride;
  Range queries;
};

void value_product(const Head& h, const ValueProduct& v) {
  const size_t num_queries = v.queries.end - v.queries.begin;
  const size_t lowest = first_key(h, v.queries.begin);
  for (size_t key = lowest; key < v.queries.end; key = (key / kKeys + 1) * kKeys) {
    const size_t block_end = (key / kKeys + 1) * kKeys;
    for (size_t r = 0; r < num_queries; r += kTileRows) {
      const size_t rows = smaller(kTileRows, num_queries - r);
      const size_t tile_first = first_key(h, v.queries.begin + r);
      const size_t begin = larger(key, tile_first);
      const size_t end = smaller(block_end, v.queries.begin + r + rows);
      if (begin >= end) continue;
      TileProduct t;
      t.a = v.p + r * v.p_stride + begin;
      t.a_row = v.p_stride;
      t.a_column = 1;
      t.b = h.v + begin * h.v_stride;
      t.b_stride = h.v_stride;
      t.c = v.out + r * v.out_stride;
      t.c_stride = v.out_stride;
      t.k = end - begin;
      t.accumulate = begin != tile_first;
      rows_product(t, rows, h.size);
    }
  }
}

void scale_row(float* row, size_t n, float factor) {
  for (size_t f = 0; f < n; f += 16) {
    store_up_to(row + f, load_up_to(row + f, n - f) * set1(factor), n - f);
  }
}

void forward_block(const TmAttention& a, const AttentionHead& task, Range queries) {
  const Head h = head_of(a, task);
  const size_t num_blocks = (h.length + kKeys - 1) / kKeys;
  const float* keys = task.scratch;
  float* scores = task.scratch + num_blocks * kKeys * h.size;
  const size_t stride = num_blocks * kKeys + 16;
  const size_t num_queries = queries.end - queries.begin;
  for (size_t b = first_key(h, queries.begin) / kKeys; b * kKeys < queries.end; ++b) {
    score_block({h.q + queries.begin * h.q_stride, h.q_stride, keys + b * kKeys * h.size,
                 scores + b * kKeys, stride, queries.begin, num_queries, b * kKeys, h.size});
  }
  RowSoftmax softmax[kQueries];
  for (size_t r = 0; r < num_queries; ++r) {
    const size_t i = queries.begin + r;
    const size_t tile = r / kTileRows * kTileRows;
    const Range clear = {first_key(h, queries.begin + tile),
                         smaller(queries.begin + tile + kTileRows, queries.end)};
    softmax[r] = softmax_row(scores + r * stride, {first_key(h, i), i + 1}, clear);
  }
  // A loop of its own: the long chains of log then overlap.
  float* lse = a.lse + (task.document.begin + queries.begin) * a.num_heads + task.head;
  for (size_t r = 0; r < num_queries; ++r) {
    const double log_sum = log_positive(static_cast<double>(softmax[r].sum));
    lse[r * a.num_heads] = static_cast<float>(static_cast<double>(softmax[r].largest) + log_sum);
  }
  float* out = a.out + (task.document.begin + queries.begin) * a.out_stride + task.head * h.size;
  value_product(h, {scores, stride, out, a.out_stride, queries});
  for (size_t r = 0; r < num_queries; ++r) {
    scale_row(out + r * a.out_stride, h.size, 1.0f / softmax[r].sum);
  }
}

void forward(const TmAttention& a, const AttentionHead& task) {
  const Head h = head_of(a, task);
  for (size_t j = 0; j < h.length; j += kKeys) {
    transpose_keys(
        {h.k + j * h.k_stride, h.k_stride, smaller(kKeys, h.length - j), h.size, h.scale},
        task.scratch + j * h.size);
  }
  for (size_t i = 0; i < h.length; i += kQueries) {
    forward_block(a, task, {i, smaller(i + kQueries, h.length)});
  }
}

// What one backward task works with; rows count from the document's start.
struct Backward {
  Head head;
  const float *dout, *lse;
  float *dq, *dk, *dv;
  size_t dout_stride, lse_stride, dq_stride, dk_stride, dv_stride;
  float *keys, *values;  // transposed block, [size, kKeys]
  float *p, *ds;         // [kQueries, kKeys]
  float* delta;          // [length]
};

Backward backward_of(const TmAttentionBackward& a, const AttentionHead& task) {
  const size_t start = task.document.begin, at = task.head * a.forward.head_size;
  Backward b;
  b.head = head_of(a.forward, task);
  b.dout = a.dout + start * a.dout_stride + at;
  b.dout_stride = a.dout_stride;
  b.lse = a.forward.lse + start * a.forward.num_heads + task.head;
  b.lse_stride = a.forward.num_heads;
  b.dq = a.dq + start * a.dq_stride + at;
  b.dq_stride = a.dq_stride;
  b.dk = task.dk;
  b.dv = task.dv;
  b.dk_stride = task.dk_stride;
  b.dv_stride = task.dv_stride;
  b.keys = task.scratch;
  b.values = b.keys + kKeys * b.head.size;
  b.p = b.values + kKeys * b.head.size;
  b.ds = b.p + kQueries * kKeys;
  b.delta = b.ds + kQueries * kKeys;
  return b;
}

void clear_rows(float* x, size_t stride, const Head& h) {
  for (size_t i = 0; i < h.length; ++i) {
    for (size_t f = 0; f < h.size; f += 16) store_up_to(x + i * stride + f, zero(), h.size - f);
  }
}

// Turns scores into p and scale dp into ds; what a row may not see becomes 0.
void probabilities(const Backward& b, Range queries, Range keys) {
  const Head& h = b.head;
  for (size_t i = queries.begin; i < queries.end; ++i) {
    float* p = b.p + (i - queries.begin) * kKeys;
    float* ds = b.ds + (i - queries.begin) * kKeys;
    const size_t first = first_key(h, i);
    const Vec16 lse = set1(b.lse[i * b.lse_stride]), delta = set1(b.delta[i]);
    for (size_t c = 0; c < kKeys; c += 16) {
      const size_t j = keys.begin + c;
      if (j > i || j + 16 <= first) {
        store(p + c, zero());
        store(ds + c, zero());
        continue;
      }
      Vec16 s = load(p + c);
      if (j < first || j + 16 > i + 1) s = s + mask_of(j, first, i);
      const Vec16 e = exp_nonpositive(s - lse);
      store(p + c, e);
      store(ds + c, e * (load(ds + c) - delta));
    }
  }
}

void query_grad(const Backward& b, Range queries, Range keys) {
  const Head& h = b.head;
  for (size_t i = queries.begin; i < queries.end; i += kTileRows) {
    const size_t rows = smaller(kTileRows, queries.end - i);
    const size_t begin = larger(keys.begin, first_key(h, i));
    const size_t end = smaller(keys.end, i + rows);
    if (begin >= end) continue;
    TileProduct t;
    t.a = b.ds + (i - queries.begin) * kKeys + (begin - keys.begin);
    t.a_row = kKeys;
    t.a_column = 1;
    t.b = h.k + begin * h.k_stride;
    t.b_stride = h.k_stride;
    t.c = b.dq + i * b.dq_stride;
    t.c_stride = b.dq_stride;
    t.k = end - begin;
    t.accumulate = true;
    rows_product(t, rows, h.size);
  }
}

void key_value_grad(const Backward& b, Range queries, Range keys) {
  const Head& h = b.head;
  for (size_t j = keys.begin; j < keys.end; j += kTileRows) {
    const size_t rows = smaller(kTileRows, keys.end - j);
    const size_t begin = larger(queries.begin, j);
    if (begin >= queries.end) continue;
    const size_t at = (begin - queries.begin) * kKeys + (j - keys.begin);
    TileProduct t;
    t.a_row = 1;
    t.a_column = kKeys;
    t.k = queries.end - begin;
    t.accumulate = true;
    t.a = b.p + at;
    t.b = b.dout + begin * b.dout_stride;
    t.b_stride = b.dout_stride;
    t.c = b.dv + j * b.dv_stride;
    t.c_stride = b.dv_stride;
    rows_product(t, rows, h.size);
    t.a = b.ds + at;
    t.b = h.q + begin * h.q_stride;
    t.b_stride = h.q_stride;
    t.c = b.dk + j * b.dk_stride;
    t.c_stride = b.dk_stride;
    rows_product(t, rows, h.size);
  }
}

void backward_keys(const Backward& b, Range keys) {
  const Head& h = b.head;
  const size_t num_keys = keys.end - keys.begin;
  transpose_keys({h.k + keys.begin * h.k_stride, h.k_stride, num_keys, h.size, h.scale}, b.keys);
  transpose_keys({h.v + keys.begin * h.v_stride, h.v_stride, num_keys, h.size, h.scale}, b.values);
  // Queries that see a key of the block: from its first key to the last key's last one.
  const size_t end = h.window > 0 ? smaller(h.length, keys.end - 1 + h.window) : h.length;
  for (size_t i = keys.begin / kQueries * kQueries; i < end; i += kQueries) {
    const Range queries = {larger(i, keys.begin), smaller(i + kQueries, end)};
    const size_t num_queries = queries.end - queries.begin;
    score_block({h.q + queries.begin * h.q_stride, h.q_stride, b.keys, b.p, kKeys, queries.begin,
                 num_queries, keys.begin, h.size});
    score_block({b.dout + queries.begin * b.dout_stride, b.dout_stride, b.values, b.ds, kKeys,
                 queries.begin, num_queries, keys.begin, h.size});
    probabilities(b, queries, keys);
    query_grad(b, queries, keys);
    key_value_grad(b, queries, keys);
  }
}

void backward(const TmAttentionBackward& a, const AttentionHead& task) {
  const Backward b = backward_of(a, task);
  const Head& h = b.head;
  const float* out =
      a.forward.out + task.document.begin * a.forward.out_stride + task.head * h.size;
  for (size_t i = 0; i < h.length; ++i) {
    b.delta[i] = h.scale * dot(b.dout + i * b.dout_stride, out + i * a.forward.out_stride, h.size);
  }
  clear_rows(b.dq, b.dq_stride, h);
  clear_rows(b.dk, b.dk_stride, h);
  clear_rows(b.dv, b.dv_stride, h);
  for (size_t j = 0; j < h.length; j += kKeys) {
    backward_keys(b, {j, smaller(j + kKeys, h.length)});
  }
}

void group_sum(const AttentionGroupSum& a) {
  for (size_t i = 0; i < a.rows; ++i) {
    for (size_t f = 0; f < a.head_size; f += 16) {
      const size_t left = a.head_size - f;
      float* out = a.sum + i * a.sum_stride + f;
      Vec16 s = load_up_to(out, left);
      for (size_t part = 0; part < a.num_parts; ++part) {
        s = s + load_up_to(a.parts + part * a.part_stride + i * a.head_size + f, left);
      }
      store_up_to(out, s, left);
    }
  }
}

void decode(const TmDecodeAttention& a, Range heads) {
  const size_t num_keys = a.end - a.first, size = a.head_size;
  for (size_t head = heads.begin; head < heads.end; ++head) {
    const size_t group = head / (a.num_heads / a.num_kv_heads);
    const float* q = a.q + head * size;
    const float* k = a.k + a.first * a.k_stride + group * size;
    const float* v = a.v + a.first * a.v_stride + group * size;
    float* p = a.scores + head * a.score_stride;
    for (size_t j = 0; j < num_keys; ++j) p[j] = dot(q, k + j * a.k_stride, size) * a.scale;
    for (size_t j = num_keys; j % 16 != 0; ++j) p[j] = 0;
    const RowSoftmax softmax = softmax_row(p, {0, num_keys}, {0, num_keys});
    const Vec16 factor = set1(1.0f / softmax.sum);
    float* out = a.out + head * size;
    for (size_t f = 0; f < size; f += 16) {
      const size_t left = size - f;
      Vec16 s = zero();
      for (size_t j = 0; j < num_keys; ++j) {
        s = fma(set1(p[j]), load_up_to(v + j * a.v_stride + f, left), s);
      }
      store_up_to(out + f, s * factor, left);
    }
  }
}

}  // namespace

void register_attention(OpsKernels& kernels) {
  kernels.attention_forward = forward;
  kernels.attention_backward = backward;
  kernels.attention_group_sum = group_sum;
  kernels.decode_attention = decode;
}

}  // namespace TM_ISA
}  // namespace tunemesh
