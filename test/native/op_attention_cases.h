// Cases for attention over documents and over cached rows.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/reference/reference.h"
#include "op_layer_cases.h"

namespace tunemesh {

struct AttentionShape {
  std::vector<int32_t> starts;
  size_t heads, kv_heads, size, window, gap;
};

struct AttentionInputs {
  Matrix q, k, v, dout;
  float scale;
};

inline Outputs attention_kernel(const Device& d, const AttentionShape& s,
                                const AttentionInputs& in) {
  const size_t n = size_t(s.starts.back());
  size_t longest = 0;
  for (size_t i = 1; i < s.starts.size(); ++i) {
    longest = std::max(longest, size_t(s.starts[i] - s.starts[i - 1]));
  }
  Matrix out = poisoned(in.dout), dq = poisoned(in.q), dk = poisoned(in.k), dv = poisoned(in.v);
  Floats lse(n * s.heads, kPoison);
  const TmAttentionJob job = {n, longest, s.heads, s.kv_heads, s.size, true};
  const size_t bytes = d.backend->attention_scratch_bytes(d.context, &job);
  Floats scratch(bytes / sizeof(float), kPoison);
  TmAttentionBackward b{};
  b.forward = {in.q.values.data(),
               in.k.values.data(),
               in.v.values.data(),
               in.q.stride,
               in.k.stride,
               in.v.stride,
               out.values.data(),
               out.stride,
               lse.data(),
               s.starts.data(),
               s.starts.size() - 1,
               n,
               s.heads,
               s.kv_heads,
               s.size,
               s.window,
               in.scale,
               scratch.data(),
               bytes,
               s.starts.data(),
               0};
  require(d.backend->attention_forward(d.context, &b.forward), d);
  scratch.assign(scratch.size(), kPoison);
  b.dout = in.dout.values.data();
  b.dout_stride = in.dout.stride;
  b.dq = dq.values.data();
  b.dk = dk.values.data();
  b.dv = dv.values.data();
  b.dq_stride = dq.stride;
  b.dk_stride = dk.stride;
  b.dv_stride = dv.stride;
  require(d.backend->attention_backward(d.context, &b), d);
  return {out.values, lse, dq.values, dk.values, dv.values};
}

template <typename Real>
inline Exact attention_reference(const AttentionShape& s, const AttentionInputs& in) {
  auto q = as<Real>(in.q.values), k = as<Real>(in.k.values), v = as<Real>(in.v.values);
  auto dout = as<Real>(in.dout.values), out = as<Real>(poisoned(in.dout).values);
  auto dq = as<Real>(poisoned(in.q).values), dk = as<Real>(poisoned(in.k).values);
  auto dv = as<Real>(poisoned(in.v).values);
  std::vector<Real> lse(size_t(s.starts.back()) * s.heads);
  const reference::Attention<Real> forward = {{q.data(), in.q.stride},
                                              {k.data(), in.k.stride},
                                              {v.data(), in.v.stride},
                                              {out.data(), in.dout.stride},
                                              lse.data(),
                                              s.starts.data(),
                                              s.starts.size() - 1,
                                              s.heads,
                                              s.kv_heads,
                                              s.size,
                                              s.window,
                                              in.scale};
  reference::attention_forward<Real>(forward);
  reference::attention_backward<Real>({forward,
                                       {dout.data(), in.dout.stride},
                                       {dq.data(), in.q.stride},
                                       {dk.data(), in.k.stride},
                                       {dv.data(), in.v.stride}});
  return {exact(out), exact(lse), exact(dq), exact(dk), exact(dv)};
}

inline OpCase attention_case(Random random, const AttentionShape& s) {
  const size_t n = size_t(s.starts.back());
  const size_t wide = s.heads * s.size, narrow = s.kv_heads * s.size;
  const AttentionInputs in = {
      random_matrix(random, n, wide, s.gap), random_matrix(random, n, narrow, 2 * s.gap),
      random_matrix(random, n, narrow, s.gap), random_matrix(random, n, wide, 3 * s.gap),
      1.0f / sqrtf(float(s.size))};
  OpCase op = make_case(
      named("attention", {n, s.starts.size() - 1, s.heads, s.kv_heads, s.size, s.window}),
      [=](const Device& d) { return attention_kernel(d, s, in); },
      [=](auto real) { return attention_reference<decltype(real)>(s, in); });
  // The weights, or their gradients, and the result: tensor cores take both factors in bf16. cuDNN
  // 9.19 on an H100 lost at most 2.4 times one rounding in these cases.
  op.num_roundings = 2;
  return op;
}

struct DecodeShape {
  size_t first, end, heads, kv_heads, size, gap;
};

inline OpCase decode_case(Random random, const DecodeShape& s) {
  const size_t narrow = s.kv_heads * s.size;
  const Floats q = random.normals(s.heads * s.size, 1);
  const Matrix k = random_matrix(random, s.end, narrow, s.gap);
  const Matrix v = random_matrix(random, s.end, narrow, 2 * s.gap);
  const float scale = 1.0f / sqrtf(float(s.size));
  const auto kernel = [=](const Device& d) {
    const size_t stride = (s.end - s.first + 15) / 16 * 16;
    Floats out(q.size(), kPoison), scores(s.heads * stride, kPoison);
    const TmDecodeAttention call = {
        q.data(), k.values.data(), v.values.data(), k.stride, v.stride, out.data(),    s.first,
        s.end,    s.heads,         s.kv_heads,      s.size,   scale,    scores.data(), stride};
    require(d.backend->decode_attention(d.context, &call), d);
    return Outputs{out};
  };
  const auto reference = [=](auto real) {
    using Real = decltype(real);
    auto exact_q = as<Real>(q), exact_k = as<Real>(k.values), exact_v = as<Real>(v.values);
    std::vector<Real> out(q.size());
    reference::decode_attention<Real>({exact_q.data(),
                                       {exact_k.data(), k.stride},
                                       {exact_v.data(), v.stride},
                                       out.data(),
                                       s.first,
                                       s.end,
                                       s.heads,
                                       s.kv_heads,
                                       s.size,
                                       scale});
    return Exact{exact(out)};
  };
  return make_case(named("decode attention", {s.first, s.end, s.heads, s.kv_heads, s.size}), kernel,
                   reference);
}

}  // namespace tunemesh
