// The kernels of every operation of backend.h but the matrix products and the exchange, as one
// table for each instruction path. A kernel does one task on one thread: a range of rows, of
// columns or of elements. ops_table.cc checks the arguments, cuts the work into tasks whose bounds
// depend on the shapes alone, and gives them to the context's pool.
//
// Contracts (shapes, order of sums, source) stand on top of each family's *_isa.cc.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"

namespace tunemesh {

struct CpuKernels;
enum class InstructionPath;

struct Range {
  size_t begin, end;
};

// out[rows[i]] += x[i] for ascending i: embedding_backward_add and scatter_rows_add.
struct ScatterRows {
  const float* x;       // [n, c]
  const int32_t* rows;  // [n]
  float* out;           // [*, c]
  size_t n, c;
};

// bias_add and bias_grad_add.
struct Bias {
  float* y;           // [n, c] in rows of `stride`: overwritten by bias_add
  const float* dy;    // the same for bias_grad_add
  const float* bias;  // [c]
  float* dbias;       // [c]
  size_t n, c, stride;
};

struct AddElements {
  float* y;
  const float* x;
};

// The scalars of an update as its loops use them: products and quotients made once.
struct AdamWScalars {
  explicit AdamWScalars(const TmAdamW& a)
      : clip(a.clip_factor),
        decay(a.learning_rate * a.weight_decay),
        one_minus_beta1(static_cast<float>(1.0 - a.beta1)),
        beta2(static_cast<float>(a.beta2)),
        one_minus_beta2(static_cast<float>(1.0 - a.beta2)),
        correction2(a.bias_correction2_sqrt),
        epsilon(a.epsilon),
        step_size(a.learning_rate / a.bias_correction1),
        has_decay(a.weight_decay != 0.0f) {}
  float clip, decay, one_minus_beta1, beta2, one_minus_beta2, correction2, epsilon, step_size;
  bool has_decay;
};

// Part of one tensor of floats.
struct AdamWSpan {
  float *p, *m, *v;
  const float* gradient;
  size_t n;
  bool decays;
};

// One query head of one document.
struct AttentionHead {
  Range document;  // tokens
  size_t head;
  float* scratch;  // attention_thread_floats()
  // Where this head's part of dk and dv goes (backward only): row 0 is the document's first token.
  float* dk;
  float* dv;
  size_t dk_stride, dv_stride;
};

// Adds the parts of a group's query heads in ascending order to the first one's: the columns of one
// key/value head.
struct AttentionGroupSum {
  float* sum;          // [rows, head_size], holds the first head's part
  const float* parts;  // [num_parts][part_stride], each [rows, head_size] dense
  size_t sum_stride, part_stride, num_parts, rows, head_size;
};

struct OpsKernels {
  void (*rms_norm_forward)(const TmRmsNorm&, Range rows);
  void (*rms_norm_backward)(const TmRmsNormBackward&, Range rows);
  void (*rms_norm_gain_grad)(const TmRmsNormBackward&, Range columns);
  void (*scatter_rows_add)(const ScatterRows&, Range columns);
  void (*bias_add)(const Bias&, Range rows);
  void (*bias_grad_add)(const Bias&, Range columns);
  void (*add)(const AddElements&, Range elements);
  void (*rope)(const TmRope&, Range rows);
  void (*attention_forward)(const TmAttention&, const AttentionHead&);
  void (*attention_backward)(const TmAttentionBackward&, const AttentionHead&);
  void (*attention_group_sum)(const AttentionGroupSum&);
  void (*decode_attention)(const TmDecodeAttention&, Range heads);
  void (*swiglu_forward)(const TmSwiGlu&, Range rows);
  void (*swiglu_backward)(const TmSwiGluBackward&, Range rows);
  void (*cross_entropy)(const TmCrossEntropy&, Range rows);
  void (*adamw)(const AdamWSpan&, const AdamWScalars&);
  // For tests: y = exp(x) for x <= 0, and y = log(x) for x > 0 (vector_math.h).
  void (*exp_nonpositive)(const float* x, float* y, size_t n);
  void (*log_positive)(const double* x, double* y, size_t n);
};

// Blocks of the attention kernels, the same on every path because masks are cut along them.
constexpr size_t kAttentionQueryBlock = 48;
constexpr size_t kAttentionKeyBlock = 64;

// Scratch floats that one thread needs for documents of at most `longest` tokens.
size_t attention_thread_floats(size_t longest, size_t head_size);

void register_ops(InstructionPath path, CpuKernels& kernels);
TmStatus sum_squares(TmContext* context, const TmSumSquares* args);  // gradient_norm.cc
TmStatus adamw(TmContext* context, const TmAdamW* args);             // optimizer.cc
void fill_ops(TmBackend& backend);

}  // namespace tunemesh
