// The operations of backend.h once more, slow and obvious: one loop per sum, in the order of the
// formula, without vectors, threads or tricks. Real = double is the oracle that kernels are tested
// against; Real = float shows what straightforward float code loses, which is the yardstick for a
// kernel's own error. Instantiated for both.
//
// All arrays are row-major; strides count elements. Outputs are overwritten unless the name ends in
// _add.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/backend.h"

namespace tunemesh::reference {

// One matrix inside wider rows.
template <typename Real>
struct Rows {
  Real* data = nullptr;
  size_t stride = 0;
  Real* row(size_t index) const { return data + index * stride; }
};

template <typename Real>
struct Embedding {
  const int32_t* tokens;
  size_t n, c;
  Real* table;  // [v, c]; the gradient in backward
  Real* rows;   // [n, c]; forward's output, backward's input
};
template <typename Real>
void embedding_forward(const Embedding<Real>& args);
template <typename Real>
void embedding_backward_add(const Embedding<Real>& args);

template <typename Real>
struct RmsNorm {
  Rows<Real> x, y;   // [n, c]
  const Real* gain;  // [c]
  Real* rstd;        // [n]
  size_t n, c;
  double epsilon;
};
template <typename Real>
void rms_norm_forward(const RmsNorm<Real>& args);

template <typename Real>
struct RmsNormBackward {
  Rows<Real> x, dy, dx;  // [n, c]
  const Real* gain;      // [c]
  const Real* rstd;      // [n]
  Real* dgain;           // [c], added to; null where the gain is frozen
  size_t n, c;
  bool dx_add;
};
template <typename Real>
void rms_norm_backward(const RmsNormBackward<Real>& args);

template <typename Real>
struct Bias {
  Rows<Real> y;  // [n, c]; the gradient in bias_grad_add
  Real* bias;    // [c]; its gradient in bias_grad_add
  size_t n, c;
};
template <typename Real>
void bias_add(const Bias<Real>& args);
template <typename Real>
void bias_grad_add(const Bias<Real>& args);

template <typename Real>
struct Rope {
  Rows<Real> x;  // [n, heads * head_size], rotated in place
  const int32_t* positions;
  const Real* cos;  // [max_position, head_size / 2]
  const Real* sin;
  size_t n, heads, head_size;
  bool inverse;
};
template <typename Real>
void rope(const Rope<Real>& args);

template <typename Real>
struct Attention {
  Rows<Real> q, k, v, out;  // [n, H*F], [n, G*F], [n, G*F], [n, H*F]
  Real* lse;                // [n, H]
  const int32_t* document_starts;
  size_t num_documents, num_heads, num_kv_heads, head_size, window;
  double scale;
};
template <typename Real>
void attention_forward(const Attention<Real>& args);

// One query over cached rows [first, end).
template <typename Real>
struct DecodeAttention {
  const Real* q;    // [H*F]
  Rows<Real> k, v;  // [end, G*F]
  Real* out;        // [H*F]
  size_t first, end, num_heads, num_kv_heads, head_size;
  double scale;
};
template <typename Real>
void decode_attention(const DecodeAttention<Real>& args);

template <typename Real>
struct AttentionBackward {
  Attention<Real> forward;
  Rows<Real> dout, dq, dk, dv;
};
template <typename Real>
void attention_backward(const AttentionBackward<Real>& args);

template <typename Real>
struct SwiGlu {
  Rows<Real> gate, up, out;  // [n, d]
  size_t n, d;
};
template <typename Real>
void swiglu_forward(const SwiGlu<Real>& args);

template <typename Real>
struct SwiGluBackward {
  SwiGlu<Real> forward;  // out is recomputed unless its data is null
  Rows<Real> dout, dgate, dup;
};
template <typename Real>
void swiglu_backward(const SwiGluBackward<Real>& args);

template <typename Real>
struct CrossEntropy {
  Rows<Real> logits;  // [rows, v]; becomes the gradient where dlogits
  const int32_t* targets;
  double* row_losses;
  size_t rows, v;
  double grad_scale;
  bool dlogits;
};
template <typename Real>
void cross_entropy(const CrossEntropy<Real>& args);

// AdamW is defined to the bit (backend.h): this is that definition, one operation a line, and
// kernels must equal it.
void adamw(const TmAdamW& args);

// So is quantising rows to e4m3: here each number is sought among all that there are.
void quantise_rows(const TmQuantiseRows& args);

}  // namespace tunemesh::reference
