// The operations of a backend: what native/engine calls and what kernels/cpu and (as a plugin)
// kernels/cuda provide.
//
// A flat C ABI, so that a plugin built by another compiler can be loaded: plain structs, no
// exceptions, no ownership across the border. Every struct starts with its size, so that an older
// side can be told from a newer one.
//
// Rules that hold for every operation
//   order     each output element is one chain in a fixed order, whatever the thread count or
//             instruction path; no float atomics. fused multiply-add only where the comment says
//             "fma".
//   buffers   pointers belong to the caller, are 64-byte aligned and live until the stream has
//             passed the call. Outputs are overwritten unless the name ends in _add. Inputs and
//             outputs overlap only where allowed.
//   errors    0, or a TmStatus; last_error() then has one line. A device error is sticky, and told
//             by whichever later call meets it first, unless the context is checked (set_checked).
//   letters   N tokens, C channels (hidden size), V vocabulary, H query heads, G key/value heads, F
//             head size, D feed-forward size, R rows of a loss chunk. Everything is row-major.
//   elements  activations and working copies of weights have the context's element type: float, or
//             bfloat16 where a GPU's context was created so (element_bytes()). Strides count
//             elements. Statistics, losses, gradients of trained tensors, moments and master
//             weights are float or double as written.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/elements.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TM_BACKEND_ABI 7

typedef enum {
  TM_OK = 0,
  TM_OUT_OF_MEMORY = 1,
  TM_BAD_ARGUMENT = 2,
  TM_DEVICE_ERROR = 3,
  TM_NON_FINITE = 4,
  TM_OUT_OF_RANGE = 5,  // a gradient does not fit the fixed-point range of the exchange
} TmStatus;

// TM_FP8: bfloat16 elements, and the frozen linear groups' products of e4m3 numbers (TmGroupShape).
typedef enum { TM_FP32 = 0, TM_BF16 = 1, TM_FP8 = 2 } TmPrecision;

// one device and its stream; on the CPU a fixed pool of threads
typedef struct TmContext TmContext;

typedef struct {
  size_t size;
  int num_threads;               // CPU: 0 = all the process may use
  const char* instruction_path;  // CPU: "auto", "generic", "avx2", "avx512"
  int device_index;
  int precision;               // TmPrecision; the CPU knows float only, TM_FP8 needs Hopper
  const char* library_folder;  // GPU: where its libraries are looked for first; null: nowhere
  // Free mode: sums may be in whatever order is fastest (the backward of a GPU's attention is).
  int is_free;
} TmContextOptions;

// A weight matrix [out, in]. `packed` is the layout of pack_weight, null where the weight changes
// every step and the backend reads `rows` (trained_rows_serve). `rows` is row-major and may be null
// where `packed` is given.
typedef struct {
  const float* rows;
  const TmElement* packed;
  size_t out, in;
} TmWeight;

// Matrix products. accumulate: C += instead of C =. Each element is one fma chain over the inner
// index, ascending, starting from 0 (or from C where accumulate); alpha multiplies the finished
// chain's factor on A's side (A*alpha first).
//
//   forward         y = alpha x w^T
//   backward_input  x_grad = alpha y_grad w: x is then the output [n, in], y the input
typedef struct {
  const TmElement* x;
  size_t x_stride;  // [n, in]
  TmWeight w;       // [out, in]
  TmElement* y;
  size_t y_stride;  // [n, out]
  size_t n;
  int accumulate;
  float alpha;
} TmLinear;

typedef struct {
  const TmElement* dy;
  size_t dy_stride;  // [n, out]
  const TmElement* x;
  size_t x_stride;  // [n, in]
  void* dw;         // [out, in] row-major: floats, or elements where is_element
  size_t n, out, in;
  int accumulate;
  float alpha;
  int is_element;
} TmLinearWeightGrad;  // dw = alpha dy^T x, chain over tokens ascending

typedef struct {
  const TmElement* x;
  const float* gain;  // [n, c], [c]
  TmElement* y;
  float* rstd;  // [n, c], [n] (rstd may be null)
  size_t n, c;
  // in floats: rows of heads inside a wider row for q/k norm are n = tokens*heads, stride F
  size_t x_stride, y_stride;
  float epsilon;
  // 0, or (backends with linear groups only) rows are heads: row i lies at
  // i / heads * stride + i % heads * c
  size_t heads;
  TmQuantised quantised;  // of y; not of heads
} TmRmsNorm;

typedef struct {
  const TmElement* dy;
  const TmElement* x;
  const float* gain;
  const float* rstd;
  TmElement* dx;  // [n, c]; added to where dx_add
  float* dgain;   // [c], added to in token order; null where the gain is frozen
  size_t n, c, x_stride, dy_stride, dx_stride;
  int dx_add;
  size_t heads;           // as in TmRmsNorm
  TmQuantised quantised;  // of dx; not of heads
} TmRmsNormBackward;

// Rotates pairs (i, i + F/2) in place, as the Hugging Face Llama code does.
// cos, sin [max_position, F/2].
typedef struct {
  TmElement* x;
  size_t x_stride;           // [n, heads * F] inside rows of x_stride floats
  const int32_t* positions;  // [n], from 0 within each document
  const float* cos;
  const float* sin;
  size_t n, heads, head_size;
  int inverse;  // backward: the transposed rotation
  // Of the rows' first quantised_width elements, at least heads * F; those behind the heads are
  // only read.
  TmQuantised quantised;
  size_t quantised_width;
} TmRope;

// Causal attention within documents: token i sees j <= i of its own document, and i - j < window
// where window > 0. Softmax in float with the row maximum subtracted; lse[n, H] = log-sum-exp of
// the scaled scores.
typedef struct {
  const TmElement* q;
  const TmElement* k;
  const TmElement* v;  // [n, H*F], [n, G*F], [n, G*F] with strides
  size_t q_stride, k_stride, v_stride;
  TmElement* out;
  size_t out_stride;               // [n, H*F]
  float* lse;                      // [n, H]
  const int32_t* document_starts;  // [num_documents + 1], ascending, last = n
  size_t num_documents, n, num_heads, num_kv_heads, head_size;
  size_t window;
  float scale;
  void* scratch;
  size_t scratch_bytes;                 // at least what TmAttentionJob takes
  const int32_t* host_document_starts;  // the same numbers as document_starts, in host memory
  // document_starts is n from num_documents up to this place: empty documents, which change no bit.
  // 0: unknown. What varies between recorded calls of one attention_key is then on the device.
  size_t padded_documents;
} TmAttention;

#define TM_ATTENTION_KEY_WORDS 4

// What the scratch of a job's attention is planned from.
typedef struct {
  size_t tokens, longest_document;  // at most, of one call
  size_t num_heads, num_kv_heads, head_size;
  int has_backward;
} TmAttentionJob;

// Attention of the newest token of a sequence, whose keys and values are rows of a cache:
// out = softmax(scale q k^T) v over rows [first, end), with a window the last `window` of them.
typedef struct {
  const TmElement* q;  // [H*F]
  const TmElement* k;
  const TmElement* v;  // [end, G*F] with strides
  size_t k_stride, v_stride;
  TmElement* out;  // [H*F]
  size_t first, end;
  size_t num_heads, num_kv_heads, head_size;
  float scale;
  float* scores;        // scratch [H, score_stride]
  size_t score_stride;  // at least end - first, a multiple of 16
} TmDecodeAttention;

typedef struct {
  TmAttention forward;  // as in the forward call, out and lse filled
  const TmElement* dout;
  size_t dout_stride;
  TmElement* dq;
  TmElement* dk;
  TmElement* dv;  // strides as q, k, v
  size_t dq_stride, dk_stride, dv_stride;
} TmAttentionBackward;

typedef struct {
  const TmElement* gate;
  const TmElement* up;  // [n, D] with one stride
  TmElement* out;       // silu(gate) * up
  size_t n, d, in_stride, out_stride;
  TmQuantised quantised;  // of out
} TmSwiGlu;

typedef struct {
  const TmElement* dout;
  const TmElement* gate;
  const TmElement* up;
  TmElement* dgate;
  TmElement* dup;  // may alias gate and up
  TmElement* out;  // recomputed silu(gate)*up, null if not wanted; may be dout
  size_t n, d, in_stride, out_stride;
  TmQuantised quantised;  // of rows [dgate | dup], which then lie side by side
} TmSwiGluBackward;

// Loss of R rows of logits: loss_sum += sum over rows of -log softmax(logits)[target] (float64,
// rows in order). Where dlogits: logits is overwritten by (softmax - onehot) * grad_scale.
typedef struct {
  TmElement* logits;
  size_t stride;           // [rows, v]
  const int32_t* targets;  // [rows]; all >= 0
  double* row_losses;      // [rows]
  size_t rows, v;
  float grad_scale;
  int dlogits;
} TmCrossEntropy;

// A tensor as the optimizer sees it: [n / columns, columns]. Weight, moments and gradient are
// floats, or bfloat16 (bits in uint16_t) where is_half. Where `copy` is not null it receives the
// weight as the products read it, rounded to nearest even.
typedef struct {
  void *p, *m, *v;  // m and v without gaps; p in rows of p_stride
  TmElement* copy;  // in rows of copy_stride elements
  size_t n, columns, p_stride, copy_stride;
  size_t first_block;             // elements are numbered from first_block * 256 on, canonically
  size_t gradient_offset;         // elements into the call's gradient of this tensor's type
  int is_half, is_half_gradient;  // half gradients of half tensors only
  int decays;
  uint8_t *m_exponents, *v_exponents;  // by block, of moments in bytes (byte_moments.h); or null
} TmTrainedTensor;

// AdamW of all trained tensors, in exactly this order per element (no fma unless written; all
// values float32):
//   g = gradient * clip_factor
//   p = p - p * (learning_rate * weight_decay)   [only where decay; the scalars' product first]
//   m = m + (g - m) * (1 - beta1)   [1 - beta in float64, rounded once: in float32 it is 1e-5 off]
//   v = v * beta2 + (g * g) * (1 - beta2)
//   denominator = sqrt(v) / bias_correction2_sqrt + epsilon
//   p = p - (learning_rate / bias_correction1) * (m / denominator)   [the scalar quotient first]
// Of a half tensor p, m and v are read exactly, and the float32 results rounded stochastically when
// they are stored (stochastic_rounding.h), keyed by seed, step and the element's canonical number.
typedef struct {
  const TmTrainedTensor* tensors;       // in the device's memory, first_block ascending
  const TmTrainedTensor* host_tensors;  // the same in host memory
  size_t num_tensors, num_blocks;       // every canonical block belongs to a tensor
  const float* gradient;
  const uint16_t* half_gradient;  // null where no tensor has is_half_gradient
  float learning_rate, clip_factor, bias_correction1, bias_correction2_sqrt;
  double beta1, beta2;
  float epsilon, weight_decay;  // weight_decay 0: no decay
  uint64_t seed;
  uint32_t step;
} TmAdamW;

// Exchange (DESIGN 5). A block is 256 elements; a gradient vector is num_blocks * 256 floats,
// unused tail elements zero. Rounds each block to `significant_bits` below its largest magnitude
// (round to nearest, ties to even, in units of 2^(e+1-significant_bits) where 2^e <= max < 2^(e+1),
// never finer than 2^-48), converts to int64 in units of 2^-48 and adds to `accumulator`.
// TM_NON_FINITE or TM_OUT_OF_RANGE (|value| >= 32768) set *bad_block to the first such block.
typedef struct {
  const float* gradient;
  int64_t* accumulator;
  size_t num_blocks;
  int significant_bits;
  size_t* bad_block;
} TmRoundAndAdd;

// The same on a device, without waiting: rounds and adds, or overwrites as if zeros had been there.
// `outcome` gathers the failures of all calls since it was zero: ~(block << 8 | status) of the
// first bad block of the vector, whatever the order of the calls.
typedef struct {
  const float* gradient;
  int64_t* accumulator;
  size_t num_blocks;
  int significant_bits, overwrites;
  size_t first_block;  // the range's first one in the whole vector
  uint64_t* outcome;   // on the device
} TmRoundBlocks;

// Packs fixed-point blocks as frames carry them, with their digests (engine/codec.h has both, to
// the bit), into buffers of the device. Chunks follow each other without gaps, their words too.
typedef struct {
  const int64_t* values;    // [num_blocks * 256]
  size_t first_block;       // in the whole vector: digests depend on it
  size_t num_blocks;        // up to 2^31
  size_t chunk_blocks;      // the last chunk may have less
  const uint64_t* outcome;  // of round_blocks; null: 0
  uint64_t* told;   // [1 + 2 * chunks]: *outcome, then digest and bytes of words of each chunk
  uint8_t* shapes;  // [num_blocks]: (shift, width) pairs
  uint8_t* words;   // room for 2048 * num_blocks bytes; of the rest nothing is written
  uint64_t* block_digests;  // [num_blocks] for the call's own use
} TmPackBlocks;

// Sum of squares in float64, for a gradient's norm where no exchange computes it. A block is 256
// elements: element j goes to lane j % 8, each lane one chain ascending from 0, lanes are added
// ((0+1)+(2+3))+((4+5)+(6+7)). A group's blocks are added ascending from 0; the caller adds groups.
#define TM_NORM_GROUP_BLOCKS 128
typedef struct {
  const float* values;  // [num_blocks * 256]
  size_t num_blocks;
  double* group_sums;           // [ceil(num_blocks / TM_NORM_GROUP_BLOCKS)]
  const uint16_t* half_values;  // instead of `values` where not null: bfloat16
} TmSumSquares;

// A linear group: linears that read the same input (q, k and v; gate and up; or one alone) as one
// product, whose adapters lie in a border of the packed weight:
//
//   packed  [out + border, in + border]   W B    W: the parts' rows, one below the other
//                                         A 0    A: [rank, in] of adapted parts; B block-diagonal
//   x       rows [in | tail]: the tail receives scale x A^T, then y = [x | tail] [W B]^T
//   dy      rows [out | tail]: the tail receives scale dy B, then dx = [dy | tail] [W; A]
//
// `border` is 0 without adapters, else at least the sum of their ranks: what is beyond is zero.
// The gradients are products of rows and tails (TmGroupAdapterGrads).
//
// Where `is_fp8`, the products with W are of e4m3 numbers (TmQuantiseRows), and the adapters' are
// products of their own, in elements, added to them:
//
//   packed  rows of W and rows of W^T, both quantised row by row; A, B and the bias in elements
//   y       = q(x) q(W)^T + residual, rounded to elements, + tail B^T + bias, rounded again
//   dx      = q(dy) q(W^T)^T, rounded to elements, + tail A, rounded again
//
// with sums of the products in the precision of the card's tensor cores (kernels/cuda/fp8_gemm.h).
// Widths are multiples of TM_FP8_MULTIPLE. The base's parts come in one call of pack_group_base.
#define TM_GROUP_PARTS 3
#define TM_FP8_MULTIPLE 16
typedef struct {
  size_t in, num_parts;
  size_t out[TM_GROUP_PARTS];
  int is_adapted[TM_GROUP_PARTS];
  size_t rank;
  int has_bias;  // every part has one
  int is_fp8;    // contexts of TM_FP8 only
} TmGroupShape;

// What is null stays as it is. A packed weight starts as zeros.
typedef struct {
  const TmGroupShape* shape;
  TmElement* packed;
  const float* weight[TM_GROUP_PARTS];  // [out, in]
  const float* bias[TM_GROUP_PARTS];    // [out]
  const float* lora_a[TM_GROUP_PARTS];  // [rank, in]
  const float* lora_b[TM_GROUP_PARTS];  // [out, rank]
} TmGroupPack;

typedef struct {
  const TmGroupShape* shape;
  const TmElement* packed;
  TmElement* x;
  size_t x_stride;  // [n, in + border]
  // [n, out] each; parts that lie side by side in the same rows are one product
  TmElement* y[TM_GROUP_PARTS];
  size_t y_stride[TM_GROUP_PARTS];
  const TmElement* residual;  // null, or [n, out] added to y; of one part only, not y itself
  size_t residual_stride;
  size_t n;
  float scale;
  // fp8: where x's rows go as e4m3 numbers, or with is_quantised are already.
  TmQuantised quantised;  // [n, in]
  int is_quantised;
} TmGroupForward;

typedef struct {
  const TmGroupShape* shape;
  const TmElement* packed;
  TmElement* dy;     // the parts' gradients side by side
  size_t dy_stride;  // [n, out + border]
  TmElement* dx;     // [n, in]; null: only the tail
  size_t dx_stride;
  size_t n;
  float scale;
  TmQuantised quantised;  // as in TmGroupForward, of dy [n, out]
  int is_quantised;
} TmGroupBackward;

// Where a packed group keeps its parts: rows of `stride` elements from `at` on; null: not there.
typedef struct {
  TmElement* at;
  size_t stride;
} TmPlace;
typedef struct {
  TmPlace weight[TM_GROUP_PARTS], bias[TM_GROUP_PARTS];
  TmPlace lora_a[TM_GROUP_PARTS], lora_b[TM_GROUP_PARTS];
} TmGroupPlaces;

// Gradients of all adapters of a group, overwritten, or added to where accumulate: lora_b[part] =
// dy_part^T (x's tail of the part), [out, rank]; lora_a[part] = (dy's tail of the part)^T x, [rank,
// in]. Tails hold the adapted parts' ranks side by side, in their order.
typedef struct {
  const TmGroupShape* shape;
  const TmElement* x;
  size_t x_stride;  // [n, in]
  const TmElement* x_tail;
  size_t x_tail_stride;
  const TmElement* dy;
  size_t dy_stride;  // [n, out | tail]
  float* lora_a[TM_GROUP_PARTS];
  float* lora_b[TM_GROUP_PARTS];
  size_t n;
  int accumulate;
} TmGroupAdapterGrads;

typedef struct {
  void* to;
  const void* from;
  size_t to_stride, from_stride, row_bytes;  // bytes
  size_t n;
} TmCopyRows;

// A copy beside the operations: it starts after all that were given before it, and those given
// later do not wait for it. Copies run in order. The host's side is memory of allocate_host().
// Lanes from TM_GRADIENT_LANE on are for gradients on their way to the exchange.
#define TM_COPY_LANES 8
#define TM_GRADIENT_LANE 2
typedef struct {
  void* to;
  const void* from;
  size_t num_bytes;
  int to_host;  // else from the host
  size_t lane;  // what await_copy() names; a lane's copy is awaited before its next one
  int at_once;  // what it reads stands: it does not wait for the operations
} TmSideCopy;

typedef enum {
  TM_CALLS_RUN = 0,     // issue the calls
  TM_CALLS_RECORD = 1,  // issue the calls, then calls_end
  TM_CALLS_DONE = 2,    // they were launched: issue none
} TmCallsAction;

// Everything on the host's side that shapes the calls: pointers, counts, scalars. Calls of one key
// differ in the contents of device memory alone.
typedef struct {
  const uint64_t* words;
  size_t num_words;
} TmCallsKey;

typedef struct TmBackend {
  size_t size;
  uint32_t abi;
  const char* name;
  const char* (*last_error)(void);
  // Devices that create() takes as device_index; 0 also where there is no driver.
  int (*num_devices)(void);
  TmStatus (*create)(const TmContextOptions*, TmContext**);
  void (*destroy)(TmContext*);
  // "cpu: 2 threads, avx512"; part of the device class without the threads.
  const char* (*describe)(TmContext*);
  const char* (*instruction_path)(TmContext*);
  int (*num_threads)(TmContext*);
  // Of the device's own memory; null: it uses the host's.
  size_t (*memory_bytes)(TmContext*);
  size_t (*element_bytes)(TmContext*);
  // Do the matrix products read TmWeight.rows where `packed` is null? If not, trained weights need
  // a packed copy too, made anew after each update.
  int (*reads_rows)(TmContext*);
  // Are packed weights row-major elements, so that a tied embedding and its head are one copy?
  int (*packs_row_major)(TmContext*);

  TmStatus (*allocate)(TmContext*, size_t bytes, void** out);
  void (*release)(TmContext*, void*);
  // Host memory that copies to and from the device fast. Null: allocate() gives host memory, and
  // the engine may read and write it directly.
  TmStatus (*allocate_host)(TmContext*, size_t bytes, void** out);
  void (*release_host)(TmContext*, void*);
  TmStatus (*copy_in)(TmContext*, void* device, const void* host, size_t bytes);
  TmStatus (*copy_out)(TmContext*, void* host, const void* device, size_t bytes);
  // Elements to floats in host memory.
  TmStatus (*read_elements)(TmContext*, float* host, const TmElement* device, size_t count);
  TmStatus (*fill_zero)(TmContext*, void*, size_t bytes);
  TmStatus (*synchronize)(TmContext*);

  size_t (*packed_weight_elements)(size_t out, size_t in);
  // `rows` in host memory (pack_weight) or in the device's (pack_trained_weight; null: reads_rows).
  TmStatus (*pack_weight)(TmContext*, const float* rows, size_t out, size_t in, TmElement* packed);
  TmStatus (*pack_trained_weight)(TmContext*, const float* rows, size_t out, size_t in,
                                  TmElement* packed);

  // Reads the table's `packed` where it is given (packs_row_major), else its `rows`. Either may lie
  // in host memory of allocate_host(): only the rows that are looked up travel.
  TmStatus (*embedding_forward)(TmContext*, const int32_t* tokens, size_t n, const TmWeight* table,
                                TmElement* out);
  // table_grad += rows of dout, tokens in ascending position order for each table row.
  TmStatus (*embedding_backward_add)(TmContext*, const int32_t* tokens, size_t n,
                                     const TmElement* dout, size_t c, size_t v, float* table_grad);
  TmStatus (*rms_norm_forward)(TmContext*, const TmRmsNorm*);
  TmStatus (*rms_norm_backward)(TmContext*, const TmRmsNormBackward*);
  TmStatus (*linear_forward)(TmContext*, const TmLinear*);
  TmStatus (*linear_backward_input)(TmContext*, const TmLinear*);
  TmStatus (*linear_weight_grad)(TmContext*, const TmLinearWeightGrad*);
  TmStatus (*bias_add)(TmContext*, TmElement* y, size_t n, size_t c, size_t stride,
                       const float* bias);
  TmStatus (*bias_grad_add)(TmContext*, const TmElement* dy, size_t n, size_t c, size_t stride,
                            float* dbias);
  TmStatus (*rope)(TmContext*, const TmRope*);
  size_t (*attention_scratch_bytes)(TmContext*, const TmAttentionJob*);  // SIZE_MAX: not served
  TmStatus (*attention_forward)(TmContext*, const TmAttention*);
  TmStatus (*attention_backward)(TmContext*, const TmAttentionBackward*);
  TmStatus (*swiglu_forward)(TmContext*, const TmSwiGlu*);
  TmStatus (*swiglu_backward)(TmContext*, const TmSwiGluBackward*);
  TmStatus (*add)(TmContext*, TmElement* y, const TmElement* x, size_t n);  // y += x
  TmStatus (*gather_rows)(TmContext*, const TmElement* x, const int32_t* rows, size_t n, size_t c,
                          TmElement* out);
  TmStatus (*scatter_rows_add)(TmContext*, const TmElement* x, const int32_t* rows, size_t n,
                               size_t c, TmElement* out);
  TmStatus (*cross_entropy)(TmContext*, const TmCrossEntropy*);
  TmStatus (*adamw)(TmContext*, const TmAdamW*);
  TmStatus (*round_and_add)(TmContext*, const TmRoundAndAdd*);
  TmStatus (*decode_attention)(TmContext*, const TmDecodeAttention*);
  TmStatus (*sum_squares)(TmContext*, const TmSumSquares*);

  // Linear groups; all null where linears run one by one.
  size_t (*group_border)(const TmGroupShape*);
  size_t (*group_packed_elements)(const TmGroupShape*);
  // Sources in host memory (base) or in the device's (trained).
  TmStatus (*pack_group_base)(TmContext*, const TmGroupPack*);
  TmStatus (*pack_group_trained)(TmContext*, const TmGroupPack*);
  TmStatus (*group_forward)(TmContext*, const TmGroupForward*);
  TmStatus (*group_backward)(TmContext*, const TmGroupBackward*);
  TmStatus (*copy_rows)(TmContext*, const TmCopyRows*);  // within the device
  // With linear groups only: the update writes trained parts where the products read them.
  TmStatus (*group_places)(TmContext*, const TmGroupShape*, TmElement* packed, TmGroupPlaces*);

  TmStatus (*start_copy)(TmContext*, const TmSideCopy*);
  // Operations given from here on start when the lane's last copy has ended.
  TmStatus (*await_copy)(TmContext*, size_t lane);
  // Returns when the lane's last copy has ended.
  TmStatus (*finish_copy)(TmContext*, size_t lane);
  // Of the device's own memory, what nobody has taken yet; null: it uses the host's.
  size_t (*free_bytes)(TmContext*);

  // Recorded calls: a part of a step whose calls are the same each time, launched at once (a CUDA
  // graph). All null where there are none. Between begin and end no memory is taken, no host memory
  // read or written, and nothing waited for.
  //
  // begin answers what the caller is to do; end belongs to TM_CALLS_RECORD alone. It launches what
  // was recorded, if all of the calls succeeded (is_whole); *has_run 0: nothing has run, the calls
  // must be issued again, and a note says why. A key that begin has not met, or that
  // could not be recorded a few times, is answered TM_CALLS_RUN.
  TmStatus (*calls_begin)(TmContext*, const TmCallsKey*, int* action);
  TmStatus (*calls_end)(TmContext*, int is_whole, int* has_run);
  // Forgets everything recorded: before memory that recorded calls use is given back.
  TmStatus (*calls_forget)(TmContext*);
  // Attentions of one key, otherwise equal but for num_documents and host_document_starts, are the
  // same calls where document_starts is padded.
  void (*attention_key)(TmContext*, const TmAttention*, uint64_t key[TM_ATTENTION_KEY_WORDS]);

  // Of linear groups, and there where they are.
  TmStatus (*group_adapter_grads)(TmContext*, const TmGroupAdapterGrads*);

  // From now on each call waits for what it has launched, and launches one by one: an error is told
  // by the call that caused it. The same bits. Null where calls always do so.
  TmStatus (*set_checked)(TmContext*, int is_checked);
  // What a person should hear of once: what runs slower here than it could, and why. One line,
  // which lives until the next call; null: nothing, or nothing more. A null entry has never
  // anything.
  const char* (*take_note)(TmContext*);

  TmStatus (*quantise_rows)(TmContext*, const TmQuantiseRows*);

  // Of the exchange; both null where the host rounds and packs.
  TmStatus (*round_blocks)(TmContext*, const TmRoundBlocks*);
  TmStatus (*pack_blocks)(TmContext*, const TmPackBlocks*);

  // Of the device's own memory, what this process has there beside what it asks for: context,
  // modules, the libraries' own. Of it *late_bytes come with the first calls and are not taken yet.
  // Null: none.
  size_t (*overhead_bytes)(TmContext*, size_t* late_bytes);
} TmBackend;

const TmBackend* tm_cpu_backend(void);

#ifdef __cplusplus
}
#endif
