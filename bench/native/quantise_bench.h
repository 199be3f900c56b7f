// Rows made as e4m3 numbers too, by the operation that makes them and by quantise_rows behind it.
#pragma once
#include <string>

#include "bench/native/cuda_bench.h"

namespace tunemesh::bench {

struct QuantisedSizes {
  size_t c, d, heads, kv_heads, head_size;
};

class QuantiseBench {
 public:
  QuantiseBench(Bench& bench, const QuantisedSizes& sizes) : b_(bench), m_(sizes) {
    const size_t widest = std::max(2 * m_.d, m_.c);
    apart_ = {static_cast<uint8_t*>(b_.memory(kTokens * widest)), b_.floats(kTokens)};
  }

  void time_norms() {
    const double row = rows_of(m_.c);
    TmElement *x = b_.elements(kTokens * m_.c), *y = b_.elements(kTokens * m_.c);
    float *gain = b_.floats(m_.c), *rstd = b_.floats(kTokens);
    TmRmsNorm norm = {x, gain, y, rstd, kTokens, m_.c, m_.c, m_.c, 1e-5f, 0, {}};
    both("rms norm forward", {2 * row, m_.c, y}, [&](const TmQuantised& to) {
      norm.quantised = to;
      return b_.ops().rms_norm_forward(b_.context(), &norm);
    });
    TmElement* dx = b_.elements(kTokens * m_.c);
    TmRmsNormBackward back = {};
    back.dy = y;
    back.x = x;
    back.gain = gain;
    back.rstd = rstd;
    back.dx = dx;
    back.n = kTokens;
    back.c = back.x_stride = back.dy_stride = back.dx_stride = m_.c;
    back.dx_add = 1;
    both("rms norm backward, added", {4 * row, m_.c, dx}, [&](const TmQuantised& to) {
      back.quantised = to;
      return b_.ops().rms_norm_backward(b_.context(), &back);
    });
  }

  void time_swiglu() {
    const double row = rows_of(m_.d);
    TmElement* gate = b_.elements(kTokens * 2 * m_.d);
    auto* up =
        reinterpret_cast<TmElement*>(reinterpret_cast<char*>(gate) + m_.d * b_.element_bytes());
    TmElement *out = b_.elements(kTokens * m_.d), *dout = b_.elements(kTokens * m_.d);
    TmSwiGlu forward = {gate, up, out, kTokens, m_.d, 2 * m_.d, m_.d, {}};
    both("swiglu forward", {3 * row, m_.d, out}, [&](const TmQuantised& to) {
      forward.quantised = to;
      return b_.ops().swiglu_forward(b_.context(), &forward);
    });
    TmSwiGluBackward back = {};
    back.dout = dout;
    back.gate = back.dgate = gate;
    back.up = back.dup = up;
    back.n = kTokens;
    back.d = back.out_stride = m_.d;
    back.in_stride = 2 * m_.d;
    both("swiglu backward", {5 * row, 2 * m_.d, gate}, [&](const TmQuantised& to) {
      back.quantised = to;
      return b_.ops().swiglu_backward(b_.context(), &back);
    });
  }

  void time_rope() {
    const size_t rotated = (m_.heads + m_.kv_heads) * m_.head_size;
    const size_t width = rotated + m_.kv_heads * m_.head_size;
    TmElement* x = b_.elements(kTokens * width);
    const size_t table = kTokens * m_.head_size / 2;
    TmRope rope = {};
    rope.x = x;
    rope.x_stride = width;
    rope.positions = b_.indices(kTokens, kTokens);
    rope.cos = b_.floats(table);
    rope.sin = b_.floats(table);
    rope.n = kTokens;
    rope.heads = m_.heads + m_.kv_heads;
    rope.head_size = m_.head_size;
    rope.inverse = 1;
    rope.quantised_width = width;
    const double read = rows_of(width - rotated);
    both("rope of q and k, beside v", {2 * rows_of(rotated), width, x, read},
         [&](const TmQuantised& to) {
           rope.quantised = to;
           return b_.ops().rope(b_.context(), &rope);
         });
  }

 private:
  // What the operation moves by itself, and what it makes; `read`: only in order to quantise it.
  struct Rows {
    double bytes;
    size_t c;
    const TmElement* made;
    double read = 0;
  };
  double rows_of(size_t c) const {
    return double(kTokens) * double(c) * double(b_.element_bytes());
  }
  template <typename Run>
  void both(const std::string& name, const Rows& rows, const Run& run) {
    const double numbers = double(kTokens) * double(rows.c);
    b_.memory_bound(name + ", fused", rows.bytes + rows.read + numbers,
                    [&] { return run(apart_); });
    b_.memory_bound(name, rows.bytes, [&] { return run(TmQuantised{}); });
    const TmQuantiseRows pass = {rows.made, rows.c, apart_.q, apart_.scales, kTokens, rows.c};
    b_.memory_bound("  then a pass", rows_of(rows.c) + numbers,
                    [&] { return b_.ops().quantise_rows(b_.context(), &pass); });
  }

  Bench& b_;
  QuantisedSizes m_;
  TmQuantised apart_;
};

inline void time_quantised(Bench& b, const QuantisedSizes& sizes) {
  QuantiseBench bench(b, sizes);
  bench.time_norms();
  bench.time_swiglu();
  bench.time_rope();
  b.release_all();
}

}  // namespace tunemesh::bench
