// Cross entropy of rows of logits, and their gradient in place.
//   row_loss = max + log(sum_v exp(x_v - max)) - x_target
//   dlogits  = exp(x_v - max) (grad_scale / sum); (exp(x_target - max) / sum - 1) grad_scale at the
//              target
//
//   shapes  logits [rows, v] in rows of `stride`; targets [rows]
//   order   sum: 16 lanes within spans of 1,024 columns, each span's tree sum added in double,
//           spans ascending; the last v mod 16 columns one by one in double
//   numbers exp is vector_math.h's; log, the row's loss and the target's gradient are double,
//           rounded once. A NaN in a row makes its loss NaN
//   floor   4 bytes a logit, 12 with the gradient; a row stays in the second-level cache between
//           its passes
//   also    exp and log themselves, for the tests
#include "kernels/cpu/ops_table.h"
#include "kernels/cpu/vector_math.h"

namespace tunemesh {
namespace TM_ISA {
namespace {

constexpr size_t kSpan = 1024;

float row_max(const float* x, size_t n) {
  Vec16 m0 = set1(x[0]), m1 = m0, m2 = m0, m3 = m0;
  size_t j = 0;
  for (; j + 64 <= n; j += 64) {
    m0 = max(load(x + j), m0);
    m1 = max(load(x + j + 16), m1);
    m2 = max(load(x + j + 32), m2);
    m3 = max(load(x + j + 48), m3);
  }
  for (; j + 16 <= n; j += 16) m0 = max(load(x + j), m0);
  float largest = max_across(max(max(m0, m1), max(m2, m3)));
  for (; j < n; ++j) largest = x[j] > largest ? x[j] : largest;
  return largest;
}

// Sum of exp(x - max); where `keep`, the terms replace x.
double sum_exp(float* x, size_t n, bool keep, float largest) {
  const Vec16 m = set1(largest);
  double total = 0;
  for (size_t begin = 0; begin < n; begin += kSpan) {
    const size_t end = n - begin < kSpan ? n : begin + kSpan;
    Vec16 s = zero();
    size_t j = begin;
    for (; j + 16 <= end; j += 16) {
      const Vec16 e = exp_nonpositive(load(x + j) - m);
      if (keep) store(x + j, e);
      s = s + e;
    }
    total += static_cast<double>(sum(s));
    // The last lanes one by one from a padded vector: their order is part of the contract too.
    if (j < end) {
      const size_t left = end - j;
      alignas(64) float lanes[16] = {};
      store(lanes, exp_nonpositive(load_tail(x + j, left) - m));
      for (size_t k = 0; k < left; ++k) {
        total += static_cast<double>(lanes[k]);
        if (keep) x[j + k] = lanes[k];
      }
    }
  }
  return total;
}

void cross_entropy(const TmCrossEntropy& a, Range rows) {
  for (size_t i = rows.begin; i < rows.end; ++i) {
    float* x = a.logits + i * a.stride;
    const size_t target = static_cast<size_t>(a.targets[i]);
    const double at_target = static_cast<double>(x[target]);
    const float largest = row_max(x, a.v);
    const double sum = sum_exp(x, a.v, a.dlogits != 0, largest);
    a.row_losses[i] = log_positive(sum) + (static_cast<double>(largest) - at_target);
    if (!a.dlogits) continue;
    const double scale = static_cast<double>(a.grad_scale);
    const double target_grad = (static_cast<double>(x[target]) / sum - 1.0) * scale;
    const Vec16 factor = set1(static_cast<float>(scale / sum));
    for (size_t j = 0; j < a.v; j += 16) {
      const size_t left = a.v - j;
      store_up_to(x + j, load_up_to(x + j, left) * factor, left);
    }
    x[target] = static_cast<float>(target_grad);
  }
}

void exp_array(const float* x, float* y, size_t n) {
  for (size_t i = 0; i < n; i += 16) {
    store_up_to(y + i, exp_nonpositive(load_up_to(x + i, n - i)), n - i);
  }
}

void log_array(const double* x, double* y, size_t n) {
  for (size_t i = 0; i < n; ++i) y[i] = log_positive(x[i]);
}

}  // namespace

void register_loss(OpsKernels& kernels) {
  kernels.cross_entropy = cross_entropy;
  kernels.exp_nonpositive = exp_array;
  kernels.log_positive = log_array;
}

}  // namespace TM_ISA
}  // namespace tunemesh
