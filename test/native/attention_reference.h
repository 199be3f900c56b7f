// Causal attention of packed documents in double, from bf16 inputs: exactly, and as a careful bf16
// kernel makes it (weights and score gradients rounded where the tensor cores take them, sums
// exact, results rounded). The second's distance from the first is what bf16 costs.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace tunemesh::test {

inline uint16_t to_bf16(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline double from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float single;
  std::memcpy(&single, &bits, sizeof(single));
  return single;
}

struct AttentionSizes {
  std::vector<int32_t> starts;  // [documents + 1]
  size_t num_heads, num_kv_heads, head_size, window;

  size_t n() const { return static_cast<size_t>(starts.back()); }
  size_t query_width() const { return num_heads * head_size; }
  size_t kv_width() const { return num_kv_heads * head_size; }
  size_t ratio() const { return num_heads / num_kv_heads; }
};

struct AttentionInputs {
  std::vector<double> q, k, v, dout;  // bf16 values
};
struct AttentionResults {
  std::vector<double> out, lse, dq, dk, dv;
};

// One query head of one document.
class DocumentAttention {
 public:
  DocumentAttention(const AttentionSizes& sizes, const AttentionInputs& in, bool rounded)
      : s_(sizes), in_(in), rounded_(rounded) {}

  void run(size_t document, size_t head, AttentionResults& r) const {
    const size_t first = static_cast<size_t>(s_.starts[document]);
    const size_t end = static_cast<size_t>(s_.starts[document + 1]);
    const size_t f = s_.head_size;
    std::vector<double> dk((end - first) * f), dv((end - first) * f);
    for (size_t i = first; i < end; ++i) add_row(first, i, head, {dk.data(), dv.data(), &r});
    for (size_t j = first; j < end; ++j) {
      for (size_t c = 0; c < f; ++c) {
        const size_t to = j * s_.kv_width() + head / s_.ratio() * f + c;
        r.dk[to] += step(dk[(j - first) * f + c]);
        r.dv[to] += step(dv[(j - first) * f + c]);
      }
    }
  }

 private:
  struct Sinks {
    double *dk, *dv;  // of this document and query head
    AttentionResults* results;
  };

  double step(double value) const { return rounded_ ? from_bf16(to_bf16(value)) : value; }

  double dot(const double* a, const double* b) const {
    double sum = 0;
    for (size_t c = 0; c < s_.head_size; ++c) sum += a[c] * b[c];
    return sum;
  }
  void add(double* to, double factor, const double* x) const {
    for (size_t c = 0; c < s_.head_size; ++c) to[c] += factor * x[c];
  }

  void add_row(size_t first, size_t i, size_t head, const Sinks& sinks) const {
    const size_t f = s_.head_size, at = i * s_.query_width() + head * f;
    const size_t group = head / s_.ratio() * f;
    const size_t from = s_.window == 0 || i - first < s_.window ? first : i + 1 - s_.window;
    const double scale = static_cast<float>(1 / std::sqrt(static_cast<double>(f)));
    const double* q = &in_.q[at];
    const double* dout = &in_.dout[at];
    const auto key = [&](size_t j) { return &in_.k[j * s_.kv_width() + group]; };
    const auto value = [&](size_t j) { return &in_.v[j * s_.kv_width() + group]; };
    std::vector<double> weights(i + 1 - from), out(f), dq(f);
    double top = -INFINITY, sum = 0;
    for (size_t j = from; j <= i; ++j) {
      weights[j - from] = scale * dot(q, key(j));
      top = std::max(top, weights[j - from]);
    }
    for (double& w : weights) sum += w = std::exp(w - top);
    for (size_t j = from; j <= i; ++j) add(out.data(), step(weights[j - from]) / sum, value(j));
    for (double& x : out) x = step(x);
    const double total = dot(dout, out.data());
    for (size_t j = from; j <= i; ++j) {
      const double w = weights[j - from] / sum;
      const double ds = step(w * (dot(dout, value(j)) - total) * scale);
      add(sinks.dv + (j - first) * f, step(w), dout);
      add(sinks.dk + (j - first) * f, ds, q);
      add(dq.data(), ds, key(j));
    }
    AttentionResults& r = *sinks.results;
    r.lse[i * s_.num_heads + head] = top + std::log(sum);
    for (size_t c = 0; c < f; ++c) {
      r.out[at + c] = out[c];
      r.dq[at + c] = step(dq[c]);
    }
  }

  const AttentionSizes& s_;
  const AttentionInputs& in_;
  bool rounded_;
};

inline AttentionResults reference_attention(const AttentionSizes& sizes, const AttentionInputs& in,
                                            bool rounded) {
  AttentionResults r;
  r.out.resize(sizes.n() * sizes.query_width());
  r.dq.resize(r.out.size());
  r.lse.resize(sizes.n() * sizes.num_heads);
  r.dk.resize(sizes.n() * sizes.kv_width());
  r.dv.resize(r.dk.size());
  const DocumentAttention attention(sizes, in, rounded);
  const size_t groups = sizes.num_kv_heads;
  const size_t threads = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, groups);
  std::vector<std::thread> pool;
  for (size_t t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      for (size_t head = 0; head < sizes.num_heads; ++head) {
        if (head / sizes.ratio() % threads != t) continue;
        for (size_t d = 0; d + 1 < sizes.starts.size(); ++d) attention.run(d, head, r);
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  if (rounded) {
    for (double& x : r.dk) x = from_bf16(to_bf16(x));
    for (double& x : r.dv) x = from_bf16(to_bf16(x));
  }
  return r;
}

}  // namespace tunemesh::test
