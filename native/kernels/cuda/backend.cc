// The CUDA backend's table. Each entry checks what the host can see, launches, and turns failures
// into a status and a line: no exception leaves the plugin.
#include "kernels/backend.h"

#include <algorithm>

#include "kernels/cuda/adamw.cuh"
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_chunks.h"
#include "kernels/cuda/bias.cuh"
#include "kernels/cuda/context.h"
#include "kernels/cuda/cross_entropy.cuh"
#include "kernels/cuda/decode_attention.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/embedding.cuh"
#include "kernels/cuda/gradient_norm.cuh"
#include "kernels/cuda/group_grads.h"
#include "kernels/cuda/guard.h"
#include "kernels/cuda/linear_group.h"
#include "kernels/cuda/pack.cuh"
#include "kernels/cuda/pack_blocks.cuh"
#include "kernels/cuda/plugin.h"
#include "kernels/cuda/rmsnorm.cuh"
#include "kernels/cuda/rope.cuh"
#include "kernels/cuda/swiglu.cuh"

namespace tunemesh::cuda {
namespace {

const char* last_error() { return last_failure(); }

TmStatus create(const TmContextOptions* options, TmContext** out) {
  *out = nullptr;
  return guarded(nullptr, [&] {
    if (options->size < sizeof(TmContextOptions)) {
      refuse("context options of ", options->size, " bytes; this backend expects ",
             sizeof(TmContextOptions));
    }
    if (options->precision < TM_FP32 || options->precision > TM_FP8) {
      refuse("precision ", options->precision,
             " is unknown; use 0 (fp32), 1 (bf16) or 2 (bf16 with an fp8 base)");
    }
    *out = new TmContext(*options);
  });
}

void destroy(TmContext* context) {
  if (context == nullptr) return;
  guarded(nullptr, [&] {
    try {
      context->enter();
    } catch (const CudaFailure&) {
      // A broken device: its handles are given back as far as it lets them.
    }
    delete context;
  });
}

const char* describe(TmContext* context) { return context->description().c_str(); }
const char* instruction_path(TmContext* context) { return context->instruction_path().c_str(); }
int num_threads(TmContext*) { return 1; }
size_t memory_bytes(TmContext* context) { return context->memory_bytes(); }
size_t element_bytes(TmContext* context) { return context->precision() == TM_BF16 ? 2 : 4; }
// Master weights are floats: products of bfloat16 need a copy of them.
int reads_rows(TmContext* context) { return context->precision() == TM_BF16 ? 0 : 1; }
int packs_row_major(TmContext*) { return 1; }

TmStatus allocate(TmContext* context, size_t bytes, void** out) {
  *out = nullptr;
  return guarded(context, [&] { *out = allocate_device(bytes); });
}

void release(TmContext* context, void* pointer) {
  guarded(context, [&] { CUDA_CHECK(cudaFree(pointer)); });
}

TmStatus allocate_host(TmContext* context, size_t bytes, void** out) {
  *out = nullptr;
  return guarded(context, [&] { *out = allocate_pinned(bytes); });
}

void release_host(TmContext* context, void* pointer) {
  guarded(context, [&] { CUDA_CHECK(cudaFreeHost(pointer)); });
}

// The host's bytes may change as soon as the call returns, pinned or not.
TmStatus copy_in(TmContext* context, void* device, const void* host, size_t bytes) {
  return guarded(context, [&] { context->copy_in(device, host, bytes); });
}

TmStatus copy_out(TmContext* context, void* host, const void* device, size_t bytes) {
  return guarded(context, [&] { context->copy_out(host, device, bytes); });
}

TmStatus read_elements(TmContext* context, float* host, const TmElement* device, size_t count) {
  if (context->precision() == TM_FP32) {
    return copy_out(context, host, device, count * sizeof(float));
  }
  return guarded(context, [&] {
    context->transfer().fetch(host, count, device, context->stream());
    context->wait();
  });
}

TmStatus fill_zero(TmContext* context, void* pointer, size_t bytes) {
  return guarded(context, [&] {
    if (bytes > 0) CUDA_CHECK(cudaMemsetAsync(pointer, 0, bytes, context->stream()));
  });
}

TmStatus synchronize(TmContext* context) {
  return guarded(context, [&] { context->wait(); });
}

TmStatus set_checked(TmContext* context, int is_checked) {
  return guarded(context, [&] { context->set_checked(is_checked != 0); });
}

// cuBLASLt takes weights as they are: packing is a copy, rounded where elements are bfloat16.
size_t packed_weight_elements(size_t out, size_t in) { return out * in; }

TmStatus pack_weight(TmContext* context, const float* rows, size_t out, size_t in,
                     TmElement* packed) {
  if (context->precision() == TM_FP32) {
    return copy_in(context, packed, rows, out * in * sizeof(float));
  }
  return guarded(context,
                 [&] { context->transfer().send(rows, out * in, packed, context->stream()); });
}

TmStatus pack_trained_weight(TmContext* context, const float* rows, size_t out, size_t in,
                             TmElement* packed) {
  return with_element(context, [&](auto element) {
    pack_rows(rows, out * in, elements<decltype(element)>(packed), context->stream());
  });
}

// Tables whose height the call does not say: only the sign can be checked.
constexpr size_t kUnknownHeight = size_t{1} << 31;

template <typename From, typename To>
void gather_from(TmContext* context, const From* table, const RowIndices& rows, size_t c, To* out) {
  gather_rows(GatherRows<From, To>{rows, table, c, out}, context->stream());
}

TmStatus gather(TmContext* context, const TmElement* x, const int32_t* indices, size_t n, size_t c,
                TmElement* out) {
  return with_element(context, [&](auto element) {
    using Element = decltype(element);
    const RowIndices rows = {indices, n, kUnknownHeight, FaultOperation::kGather, context->fault()};
    gather_from(context, elements<Element>(x), rows, c, elements<Element>(out));
  });
}

TmStatus embedding_forward(TmContext* context, const int32_t* tokens, size_t n,
                           const TmWeight* table, TmElement* out) {
  if (table->packed != nullptr) {
    return gather(context, table->packed, tokens, n, table->in, out);
  }
  return with_element(context, [&](auto element) {
    const RowIndices rows = {tokens, n, kUnknownHeight, FaultOperation::kGather, context->fault()};
    gather_from(context, table->rows, rows, table->in, elements<decltype(element)>(out));
  });
}

TmStatus embedding_backward_add(TmContext* context, const int32_t* tokens, size_t n,
                                const TmElement* dout, size_t c, size_t v, float* table_grad) {
  return with_element(context, [&](auto element) {
    using Element = decltype(element);
    const RowIndices rows = {tokens, n, v, FaultOperation::kScatter, context->fault()};
    scatter_rows_add(ScatterRows<Element, float>{rows, elements<Element>(dout), c, table_grad},
                     context->scratch(), context->stream());
  });
}

TmStatus scatter_add(TmContext* context, const TmElement* x, const int32_t* indices, size_t n,
                     size_t c, TmElement* out) {
  return with_element(context, [&](auto element) {
    using Element = decltype(element);
    const RowIndices rows = {indices, n, kUnknownHeight, FaultOperation::kScatter,
                             context->fault()};
    scatter_rows_add(
        ScatterRows<Element, Element>{rows, elements<Element>(x), c, elements<Element>(out)},
        context->stream());
  });
}

void check_quantised_norm(const TmQuantised& quantised, size_t heads) {
  if (quantised.q != nullptr && heads != 0) refuse("rms_norm: rows of heads are not quantised");
}
TmStatus norm_forward(TmContext* context, const TmRmsNorm* args) {
  return with_element(context, [&](auto element) {
    check_quantised_norm(args->quantised, args->heads);
    rms_norm_forward<decltype(element)>(*args, context->stream());
  });
}
TmStatus norm_backward(TmContext* context, const TmRmsNormBackward* args) {
  return with_element(context, [&](auto element) {
    check_quantised_norm(args->quantised, args->heads);
    if (args->quantised.q != nullptr && args->dgain != nullptr) {
      refuse("rms_norm_backward: rows are not quantised where the gain is trained");
    }
    rms_norm_backward<decltype(element)>(*args, context->scratch(), context->stream());
  });
}

TmStatus linear_forward(TmContext* context, const TmLinear* args) {
  return guarded(context, [&] { context->gemm().forward(*args, context->stream()); });
}
TmStatus linear_backward_input(TmContext* context, const TmLinear* args) {
  return guarded(context, [&] { context->gemm().backward_input(*args, context->stream()); });
}
TmStatus linear_weight_grad(TmContext* context, const TmLinearWeightGrad* args) {
  return guarded(context, [&] { context->gemm().weight_grad(*args, context->stream()); });
}

TmStatus add_bias(TmContext* context, TmElement* y, size_t n, size_t c, size_t stride,
                  const float* bias) {
  return with_element(context, [&](auto element) {
    bias_add<decltype(element)>({y, nullptr, bias, nullptr, n, c, stride}, context->stream());
  });
}
TmStatus add_bias_grad(TmContext* context, const TmElement* dy, size_t n, size_t c, size_t stride,
                       float* dbias) {
  return with_element(context, [&](auto element) {
    bias_grad_add<decltype(element)>({nullptr, dy, nullptr, dbias, n, c, stride},
                                     context->scratch(), context->stream());
  });
}
TmStatus add_vectors(TmContext* context, TmElement* y, const TmElement* x, size_t n) {
  return with_element(context, [&](auto element) {
    add<decltype(element)>({y, x, n}, context->stream());
  });
}

TmStatus rotate(TmContext* context, const TmRope* args) {
  return with_element(context, [&](auto element) {
    if (args->head_size % 2 != 0) {
      refuse("rope: head size ", args->head_size, " is odd; it rotates pairs");
    }
    if (args->quantised.q != nullptr && args->quantised_width < args->heads * args->head_size) {
      refuse("rope: ", args->quantised_width, " columns to quantise, fewer than the heads' ",
             args->heads * args->head_size);
    }
    rope<decltype(element)>(*args, context->stream());
  });
}

void check_heads(const char* operation, size_t num_heads, size_t num_kv_heads) {
  if (num_kv_heads != 0 && num_heads % num_kv_heads == 0) return;
  refuse(operation, ": ", num_heads, " query heads do not divide among ", num_kv_heads,
         " key/value heads");
}

void check_head_size(size_t head_size) {
  if (head_size <= kLargestHead) return;
  refuse("attention: head size ", head_size, " is above ", kLargestHead,
         ", the largest that this backend has kernels for. Use --device cpu");
}

void check_attention(const TmAttention& a) {
  check_heads("attention", a.num_heads, a.num_kv_heads);
  check_head_size(a.head_size);
  if (a.n > 0 && a.num_documents == 0) refuse("attention: ", a.n, " tokens in no document");
}

// Of cuDNN. The own kernels need none: keys and values are summed by the block that owns them,
// delta where it is used.
size_t attention_scratch_bytes(TmContext* context, const TmAttentionJob* job) {
  size_t bytes = SIZE_MAX;
  guarded(nullptr, [&] {
    check_head_size(job->head_size);
    bytes = context->cudnn() == nullptr ? 0 : context->cudnn()->scratch_bytes(*job);
  });
  return bytes;
}

// As many documents as all calls of one attention_key have, the last ones empty.
TmAttention with_padding(TmAttention a) {
  const size_t wanted = round_documents(a.num_documents);
  if (a.padded_documents > a.num_documents) a.num_documents = std::min(wanted, a.padded_documents);
  return a;
}

void attention_key(TmContext* context, const TmAttention* args, uint64_t* key) {
  std::fill_n(key, TM_ATTENTION_KEY_WORDS, 0);
  key[0] = round_documents(args->num_documents);
  if (context->cudnn() == nullptr || args->num_documents == 0) return;
  if (args->host_document_starts == nullptr) return;  // the own kernels then serve
  const AttentionChunk chunk =
      forward_chunks({args->host_document_starts, args->num_documents},
                     {args->num_heads, args->num_kv_heads, args->head_size})
          .front();
  key[0] = chunk.batch << 1 | (chunk.ragged ? 1 : 0);
  key[1] = chunk.length;
  key[2] = chunk.total_tokens;
}

TmStatus attend_forward(TmContext* context, const TmAttention* args) {
  return with_element(context, [&](auto element) {
    check_attention(*args);
    if (context->cudnn() != nullptr) {
      if (context->cudnn()->forward(*args)) return;
      context->note_own_attention("forward", *args);
    }
    attention_forward<decltype(element)>(with_padding(*args), context->fault(), context->stream());
  });
}

TmStatus attend_backward(TmContext* context, const TmAttentionBackward* args) {
  return with_element(context, [&](auto element) {
    check_attention(args->forward);
    if (context->cudnn() != nullptr) {
      if (context->cudnn()->backward(*args)) return;
      context->note_own_attention("backward", args->forward);
    }
    TmAttentionBackward padded = *args;
    padded.forward = with_padding(args->forward);
    attention_backward<decltype(element)>(padded, context->stream());
  });
}

TmStatus attend_decode(TmContext* context, const TmDecodeAttention* args) {
  return with_element(context, [&](auto element) {
    const TmDecodeAttention& a = *args;
    check_heads("decode_attention", a.num_heads, a.num_kv_heads);
    if (a.first >= a.end) {
      refuse("decode_attention: rows [", a.first, ", ", a.end, ") hold no key");
    }
    if (a.score_stride % 16 != 0 || a.score_stride < a.end - a.first) {
      refuse("decode_attention: score_stride is ", a.score_stride, "; ", a.end - a.first,
             " keys need a multiple of 16 from there");
    }
    decode_attention<decltype(element)>(a, context->stream());
  });
}

TmStatus swiglu(TmContext* context, const TmSwiGlu* args) {
  return with_element(
      context, [&](auto element) { swiglu_forward<decltype(element)>(*args, context->stream()); });
}
TmStatus swiglu_grad(TmContext* context, const TmSwiGluBackward* args) {
  return with_element(context, [&](auto element) {
    using Element = decltype(element);
    if (args->quantised.q != nullptr &&
        elements<Element>(args->dup) != elements<Element>(args->dgate) + args->d) {
      refuse("swiglu_backward: dup does not lie beside dgate");
    }
    swiglu_backward<Element>(*args, context->stream());
  });
}

TmStatus loss(TmContext* context, const TmCrossEntropy* args) {
  return with_element(context, [&](auto element) {
    cross_entropy<decltype(element)>(*args, context->fault(), context->stream());
  });
}

TmStatus update(TmContext* context, const TmAdamW* args) {
  return with_element(context,
                      [&](auto element) { adamw<decltype(element)>(*args, context->stream()); });
}

TmStatus squares(TmContext* context, const TmSumSquares* args) {
  return guarded(context, [&] { sum_squares(*args, context->stream()); });
}

TmStatus round_gradient(TmContext* context, const TmRoundAndAdd* args) {
  return guarded(context, [&] {
    if (args->significant_bits < 2 || args->significant_bits > 24) {
      refuse("round_and_add: significant_bits is ", args->significant_bits, "; use 2 to 24");
    }
    return context->round_and_add(*args);
  });
}

TmStatus calls_begin(TmContext* context, const TmCallsKey* key, int* action) {
  *action = TM_CALLS_RUN;
  return guarded(context, [&] { *action = context->begin_calls(*key); });
}

TmStatus calls_end(TmContext* context, int is_whole, int* has_run) {
  *has_run = 0;
  // Of the call that failed, if one did.
  const std::string line = is_whole != 0 ? "" : last_failure();
  return guarded(context, [&] {
    const std::string why = context->end_calls(is_whole != 0);
    *has_run = why.empty() ? 1 : 0;
    if (why.empty()) return;
    context->notes().add("recorded calls",
                         "a part of the step can't be recorded and is issued call by call, which "
                         "costs small models speed: " +
                             (line.empty() ? why : line));
  });
}

TmStatus calls_forget(TmContext* context) {
  return guarded(context, [&] { context->forget_calls(); });
}

int num_devices() { return tm_cuda_num_devices(nullptr); }

void fill_memory(TmBackend& backend) {
  backend.num_devices = num_devices;
  backend.memory_bytes = memory_bytes;
  backend.element_bytes = element_bytes;
  backend.reads_rows = reads_rows;
  backend.packs_row_major = packs_row_major;
  backend.allocate_host = allocate_host;
  backend.release_host = release_host;
  backend.read_elements = read_elements;
  backend.last_error = last_error;
  backend.create = create;
  backend.destroy = destroy;
  backend.describe = describe;
  backend.instruction_path = instruction_path;
  backend.num_threads = num_threads;
  backend.allocate = allocate;
  backend.release = release;
  backend.copy_in = copy_in;
  backend.copy_out = copy_out;
  backend.fill_zero = fill_zero;
  backend.synchronize = synchronize;
  backend.set_checked = set_checked;
  backend.take_note = [](TmContext* context) { return context->notes().take(); };
}

TmBackend assemble() {
  TmBackend backend{};
  backend.size = sizeof(TmBackend);
  backend.abi = TM_BACKEND_ABI;
  backend.name = "cuda";
  fill_memory(backend);
  backend.packed_weight_elements = packed_weight_elements;
  backend.pack_weight = pack_weight;
  backend.pack_trained_weight = pack_trained_weight;
  backend.embedding_forward = embedding_forward;
  backend.embedding_backward_add = embedding_backward_add;
  backend.rms_norm_forward = norm_forward;
  backend.rms_norm_backward = norm_backward;
  backend.linear_forward = linear_forward;
  backend.linear_backward_input = linear_backward_input;
  backend.linear_weight_grad = linear_weight_grad;
  backend.bias_add = add_bias;
  backend.bias_grad_add = add_bias_grad;
  backend.rope = rotate;
  backend.attention_scratch_bytes = attention_scratch_bytes;
  backend.attention_forward = attend_forward;
  backend.attention_backward = attend_backward;
  backend.swiglu_forward = swiglu;
  backend.swiglu_backward = swiglu_grad;
  backend.add = add_vectors;
  backend.gather_rows = gather;
  backend.scatter_rows_add = scatter_add;
  backend.cross_entropy = loss;
  backend.adamw = update;
  backend.round_and_add = round_gradient;
  backend.decode_attention = attend_decode;
  fill_groups(backend);
  fill_side_copies(backend);
  fill_group_grads(backend);
  fill_exchange(backend);
  backend.sum_squares = squares;
  backend.calls_begin = calls_begin;
  backend.calls_end = calls_end;
  backend.calls_forget = calls_forget;
  backend.attention_key = attention_key;
  return backend;
}

}  // namespace
}  // namespace tunemesh::cuda

#define TM_EXPORT extern "C" __attribute__((visibility("default")))

TM_EXPORT const TmBackend* tm_cuda_backend(void) {
  static const TmBackend backend = tunemesh::cuda::assemble();
  return &backend;
}

TM_EXPORT int tm_cuda_num_devices(const char** reason) {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  cudaGetLastError();
  if (error != cudaSuccess) num_devices = 0;
  if (reason != nullptr) {
    *reason = error != cudaSuccess ? cudaGetErrorString(error)
              : num_devices == 0   ? "no device is visible"
                                   : "";
  }
  return num_devices;
}
