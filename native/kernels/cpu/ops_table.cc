// The C entries of backend.h for all operations but the matrix products and the exchange: check the
// arguments, cut into tasks, run.
#include "kernels/cpu/ops_table.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "kernels/cpu/dispatch.h"
#include "kernels/e4m3.h"

namespace tunemesh {

#define DECLARE_FAMILIES(isa)                    \
  namespace isa {                                \
  void register_norm(OpsKernels& kernels);       \
  void register_embedding(OpsKernels& kernels);  \
  void register_rope(OpsKernels& kernels);       \
  void register_attention(OpsKernels& kernels);  \
  void register_activation(OpsKernels& kernels); \
  void register_loss(OpsKernels& kernels);       \
  void register_optimizer(OpsKernels& kernels);  \
  void register_families(OpsKernels& kernels) {  \
    register_norm(kernels);                      \
    register_embedding(kernels);                 \
    register_rope(kernels);                      \
    register_attention(kernels);                 \
    register_activation(kernels);                \
    register_loss(kernels);                      \
    register_optimizer(kernels);                 \
  }                                              \
  }
DECLARE_FAMILIES(isa_generic)
DECLARE_FAMILIES(isa_avx2)
DECLARE_FAMILIES(isa_avx512)
#undef DECLARE_FAMILIES

namespace {

// Elements of one task: enough to be worth a thread's wake-up, few enough to share out evenly.
constexpr size_t kTaskElements = 16384;
// Columns of one task where sums run down the rows: whole cache lines.
constexpr size_t kTaskColumns = 64;

template <typename Kernel, typename Args>
TmStatus over_rows(TmContext* context, Kernel kernel, const Args& args, size_t n, size_t c) {
  const size_t grain = std::max<size_t>(1, kTaskElements / std::max<size_t>(1, c));
  parallel_ranges(context->pool, n, grain, [&](size_t begin, size_t end) {
    kernel(args, Range{begin, end});
  });
  return TM_OK;
}

template <typename Kernel, typename Args>
TmStatus over_columns(TmContext* context, Kernel kernel, const Args& args, size_t c) {
  parallel_ranges(context->pool, c, kTaskColumns, [&](size_t begin, size_t end) {
    kernel(args, Range{begin, end});
  });
  return TM_OK;
}

template <typename Kernel, typename Args>
TmStatus over_elements(TmContext* context, Kernel kernel, const Args& args, size_t n) {
  parallel_ranges(context->pool, n, kTaskElements, [&](size_t begin, size_t end) {
    kernel(args, Range{begin, end});
  });
  return TM_OK;
}

// TM_BAD_ARGUMENT where an index lies outside [0, limit).
TmStatus check_indices(const char* what, const int32_t* indices, size_t n, size_t limit) {
  for (size_t i = 0; i < n; ++i) {
    if (indices[i] < 0 || static_cast<size_t>(indices[i]) >= limit) {
      return fail(TM_BAD_ARGUMENT, "%s: index %d at position %zu is not within [0, %zu)", what,
                  static_cast<int>(indices[i]), i, limit);
    }
  }
  return TM_OK;
}

// Tables whose height the call does not say: only the sign can be checked.
constexpr size_t kUnknownHeight = size_t{1} << 31;

struct CopyRows {
  const float* table;
  const int32_t* rows;
  size_t c;
  float* out;
};

void copy_rows(const CopyRows& a, Range range) {
  for (size_t i = range.begin; i < range.end; ++i) {
    memcpy(a.out + i * a.c, a.table + static_cast<size_t>(a.rows[i]) * a.c, a.c * sizeof(float));
  }
}

TmStatus gather(TmContext* context, const CopyRows& args, size_t n) {
  if (TmStatus status = check_indices("gather", args.rows, n, kUnknownHeight)) return status;
  return over_rows(context, copy_rows, args, n, args.c);
}

TmStatus embedding_forward(TmContext* context, const int32_t* tokens, size_t n,
                           const TmWeight* table, float* out) {
  return gather(context, {table->rows, tokens, table->in, out}, n);
}

TmStatus gather_rows(TmContext* context, const float* x, const int32_t* rows, size_t n, size_t c,
                     float* out) {
  return gather(context, {x, rows, c, out}, n);
}

TmStatus scatter(TmContext* context, const ScatterRows& args, size_t height) {
  if (TmStatus status = check_indices("scatter", args.rows, args.n, height)) return status;
  return over_columns(context, context->kernels.ops.scatter_rows_add, args, args.c);
}

TmStatus embedding_backward_add(TmContext* context, const int32_t* tokens, size_t n,
                                const float* dout, size_t c, size_t v, float* table_grad) {
  return scatter(context, {dout, tokens, table_grad, n, c}, v);
}

TmStatus scatter_rows_add(TmContext* context, const float* x, const int32_t* rows, size_t n,
                          size_t c, float* out) {
  return scatter(context, {x, rows, out, n, c}, kUnknownHeight);
}

// The same on every instruction path: nothing on the CPU's main path asks for it.
void quantise(const TmQuantiseRows& a, Range range) {
  for (size_t i = range.begin; i < range.end; ++i) {
    const float* x = a.x + i * a.x_stride;
    float largest = 0;
    for (size_t j = 0; j < a.c; ++j) largest = std::fmax(largest, std::fabs(x[j]));
    const RowScale scale = row_scale(largest);
    a.scales[i] = scale.scale;
    for (size_t j = 0; j < a.c; ++j) a.q[i * a.c + j] = e4m3_from_float(x[j] * scale.inverse);
  }
}

TmStatus quantise_rows(TmContext* context, const TmQuantiseRows* args) {
  return over_rows(context, quantise, *args, args->n, args->c);
}

TmStatus quantise_result(TmContext* context, const TmQuantised& to, TmQuantiseRows rows) {
  if (to.q == nullptr) return TM_OK;
  rows.q = to.q;
  rows.scales = to.scales;
  return quantise_rows(context, &rows);
}

TmStatus rms_norm_forward(TmContext* context, const TmRmsNorm* args) {
  over_rows(context, context->kernels.ops.rms_norm_forward, *args, args->n, args->c);
  return quantise_result(context, args->quantised,
                         {args->y, args->y_stride, nullptr, nullptr, args->n, args->c});
}

TmStatus rms_norm_backward(TmContext* context, const TmRmsNormBackward* args) {
  // First, because dx may overwrite dy.
  if (args->dgain) over_columns(context, context->kernels.ops.rms_norm_gain_grad, *args, args->c);
  over_rows(context, context->kernels.ops.rms_norm_backward, *args, args->n, args->c);
  return quantise_result(context, args->quantised,
                         {args->dx, args->dx_stride, nullptr, nullptr, args->n, args->c});
}

TmStatus bias_add(TmContext* context, float* y, size_t n, size_t c, size_t stride,
                  const float* bias) {
  const Bias args = {y, nullptr, bias, nullptr, n, c, stride};
  return over_rows(context, context->kernels.ops.bias_add, args, n, c);
}

TmStatus bias_grad_add(TmContext* context, const float* dy, size_t n, size_t c, size_t stride,
                       float* dbias) {
  const Bias args = {nullptr, dy, nullptr, dbias, n, c, stride};
  return over_columns(context, context->kernels.ops.bias_grad_add, args, c);
}

TmStatus add(TmContext* context, float* y, const float* x, size_t n) {
  return over_elements(context, context->kernels.ops.add, AddElements{y, x}, n);
}

TmStatus rope(TmContext* context, const TmRope* args) {
  if (args->head_size % 2 != 0) {
    return fail(TM_BAD_ARGUMENT, "rope: head size %zu is odd; it rotates pairs", args->head_size);
  }
  const size_t width = args->heads * args->head_size;
  if (args->quantised.q != nullptr && args->quantised_width < width) {
    return fail(TM_BAD_ARGUMENT, "rope: %zu columns to quantise, fewer than the heads' %zu",
                args->quantised_width, width);
  }
  over_rows(context, context->kernels.ops.rope, *args, args->n, width);
  return quantise_result(
      context, args->quantised,
      {args->x, args->x_stride, nullptr, nullptr, args->n, args->quantised_width});
}

TmStatus swiglu_forward(TmContext* context, const TmSwiGlu* args) {
  over_rows(context, context->kernels.ops.swiglu_forward, *args, args->n, args->d);
  return quantise_result(context, args->quantised,
                         {args->out, args->out_stride, nullptr, nullptr, args->n, args->d});
}

TmStatus swiglu_backward(TmContext* context, const TmSwiGluBackward* args) {
  if (args->quantised.q != nullptr && args->dup != args->dgate + args->d) {
    return fail(TM_BAD_ARGUMENT, "swiglu_backward: dup does not lie beside dgate");
  }
  over_rows(context, context->kernels.ops.swiglu_backward, *args, args->n, args->d);
  return quantise_result(context, args->quantised,
                         {args->dgate, args->in_stride, nullptr, nullptr, args->n, 2 * args->d});
}

TmStatus cross_entropy(TmContext* context, const TmCrossEntropy* args) {
  if (TmStatus status = check_indices("cross_entropy", args->targets, args->rows, args->v)) {
    return status;
  }
  return over_rows(context, context->kernels.ops.cross_entropy, *args, args->rows, args->v);
}

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Floats of dk and dv for one token that backward keeps apart: all query heads of a group but the
// first.
size_t part_floats(size_t num_heads, size_t num_kv_heads, size_t head_size) {
  return 2 * (num_heads - num_kv_heads) * head_size;
}

size_t attention_scratch_bytes(TmContext* context, const TmAttentionJob* job) {
  const size_t threads = static_cast<size_t>(context->pool.num_threads());
  const size_t longest = job->longest_document;
  const size_t parts = longest * part_floats(job->num_heads, job->num_kv_heads, job->head_size);
  return sizeof(float) * (threads * attention_thread_floats(longest, job->head_size) + parts);
}

size_t longest_document(const TmAttention& a) {
  size_t longest = 0;
  for (size_t d = 0; d < a.num_documents; ++d) {
    longest =
        std::max(longest, static_cast<size_t>(a.document_starts[d + 1] - a.document_starts[d]));
  }
  return longest;
}

TmStatus check_attention(TmContext* context, const TmAttention& a) {
  if (a.num_kv_heads == 0 || a.num_heads % a.num_kv_heads != 0) {
    return fail(TM_BAD_ARGUMENT,
                "attention: %zu query heads do not divide among %zu key/value heads", a.num_heads,
                a.num_kv_heads);
  }
  if (a.document_starts[0] != 0 || static_cast<size_t>(a.document_starts[a.num_documents]) != a.n) {
    return fail(TM_BAD_ARGUMENT, "attention: documents span [%d, %d), expected [0, %zu)",
                static_cast<int>(a.document_starts[0]),
                static_cast<int>(a.document_starts[a.num_documents]), a.n);
  }
  for (size_t d = 0; d < a.num_documents; ++d) {
    if (a.document_starts[d + 1] < a.document_starts[d]) {
      return fail(TM_BAD_ARGUMENT, "attention: document %zu starts at %d and ends at %d", d,
                  static_cast<int>(a.document_starts[d]),
                  static_cast<int>(a.document_starts[d + 1]));
    }
  }
  const TmAttentionJob job = {a.n, longest_document(a), a.num_heads, a.num_kv_heads, a.head_size,
                              true};
  const size_t needed = attention_scratch_bytes(context, &job);
  if (a.scratch_bytes < needed) {
    return fail(TM_BAD_ARGUMENT,
                "attention: scratch has %zu bytes, a document of %zu tokens needs %zu; plan with "
                "attention_scratch_bytes of the longest document",
                a.scratch_bytes, longest_document(a), needed);
  }
  return TM_OK;
}

Range document_range(const TmAttention& a, size_t document) {
  return {static_cast<size_t>(a.document_starts[document]),
          static_cast<size_t>(a.document_starts[document + 1])};
}

TmStatus attention_forward(TmContext* context, const TmAttention* args) {
  const TmAttention& a = *args;
  if (TmStatus status = check_attention(context, a)) return status;
  const size_t thread_floats = attention_thread_floats(longest_document(a), a.head_size);
  context->pool.parallel_for(a.num_documents * a.num_heads, [&](size_t task, int thread) {
    AttentionHead head{};
    head.document = document_range(a, task / a.num_heads);
    head.head = task % a.num_heads;
    head.scratch = static_cast<float*>(a.scratch) + static_cast<size_t>(thread) * thread_floats;
    context->kernels.ops.attention_forward(a, head);
  });
  return TM_OK;
}

// Documents that go through backward together, because their parts of dk and dv fit the scratch.
struct DocumentBatch {
  size_t first, end;
  size_t first_token;
  float* parts;          // [dk, dv][num_kv_heads][group - 1][capacity][head_size]
  size_t capacity;       // tokens
  size_t thread_floats;  // scratch of each thread, at the scratch's start
};

float* part_of(const TmAttention& a, const DocumentBatch& batch, size_t index) {
  return batch.parts + index * batch.capacity * a.head_size;
}

AttentionHead backward_task(const TmAttentionBackward& b, const DocumentBatch& batch, size_t task) {
  const TmAttention& a = b.forward;
  const size_t group = a.num_heads / a.num_kv_heads;
  AttentionHead head{};
  head.document = document_range(a, batch.first + task / a.num_heads);
  head.head = task % a.num_heads;
  const size_t kv_head = head.head / group, member = head.head % group;
  const size_t start = head.document.begin;
  if (member == 0) {
    head.dk = b.dk + start * b.dk_stride + kv_head * a.head_size;
    head.dv = b.dv + start * b.dv_stride + kv_head * a.head_size;
    head.dk_stride = b.dk_stride;
    head.dv_stride = b.dv_stride;
    return head;
  }
  const size_t index = kv_head * (group - 1) + member - 1;
  const size_t offset = (start - batch.first_token) * a.head_size;
  head.dk = part_of(a, batch, index) + offset;
  head.dv = part_of(a, batch, index + a.num_heads - a.num_kv_heads) + offset;
  head.dk_stride = head.dv_stride = a.head_size;
  return head;
}

// Task t: the sum of dk (even) or dv (odd) of one key/value head of one document.
void sum_group(TmContext* context, const TmAttentionBackward& b, const DocumentBatch& batch,
               size_t task) {
  const TmAttention& a = b.forward;
  const size_t group = a.num_heads / a.num_kv_heads;
  const bool is_value = task % 2 == 1;
  const size_t kv_head = task / 2 % a.num_kv_heads;
  const Range document = document_range(a, batch.first + task / 2 / a.num_kv_heads);
  const size_t index = kv_head * (group - 1) + (is_value ? a.num_heads - a.num_kv_heads : 0);
  AttentionGroupSum sum{};
  sum.sum_stride = is_value ? b.dv_stride : b.dk_stride;
  sum.sum = (is_value ? b.dv : b.dk) + document.begin * sum.sum_stride + kv_head * a.head_size;
  sum.parts = part_of(a, batch, index) + (document.begin - batch.first_token) * a.head_size;
  sum.part_stride = batch.capacity * a.head_size;
  sum.num_parts = group - 1;
  sum.rows = document.end - document.begin;
  sum.head_size = a.head_size;
  context->kernels.ops.attention_group_sum(sum);
}

void backward_batch(TmContext* context, const TmAttentionBackward& b, const DocumentBatch& batch) {
  const TmAttention& a = b.forward;
  const size_t num_documents = batch.end - batch.first;
  context->pool.parallel_for(num_documents * a.num_heads, [&](size_t task, int thread) {
    AttentionHead head = backward_task(b, batch, task);
    head.scratch =
        static_cast<float*>(a.scratch) + static_cast<size_t>(thread) * batch.thread_floats;
    context->kernels.ops.attention_backward(b, head);
  });
  if (a.num_heads == a.num_kv_heads) return;
  context->pool.parallel_for(num_documents * a.num_kv_heads * 2,
                             [&](size_t task, int) { sum_group(context, b, batch, task); });
}

TmStatus attention_backward(TmContext* context, const TmAttentionBackward* args) {
  const TmAttention& a = args->forward;
  if (TmStatus status = check_attention(context, a)) return status;
  const size_t threads = static_cast<size_t>(context->pool.num_threads());
  const size_t parts = part_floats(a.num_heads, a.num_kv_heads, a.head_size);
  DocumentBatch batch{};
  batch.thread_floats = attention_thread_floats(longest_document(a), a.head_size);
  batch.parts = static_cast<float*>(a.scratch) + threads * batch.thread_floats;
  const size_t left = a.scratch_bytes / sizeof(float) - threads * batch.thread_floats;
  batch.capacity = parts == 0 ? a.n : std::min(a.n, left / parts);
  while (batch.end < a.num_documents) {
    batch.first = batch.end;
    batch.first_token = document_range(a, batch.first).begin;
    while (batch.end < a.num_documents &&
           document_range(a, batch.end).end - batch.first_token <= batch.capacity) {
      ++batch.end;
    }
    backward_batch(context, *args, batch);
  }
  return TM_OK;
}

TmStatus decode_attention(TmContext* context, const TmDecodeAttention* args) {
  const TmDecodeAttention& a = *args;
  if (a.num_kv_heads == 0 || a.num_heads % a.num_kv_heads != 0) {
    return fail(TM_BAD_ARGUMENT,
                "decode_attention: %zu query heads do not divide among %zu key/value heads",
                a.num_heads, a.num_kv_heads);
  }
  if (a.first >= a.end) {
    return fail(TM_BAD_ARGUMENT, "decode_attention: rows [%zu, %zu) hold no key", a.first, a.end);
  }
  if (a.score_stride % 16 != 0 || a.score_stride < a.end - a.first) {
    return fail(TM_BAD_ARGUMENT,
                "decode_attention: score_stride is %zu; %zu keys need a multiple of 16 from there",
                a.score_stride, a.end - a.first);
  }
  return over_rows(context, context->kernels.ops.decode_attention, a, a.num_heads,
                   (a.end - a.first) * a.head_size);
}

}  // namespace

size_t attention_thread_floats(size_t longest, size_t head_size) {
  const size_t padded = round_up(longest, kAttentionKeyBlock);
  const size_t forward = padded * head_size + kAttentionQueryBlock * (padded + 16);
  const size_t backward =
      2 * kAttentionKeyBlock * (head_size + kAttentionQueryBlock) + round_up(longest, 16);
  return round_up(std::max(forward, backward), 16);
}

void register_ops(InstructionPath path, CpuKernels& kernels) {
  switch (path) {
    case InstructionPath::kGeneric:
      return isa_generic::register_families(kernels.ops);
    case InstructionPath::kAvx2:
      return isa_avx2::register_families(kernels.ops);
    case InstructionPath::kAvx512:
      return isa_avx512::register_families(kernels.ops);
  }
}

void fill_ops(TmBackend& backend) {
  backend.embedding_forward = embedding_forward;
  backend.embedding_backward_add = embedding_backward_add;
  backend.rms_norm_forward = rms_norm_forward;
  backend.rms_norm_backward = rms_norm_backward;
  backend.bias_add = bias_add;
  backend.bias_grad_add = bias_grad_add;
  backend.rope = rope;
  backend.attention_scratch_bytes = attention_scratch_bytes;
  backend.attention_forward = attention_forward;
  backend.attention_backward = attention_backward;
  backend.swiglu_forward = swiglu_forward;
  backend.swiglu_backward = swiglu_backward;
  backend.add = add;
  backend.gather_rows = gather_rows;
  backend.scatter_rows_add = scatter_rows_add;
  backend.cross_entropy = cross_entropy;
  backend.adamw = adamw;
  backend.decode_attention = decode_attention;
  backend.sum_squares = sum_squares;
  backend.quantise_rows = quantise_rows;
}

}  // namespace tunemesh
