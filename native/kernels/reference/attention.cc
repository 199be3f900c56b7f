// Reference: causal attention within documents, forward and backward. See reference.h.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/reference.h"

namespace tunemesh::reference {
namespace {

// First key that query `i` of a document starting at `start` sees.
size_t first_key(size_t start, size_t i, size_t window) {
  return window > 0 && i - start >= window ? i + 1 - window : start;
}

// Calls visit(query, first key, query head, key/value head) for every row of scores, documents in
// order.
template <typename Real, typename Visit>
void for_each_row(const Attention<Real>& a, Visit visit) {
  const size_t group = a.num_heads / a.num_kv_heads;
  for (size_t d = 0; d < a.num_documents; ++d) {
    const size_t start = size_t(a.document_starts[d]), end = size_t(a.document_starts[d + 1]);
    for (size_t h = 0; h < a.num_heads; ++h) {
      for (size_t i = start; i < end; ++i) visit(i, first_key(start, i, a.window), h, h / group);
    }
  }
}

template <typename Real>
Real dot(const Real* a, const Real* b, size_t n) {
  Real sum = 0;
  for (size_t f = 0; f < n; ++f) sum += a[f] * b[f];
  return sum;
}

}  // namespace

template <typename Real>
void attention_forward(const Attention<Real>& a) {
  const size_t size = a.head_size;
  std::vector<Real> p;
  for_each_row(a, [&](size_t i, size_t first, size_t h, size_t g) {
    const Real* q = a.q.row(i) + h * size;
    p.clear();
    for (size_t j = first; j <= i; ++j)
      p.push_back(dot(q, a.k.row(j) + g * size, size) * Real(a.scale));
    const Real max = *std::max_element(p.begin(), p.end());
    Real sum = 0;
    for (Real& value : p) sum += value = std::exp(value - max);
    a.lse[i * a.num_heads + h] = max + std::log(sum);
    for (size_t f = 0; f < size; ++f) {
      Real o = 0;
      for (size_t j = first; j <= i; ++j) o += p[j - first] / sum * a.v.row(j)[g * size + f];
      a.out.row(i)[h * size + f] = o;
    }
  });
}

template <typename Real>
void attention_backward(const AttentionBackward<Real>& b) {
  const Attention<Real>& a = b.forward;
  const size_t size = a.head_size, n = size_t(a.document_starts[a.num_documents]);
  for (size_t i = 0; i < n; ++i) {
    std::fill_n(b.dk.row(i), a.num_kv_heads * size, Real(0));
    std::fill_n(b.dv.row(i), a.num_kv_heads * size, Real(0));
    std::fill_n(b.dq.row(i), a.num_heads * size, Real(0));
  }
  for_each_row(a, [&](size_t i, size_t first, size_t h, size_t g) {
    const Real* q = a.q.row(i) + h * size;
    const Real* dout = b.dout.row(i) + h * size;
    const Real delta = dot(dout, a.out.row(i) + h * size, size);
    for (size_t j = first; j <= i; ++j) {
      const Real* k = a.k.row(j) + g * size;
      const Real p = std::exp(dot(q, k, size) * Real(a.scale) - a.lse[i * a.num_heads + h]);
      const Real ds = p * (dot(dout, a.v.row(j) + g * size, size) - delta) * Real(a.scale);
      for (size_t f = 0; f < size; ++f) {
        b.dq.row(i)[h * size + f] += ds * k[f];
        b.dk.row(j)[g * size + f] += ds * q[f];
        b.dv.row(j)[g * size + f] += p * dout[f];
      }
    }
  });
}

template <typename Real>
void decode_attention(const DecodeAttention<Real>& a) {
  const size_t size = a.head_size, num_keys = a.end - a.first;
  std::vector<Real> p(num_keys);
  for (size_t h = 0; h < a.num_heads; ++h) {
    const size_t g = h / (a.num_heads / a.num_kv_heads);
    for (size_t j = 0; j < num_keys; ++j) {
      p[j] = dot(a.q + h * size, a.k.row(a.first + j) + g * size, size) * Real(a.scale);
    }
    const Real max = *std::max_element(p.begin(), p.end());
    Real sum = 0;
    for (Real& value : p) sum += value = std::exp(value - max);
    for (size_t f = 0; f < size; ++f) {
      Real o = 0;
      for (size_t j = 0; j < num_keys; ++j) o += p[j] / sum * a.v.row(a.first + j)[g * size + f];
      a.out[h * size + f] = o;
    }
  }
}

template void attention_forward<float>(const Attention<float>&);
template void attention_forward<double>(const Attention<double>&);
template void attention_backward<float>(const AttentionBackward<float>&);
template void attention_backward<double>(const AttentionBackward<double>&);
template void decode_attention<float>(const DecodeAttention<float>&);
template void decode_attention<double>(const DecodeAttention<double>&);

}  // namespace tunemesh::reference
