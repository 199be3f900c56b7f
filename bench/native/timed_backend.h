// A backend's table whose operations are timed one by one. Where a card has a clock, by marks in
// its stream around each call, which runs free: the rest of the step is then time without work.
// Else each call waits for the device, so the sum of the parts is more than a step that runs free.
#pragma once
#include <chrono>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "bench/native/card.h"
#include "kernels/backend.h"

namespace tunemesh::bench {

// The least that an operation must do: floating-point operations, and bytes of device memory that
// pass once. Copies from and to the host count none.
struct OpFloor {
  std::string shape;
  double flops = 0, bytes = 0;
};
struct OpTime {
  size_t calls = 0;
  double seconds = 0, flops = 0, bytes = 0;
};

// One at a time in a process: the table's functions have no place for a state.
struct OpTimes {
  const TmBackend* inner = nullptr;
  bool is_on = false;
  double wait_seconds = 0;  // of a wait for an idle device, taken off each call
  CardFunctions card;
  std::map<std::string, OpTime> by_op;
  std::vector<OpTime*> marked;  // call i lies between marks 2 i and 2 i + 1
};
inline OpTimes op_times;

namespace floors {

inline double real(size_t count) { return static_cast<double>(count); }
inline std::string text(size_t out, size_t in) {
  return std::to_string(in) + "->" + std::to_string(out);
}

// `e`: bytes of an element.
inline OpFloor of(double e, const TmLinear* a) {
  const double n = real(a->n), out = real(a->w.out), in = real(a->w.in);
  const double moved = n * in + out * in + n * out * (a->accumulate ? 2 : 1);
  return {text(a->w.out, a->w.in), 2 * n * out * in, e * moved};
}
inline OpFloor of(double e, const TmLinearWeightGrad* a) {
  const double n = real(a->n), out = real(a->out), in = real(a->in);
  const double written = 4 * out * in * (a->accumulate ? 2 : 1);
  return {text(a->out, a->in), 2 * n * out * in, e * n * (out + in) + written};
}
// A result written once more in e4m3.
inline double once_more(const TmQuantised& quantised, size_t rows, size_t columns) {
  return quantised.q == nullptr ? 0 : real(rows) * real(columns);
}
inline OpFloor of(double e, const TmRmsNorm* a) {
  return {"", 0, 2 * e * real(a->n) * real(a->c) + once_more(a->quantised, a->n, a->c)};
}
inline OpFloor of(double e, const TmRmsNormBackward* a) {
  const double moved = (a->dx_add ? 4 : 3) * e * real(a->n) * real(a->c);
  return {"", 0, moved + once_more(a->quantised, a->n, a->c)};
}
inline OpFloor of(double e, const TmRope* a) {
  const size_t rotated = a->heads * a->head_size;
  double moved = 2 * e * real(a->n) * real(rotated);
  if (a->quantised.q != nullptr) moved += e * real(a->n) * real(a->quantised_width - rotated);
  return {"", 0, moved + once_more(a->quantised, a->n, a->quantised_width)};
}
// Half of all pairs: causal. Windows are not counted.
inline double attention_flops(const TmAttention& a) {
  double pairs = 0;
  for (size_t d = 0; d < a.num_documents; ++d) {
    const double length = a.host_document_starts[d + 1] - a.host_document_starts[d];
    pairs += length * length / 2;
  }
  return 4 * pairs * real(a.num_heads * a.head_size);
}
inline OpFloor of(double e, const TmAttention* a) {
  const double moved = 2 * real(a->n) * real((a->num_heads + a->num_kv_heads) * a->head_size);
  return {"", attention_flops(*a), e * moved};
}
inline OpFloor of(double e, const TmAttentionBackward* b) {
  const TmAttention& a = b->forward;
  const double moved = 4 * real(a.n) * real((a.num_heads + a.num_kv_heads) * a.head_size);
  return {"", 2.5 * attention_flops(a), e * moved};
}
inline OpFloor of(double e, const TmSwiGlu* a) {
  return {"", 0, 3 * e * real(a->n * a->d) + once_more(a->quantised, a->n, a->d)};
}
inline OpFloor of(double e, const TmSwiGluBackward* a) {
  const double moved = (a->out != nullptr ? 6 : 5) * e * real(a->n * a->d);
  return {"", 0, moved + once_more(a->quantised, a->n, 2 * a->d)};
}
inline OpFloor of(double e, const TmCrossEntropy* a) {
  return {"", 0, (a->dlogits ? 2 : 1) * e * real(a->rows * a->v)};
}
inline OpFloor of(double e, const TmAdamW* a) {
  double moved = 0;
  for (size_t i = 0; i < a->num_tensors; ++i) {
    const TmTrainedTensor& t = a->host_tensors[i];
    const double gradient = t.is_half_gradient ? 2 : 4, copy = t.copy != nullptr ? e : 0;
    const double states = t.m_exponents != nullptr ? 8 : t.is_half ? 12 : 24;
    moved += (states + gradient + copy) * real(t.n);
  }
  return {"", 0, moved};
}
inline OpFloor of(double, const TmSumSquares* a) {
  return {"", 0, (a->half_values != nullptr ? 512 : 1024) * real(a->num_blocks)};
}
inline OpFloor of(double, const TmRoundBlocks* a) {
  return {"", 0, (a->overwrites ? 3072 : 5120) * real(a->num_blocks)};
}
// The words are counted as those of 25 bits: one micro-batch's of q24.
inline OpFloor of(double, const TmPackBlocks* a) {
  return {"", 0, (2048 + 800) * real(a->num_blocks)};
}
inline OpFloor of(double e, const int32_t*, size_t n, const TmWeight* table, TmElement*) {
  return {"", 0, 2 * e * real(n * table->in)};
}
inline OpFloor of(double e, const int32_t*, size_t n, const TmElement*, size_t c, size_t, float*) {
  return {"", 0, (e + 8) * real(n * c)};
}
inline OpFloor of(double e, TmElement*, size_t n, size_t c, size_t, const float*) {
  return {"", 0, 2 * e * real(n * c)};
}
inline OpFloor of(double e, const TmElement*, size_t n, size_t c, size_t, float*) {
  return {"", 0, e * real(n * c)};
}
inline OpFloor of(double e, TmElement*, const TmElement*, size_t n) {
  return {"", 0, 3 * e * real(n)};
}
inline OpFloor of(double e, const TmElement*, const int32_t*, size_t n, size_t c, TmElement*) {
  return {"", 0, 2 * e * real(n * c)};
}
inline OpFloor of(double e, const float*, size_t out, size_t in, TmElement*) {
  return {"", 0, (4 + e) * real(out * in)};
}
// A linear group's floor is that of its base weights: the border is the backend's own.
inline size_t outputs(const TmGroupShape& shape) {
  size_t out = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) out += shape.out[part];
  return out;
}
// An fp8 base's products read a byte an element (bench/gpu/op-table.ts knows them by their name).
inline OpFloor product(double e, size_t rows, const TmGroupShape& shape) {
  const double n = real(rows), out = real(outputs(shape)), in = real(shape.in);
  const double flops = 2 * n * out * in;
  if (shape.is_fp8) {
    return {text(outputs(shape), shape.in) + " fp8", flops, n * in + out * in + e * n * out};
  }
  return {text(outputs(shape), shape.in), flops, e * (n * in + out * in + n * out)};
}
inline OpFloor of(double e, const TmGroupForward* a) { return product(e, a->n, *a->shape); }
inline OpFloor of(double e, const TmGroupBackward* a) {
  if (a->dx != nullptr) return product(e, a->n, *a->shape);
  return {"tail", 0, e * real(a->n) * real(outputs(*a->shape))};
}
inline OpFloor of(double e, const TmGroupPack* a) {
  double copied = 0;
  for (size_t part = 0; part < a->shape->num_parts; ++part) {
    const double in = real(a->shape->in), out = real(a->shape->out[part]);
    if (a->weight[part] != nullptr) copied += in * out;
    if (a->lora_a[part] != nullptr) copied += real(a->shape->rank) * in;
    if (a->lora_b[part] != nullptr) copied += real(a->shape->rank) * out;
  }
  return {"", 0, (4 + e) * copied};
}
inline OpFloor of(double e, const TmGroupAdapterGrads* a) {
  double width = real(a->shape->in), ranks = 0;
  for (size_t part = 0; part < a->shape->num_parts; ++part) {
    if (!a->shape->is_adapted[part]) continue;
    width += real(a->shape->out[part]);
    ranks += real(a->shape->rank);
  }
  const double flops = 2 * real(a->n) * (ranks * real(a->shape->in)) +
                       2 * real(a->n) * real(a->shape->rank) * (width - real(a->shape->in));
  return {text(outputs(*a->shape), a->shape->in), flops, e * real(a->n) * (width + 2 * ranks)};
}
inline OpFloor of(double, const TmCopyRows* a) { return {"", 0, 2 * real(a->n * a->row_bytes)}; }
inline OpFloor of(double, void*, size_t bytes) { return {"", 0, real(bytes)}; }
inline OpFloor of(double, void*, const void*, size_t) { return {}; }

}  // namespace floors

using Clock = std::chrono::steady_clock;
inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

template <auto Member>
struct TimedOp;
template <class... Args, TmStatus (*TmBackend::*Member)(TmContext*, Args...)>
struct TimedOp<Member> {
  static inline const char* name = nullptr;
  static TmStatus call(TmContext* context, Args... args) {
    const TmBackend& inner = *op_times.inner;
    if (!op_times.is_on) return (inner.*Member)(context, args...);
    const OpFloor floor = floors::of(static_cast<double>(inner.element_bytes(context)), args...);
    OpTime& total = op_times.by_op[name + (floor.shape.empty() ? "" : " " + floor.shape)];
    total.calls += 1;
    total.flops += floor.flops;
    total.bytes += floor.bytes;
    const auto run = [&] { return (inner.*Member)(context, args...); };
    return op_times.card.has_clock() ? marked(context, total, run) : waited(context, total, run);
  }

 private:
  template <typename Run>
  static TmStatus marked(TmContext* context, OpTime& total, const Run& run) {
    const size_t first = 2 * op_times.marked.size();
    op_times.marked.push_back(&total);
    op_times.card.mark(context, first);
    const TmStatus status = run();
    op_times.card.mark(context, first + 1);
    return status;
  }
  template <typename Run>
  static TmStatus waited(TmContext* context, OpTime& total, const Run& run) {
    const auto start = Clock::now();
    TmStatus status = run();
    if (status == TM_OK) status = op_times.inner->synchronize(context);
    total.seconds += std::max(0.0, seconds_since(start) - op_times.wait_seconds);
    return status;
  }
};

// Once the device has passed all marks; answers the seconds between each call's two.
inline double read_marks(TmContext* context) {
  double seconds = 0;
  for (size_t call = 0; call < op_times.marked.size(); ++call) {
    const double ms = std::max(0.0, op_times.card.marked_ms(context, 2 * call, 2 * call + 1));
    op_times.marked[call]->seconds += ms * 1e-3;
    seconds += ms * 1e-3;
  }
  op_times.marked.clear();
  return seconds;
}

// Parts of a step that would be launched as one are issued call by call while they are timed.
inline TmStatus begin_untimed(TmContext* context, const TmCallsKey* key, int* action) {
  if (!op_times.is_on) return op_times.inner->calls_begin(context, key, action);
  *action = TM_CALLS_RUN;
  return TM_OK;
}

// The table to give to an engine; lives as long as the process.
inline const TmBackend* timed_backend(const TmBackend* inner) {
  static TmBackend table;
  table = *inner;
  op_times.inner = inner;
#define TM_TIME(op)                     \
  TimedOp<& TmBackend::op>::name = #op; \
  if (inner->op != nullptr) table.op = TimedOp<&TmBackend::op>::call
  TM_TIME(copy_in);
  TM_TIME(copy_out);
  TM_TIME(fill_zero);
  TM_TIME(pack_trained_weight);
  TM_TIME(embedding_forward);
  TM_TIME(embedding_backward_add);
  TM_TIME(rms_norm_forward);
  TM_TIME(rms_norm_backward);
  TM_TIME(linear_forward);
  TM_TIME(linear_backward_input);
  TM_TIME(linear_weight_grad);
  TM_TIME(bias_add);
  TM_TIME(bias_grad_add);
  TM_TIME(rope);
  TM_TIME(attention_forward);
  TM_TIME(attention_backward);
  TM_TIME(swiglu_forward);
  TM_TIME(swiglu_backward);
  TM_TIME(add);
  TM_TIME(gather_rows);
  TM_TIME(scatter_rows_add);
  TM_TIME(cross_entropy);
  TM_TIME(adamw);
  TM_TIME(sum_squares);
  TM_TIME(pack_group_trained);
  TM_TIME(group_forward);
  TM_TIME(group_backward);
  TM_TIME(group_adapter_grads);
  TM_TIME(copy_rows);
  TM_TIME(round_blocks);
  TM_TIME(pack_blocks);
#undef TM_TIME
  if (inner->calls_begin != nullptr) table.calls_begin = begin_untimed;
  return &table;
}

}  // namespace tunemesh::bench
