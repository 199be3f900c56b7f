#include "kernels/cuda/attention_cudnn.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_chunks.h"
#include "kernels/cuda/attention_layout.cuh"
#include "kernels/cuda/cudnn_graph.h"
#include "kernels/cuda/cudnn_library.h"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {
namespace {

constexpr size_t kWorkspaceLimit = size_t{3} << 29;  // 1.5 GiB
constexpr size_t kMostPlans = 64;
constexpr size_t kAlign = 256;
constexpr size_t kElementBytes = 2;

size_t align_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Either direction: `backward` is null in the forward.
struct Call {
  const TmAttention& forward;
  const TmAttentionBackward* backward;
};

// One of the nine tensors of a call; empty where the direction has it not.
struct CallTensor {
  void* rows = nullptr;
  size_t stride = 0, element_bytes = kElementBytes;
  bool is_per_kv_head = false;
  size_t head_width = 0;
};

void* writable(const void* pointer) { return const_cast<void*>(pointer); }

std::array<CallTensor, kAttentionTensors> tensors_of(const Call& call) {
  const TmAttention& a = call.forward;
  const size_t width = a.head_size;
  std::array<CallTensor, kAttentionTensors> all = {};
  all[0] = {writable(a.q), a.q_stride, kElementBytes, false, width};
  all[1] = {writable(a.k), a.k_stride, kElementBytes, true, width};
  all[2] = {writable(a.v), a.v_stride, kElementBytes, true, width};
  all[3] = {writable(a.out), a.out_stride, kElementBytes, false, width};
  all[4] = {a.lse, a.num_heads, sizeof(float), false, 1};
  if (call.backward == nullptr) return all;
  const TmAttentionBackward& b = *call.backward;
  all[5] = {writable(b.dout), b.dout_stride, kElementBytes, false, width};
  all[6] = {writable(b.dq), b.dq_stride, kElementBytes, false, width};
  all[7] = {writable(b.dk), b.dk_stride, kElementBytes, true, width};
  all[8] = {writable(b.dv), b.dv_stride, kElementBytes, true, width};
  return all;
}

constexpr size_t kLse = static_cast<size_t>(AttentionTensor::kLse);
constexpr size_t kDout = static_cast<size_t>(AttentionTensor::kDout);
constexpr size_t kDk = static_cast<size_t>(AttentionTensor::kDk);
constexpr size_t kDv = static_cast<size_t>(AttentionTensor::kDv);

// cuDNN keeps the ragged gradients of keys and values for each query head in rows as wide as the
// stride says times the heads of a group: they then go to narrow rows of the scratch first.
bool has_narrow_rows(const Call& call, const AttentionChunk& chunk) {
  if (call.backward == nullptr || !chunk.ragged) return false;
  if (call.forward.num_heads == call.forward.num_kv_heads) return false;
  const size_t width = chunk.num_kv_heads * call.forward.head_size;
  return call.backward->dk_stride != width || call.backward->dv_stride != width;
}

bool covers_all(const Call& call, const AttentionChunk& chunk) {
  return chunk.num_documents == call.forward.num_documents;
}

size_t chunk_tokens(const Call& call, const AttentionChunk& chunk) {
  const int32_t* starts = call.forward.host_document_starts + chunk.first_document;
  return static_cast<size_t>(starts[chunk.num_documents] - starts[0]);
}

AttentionShape shape_of(const Call& call, const AttentionChunk& chunk) {
  const TmAttention& a = call.forward;
  AttentionShape shape;
  shape.backward = call.backward != nullptr;
  shape.ragged = chunk.ragged;
  shape.batch = static_cast<int64_t>(chunk.batch);
  shape.length = static_cast<int64_t>(chunk.length);
  shape.total_tokens =
      shape.ragged && shape.backward ? static_cast<int64_t>(chunk.total_tokens) : 0;
  shape.num_kv_heads = static_cast<int64_t>(chunk.num_kv_heads);
  shape.num_heads = shape.num_kv_heads * static_cast<int64_t>(a.num_heads / a.num_kv_heads);
  shape.head_size = static_cast<int64_t>(a.head_size);
  shape.window = a.window < chunk.length ? static_cast<int64_t>(a.window) : 0;
  shape.scale = a.scale;
  shape.lse_stride = static_cast<int64_t>(a.num_heads);
  const auto tensors = tensors_of(call);
  int64_t* const strides[] = {&shape.q_stride,   &shape.k_stride,  &shape.v_stride,
                              &shape.out_stride, nullptr,          &shape.dout_stride,
                              &shape.dq_stride,  &shape.dk_stride, &shape.dv_stride};
  for (size_t i = 0; i < kAttentionTensors; ++i) {
    if (strides[i] != nullptr) *strides[i] = static_cast<int64_t>(tensors[i].stride);
  }
  if (has_narrow_rows(call, chunk)) {
    shape.dk_stride = shape.dv_stride = shape.num_kv_heads * shape.head_size;
  }
  return shape;
}

struct Plan {
  AttentionShape shape;
  std::unique_ptr<CudnnGraph> graph;  // null where cuDNN does not serve the shape
  std::string refusal;
  uint64_t last_call = 0;
  bool is_checked = false;   // backward: gave something else than zeros once
  bool is_recorded = false;  // a captured graph holds its kernels
};

struct Step {
  AttentionChunk chunk;
  Plan* plan;
};

// The front of a call's scratch: a chunk's tables, then cuDNN's workspace.
class Scratch {
 public:
  Scratch(const TmAttention& a) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(a.scratch);
    next_ = align_up(begin);
    end_ = begin + a.scratch_bytes;
  }
  size_t left() const { return end_ > next_ ? end_ - next_ : 0; }
  template <typename T>
  T* take(size_t count) {
    T* const taken = reinterpret_cast<T*>(next_);
    next_ += align_up(count * sizeof(T));
    return taken;
  }

 private:
  uintptr_t next_, end_;
};

// What a chunk takes of the scratch beside cuDNN's workspace.
size_t table_bytes(const AttentionChunk& chunk, const Call& call) {
  if (chunk.ragged) {
    const size_t width = chunk.num_kv_heads * call.forward.head_size;
    const size_t narrow = align_up(chunk_tokens(call, chunk) * width * kElementBytes);
    return kRaggedTensors * align_up((chunk.batch + 1) * sizeof(int32_t)) +
           align_up(chunk.batch * sizeof(int32_t)) + kAlign +
           (has_narrow_rows(call, chunk) ? 2 * narrow : 0);
  }
  const size_t ratio = call.forward.num_heads / call.forward.num_kv_heads;
  const size_t rows = chunk.batch * chunk.num_kv_heads * ratio * chunk.length;
  return (call.backward != nullptr ? align_up(rows * sizeof(float)) : 0) + kAlign;
}

class CudnnAttentionOnCard : public CudnnAttention {
 public:
  explicit CudnnAttentionOnCard(const Options& options)
      : library_(options.library_folder, options.stream),
        stream_(options.stream),
        is_free_(options.is_free) {
    int device = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, device));
  }

  std::string version() const override { return library_.version(); }
  const std::string& refusal() const override { return refusal_; }
  size_t largest_workspace() const override { return largest_workspace_; }
  size_t scratch_bytes(const TmAttentionJob& job) const override;

  bool supports(const TmAttention& args) override { return prepare({args, nullptr}); }
  bool supports(const TmAttentionBackward& args) override { return prepare({args.forward, &args}); }
  bool forward(const TmAttention& args) override { return run({args, nullptr}); }
  bool backward(const TmAttentionBackward& args) override { return run({args.forward, &args}); }
  void forget_recorded() override {
    for (const auto& plan : plans_) plan->is_recorded = false;
  }

 private:
  bool refuse(const std::string& why) {
    refusal_ = why;
    return false;
  }
  AttentionHeads heads_of(const TmAttention& a) const {
    return {a.num_heads, a.num_kv_heads, a.head_size, is_free_};
  }
  bool has_fit_form(const Call& call);
  bool prepare(const Call& call);
  bool find_plans(const Call& call, const std::vector<AttentionChunk>& chunks);
  Plan* plan_for(const AttentionShape& shape);
  void evict_oldest();
  size_t largest_step(const Call& call) const;
  bool run(const Call& call);
  void check_recordable(const Call& call);
  bool run_step(const Call& call, const Step& step);
  void lay_out_lse(const Call& call, const Step& step, Scratch& scratch,
                   AttentionPointers& pointers);
  void fill_tables(const Call& call, const Step& step, Scratch& scratch,
                   AttentionPointers& pointers);
  void copy_narrow_rows(const Call& call, const Step& step, const AttentionPointers& narrow);
  bool check_gradients(const Call& call, const Step& step);

  CudnnLibrary library_;
  cudaStream_t stream_;
  const bool is_free_;
  int major_ = 0;
  std::vector<std::unique_ptr<Plan>> plans_;
  std::vector<Step> steps_;  // of the call that is prepared
  uint64_t call_ = 0;
  bool is_recording_ = false;
  std::string refusal_;
  size_t largest_workspace_ = 0;
};

size_t CudnnAttentionOnCard::scratch_bytes(const TmAttentionJob& job) const {
  const AttentionHeads heads = {job.num_heads, job.num_kv_heads, job.head_size, is_free_};
  const size_t least = least_chunk_bytes(std::min(job.tokens, job.longest_document), heads);
  const size_t best = best_chunk_bytes(job.tokens, job.longest_document, heads);
  const size_t room = kWorkspaceLimit - kChunkSlack - kAlign;
  const size_t forward_tables = kRaggedTensors * 2 * (job.tokens + kAlign) * sizeof(int32_t);
  if (job.has_backward == 0 || least > room) return kChunkSlack + forward_tables + kAlign;
  return std::max(least, std::min(best, room)) + kChunkSlack + kAlign;
}

// What needs no plan to be known.
bool CudnnAttentionOnCard::has_fit_form(const Call& call) {
  const TmAttention& a = call.forward;
  const size_t widest = major_ == 9 ? 256 : 128;
  if (a.head_size % 8 != 0 || a.head_size > widest) return refuse("head size");
  if (a.num_documents == 0 || a.n == 0 || a.scratch == nullptr) return refuse("empty call");
  const int32_t* starts = a.host_document_starts;
  if (starts == nullptr || starts[0] != 0 || static_cast<size_t>(starts[a.num_documents]) != a.n ||
      !std::is_sorted(starts, starts + a.num_documents + 1)) {
    return refuse("documents that do not span the tokens");  // the own kernels tell of it
  }
  if (a.num_kv_heads == 0 || a.num_heads % a.num_kv_heads != 0) return refuse("heads");
  for (const CallTensor& tensor : tensors_of(call)) {
    if (tensor.rows == nullptr || tensor.element_bytes != kElementBytes) continue;
    if (tensor.stride % 8 != 0 || reinterpret_cast<uintptr_t>(tensor.rows) % 16 != 0) {
      return refuse("rows that are not a multiple of 16 bytes");
    }
    if (a.n * tensor.stride > INT32_MAX) return refuse("rows beyond 2^31 elements");
  }
  return true;
}

bool CudnnAttentionOnCard::prepare(const Call& call) {
  steps_.clear();
  ++call_;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream_, &status));
  is_recording_ = status != cudaStreamCaptureStatusNone;
  if (!has_fit_form(call)) return false;
  const TmAttention& a = call.forward;
  const DocumentSpans documents = {a.host_document_starts, a.num_documents};
  const size_t room = Scratch(a).left();
  if (call.backward == nullptr) {
    if (!find_plans(call, forward_chunks(documents, heads_of(a)))) return false;
    return largest_step(call) <= room || refuse("scratch too small for the forward");
  }
  // cuDNN may want more than chunk_bytes() knows of: then in smaller chunks.
  size_t bytes = room > kChunkSlack ? room - kChunkSlack : 0;
  for (;; bytes = bytes / 4 * 3) {
    const auto chunks = backward_chunks(documents, heads_of(a), bytes);
    if (chunks.empty()) return refuse("a document is too long for the scratch");
    if (!find_plans(call, chunks)) return false;
    if (largest_step(call) <= room) return true;
  }
}

bool CudnnAttentionOnCard::find_plans(const Call& call, const std::vector<AttentionChunk>& chunks) {
  steps_.clear();
  for (const AttentionChunk& chunk : chunks) {
    if (chunk_tokens(call, chunk) == 0) continue;
    if (chunk.ragged && major_ != 9 && major_ != 10)
      return refuse("unequal documents on this card");
    AttentionShape shape = shape_of(call, chunk);
    shape.is_free = is_free_ && shape.backward;
    Plan* const plan = plan_for(shape);
    if (plan->graph == nullptr) return refuse(plan->refusal);
    steps_.push_back({chunk, plan});
  }
  return true;
}

Plan* CudnnAttentionOnCard::plan_for(const AttentionShape& shape) {
  const auto found = std::find_if(plans_.begin(), plans_.end(),
                                  [&](const auto& plan) { return plan->shape == shape; });
  if (found != plans_.end()) {
    (*found)->last_call = call_;
    return found->get();
  }
  if (is_recording_) {
    throw CudaFailure(TM_BAD_ARGUMENT, "attention of cuDNN: a plan is not built while recording");
  }
  if (plans_.size() >= kMostPlans) evict_oldest();
  auto plan = std::make_unique<Plan>();
  plan->shape = shape;
  plan->last_call = call_;
  plan->graph = CudnnGraph::build(library_.handle(), shape, &plan->refusal);
  if (plan->graph != nullptr) {
    largest_workspace_ = std::max(largest_workspace_, plan->graph->workspace_bytes());
  }
  plans_.push_back(std::move(plan));
  return plans_.back().get();
}

// Never one of the call at hand, nor one that was recorded: a call of very many shapes may keep
// more than kMostPlans.
void CudnnAttentionOnCard::evict_oldest() {
  const auto oldest =
      std::min_element(plans_.begin(), plans_.end(), [](const auto& a, const auto& b) {
        return std::pair(a->is_recorded, a->last_call) < std::pair(b->is_recorded, b->last_call);
      });
  if ((*oldest)->is_recorded || (*oldest)->last_call == call_) return;
  CUDA_CHECK(cudaStreamSynchronize(stream_));  // its kernels may still run
  plans_.erase(oldest);
}

size_t CudnnAttentionOnCard::largest_step(const Call& call) const {
  size_t largest = 0;
  for (const Step& step : steps_) {
    const size_t bytes = table_bytes(step.chunk, call) + step.plan->graph->workspace_bytes();
    largest = std::max(largest, bytes);
  }
  return largest;
}

bool CudnnAttentionOnCard::run(const Call& call) {
  if (!prepare(call)) return false;
  if (is_recording_) check_recordable(call);
  for (const Step& step : steps_) {
    if (!run_step(call, step)) return false;
  }
  return true;
}

// What the host knows of the documents goes into a capture only where it is the same for all calls
// of one attention_key: their number and length where they are equal, else that they are one chunk.
void CudnnAttentionOnCard::check_recordable(const Call& call) {
  for (const Step& step : steps_) {
    if (step.chunk.ragged && !covers_all(call, step.chunk)) {
      throw CudaFailure(TM_BAD_ARGUMENT, "attention of cuDNN: unequal documents in several chunks");
    }
    if (call.backward != nullptr && !step.plan->is_checked) {
      throw CudaFailure(TM_BAD_ARGUMENT, "attention of cuDNN: a plan is not checked yet");
    }
    step.plan->is_recorded = true;
  }
}

// Where a chunk's first row and head lie.
void* chunk_rows(const Call& call, const AttentionChunk& chunk, const CallTensor& tensor) {
  const TmAttention& a = call.forward;
  const size_t first_row = static_cast<size_t>(a.host_document_starts[chunk.first_document]);
  const size_t ratio = tensor.is_per_kv_head ? 1 : a.num_heads / a.num_kv_heads;
  const size_t elements =
      first_row * tensor.stride + chunk.first_kv_head * ratio * tensor.head_width;
  return static_cast<char*>(tensor.rows) + elements * tensor.element_bytes;
}

bool CudnnAttentionOnCard::run_step(const Call& call, const Step& step) {
  AttentionPointers pointers;
  const auto tensors = tensors_of(call);
  for (size_t i = 0; i < kAttentionTensors; ++i) {
    if (tensors[i].rows != nullptr) pointers.tensors[i] = chunk_rows(call, step.chunk, tensors[i]);
  }
  Scratch scratch(call.forward);
  const bool is_narrow = has_narrow_rows(call, step.chunk);
  if (is_narrow) {
    const size_t width = step.chunk.num_kv_heads * call.forward.head_size;
    const size_t bytes = chunk_tokens(call, step.chunk) * width * kElementBytes;
    pointers.tensors[kDk] = scratch.take<char>(bytes);
    pointers.tensors[kDv] = scratch.take<char>(bytes);
  }
  if (step.chunk.ragged) {
    fill_tables(call, step, scratch, pointers);
  } else if (call.backward != nullptr) {
    lay_out_lse(call, step, scratch, pointers);
  }
  void* const workspace = scratch.take<char>(0);
  const std::string error = step.plan->graph->run(library_.handle(), pointers, workspace);
  if (!error.empty()) throw CudaFailure(TM_DEVICE_ERROR, "attention of cuDNN: " + error);
  CUDA_CHECK(cudaPeekAtLastError());
  if (is_narrow) copy_narrow_rows(call, step, pointers);
  if (call.backward == nullptr || step.plan->is_checked) return true;
  return check_gradients(call, step);
}

void CudnnAttentionOnCard::copy_narrow_rows(const Call& call, const Step& step,
                                            const AttentionPointers& narrow) {
  const auto tensors = tensors_of(call);
  const size_t width = step.chunk.num_kv_heads * call.forward.head_size * kElementBytes;
  for (const size_t i : {kDk, kDv}) {
    CUDA_CHECK(cudaMemcpy2DAsync(chunk_rows(call, step.chunk, tensors[i]),
                                 tensors[i].stride * kElementBytes, narrow.tensors[i], width, width,
                                 chunk_tokens(call, step.chunk), cudaMemcpyDeviceToDevice,
                                 stream_));
  }
}

void CudnnAttentionOnCard::lay_out_lse(const Call& call, const Step& step, Scratch& scratch,
                                       AttentionPointers& pointers) {
  const AttentionChunk& chunk = step.chunk;
  const size_t heads = static_cast<size_t>(step.plan->shape.num_heads);
  float* const lse = scratch.take<float>(chunk.batch * heads * chunk.length);
  make_head_major({static_cast<const float*>(pointers.tensors[kLse]), call.forward.num_heads, lse,
                   chunk.batch, heads, chunk.length},
                  stream_);
  pointers.tensors[kLse] = lse;
}

void CudnnAttentionOnCard::fill_tables(const Call& call, const Step& step, Scratch& scratch,
                                       AttentionPointers& pointers) {
  const AttentionChunk& chunk = step.chunk;
  RaggedTables tables = {};
  tables.starts = call.forward.document_starts + chunk.first_document;
  tables.num_documents = static_cast<int>(chunk.num_documents);
  tables.batch = static_cast<int>(chunk.batch);
  const size_t padded = std::min(chunk.batch, call.forward.padded_documents);
  if (covers_all(call, chunk) && padded > chunk.num_documents) {
    tables.num_documents = static_cast<int>(padded);
  }
  const auto tensors = tensors_of(call);
  for (size_t i = 0; i < kAttentionTensors; ++i) {
    if (tensors[i].rows == nullptr) continue;
    tables.strides[i] = static_cast<int32_t>(tensors[i].stride);
    tables.offsets[i] = scratch.take<int32_t>(chunk.batch + 1);
    pointers.offsets[i] = tables.offsets[i];
  }
  if (has_narrow_rows(call, chunk)) {
    tables.strides[kDk] = tables.strides[kDv] = static_cast<int32_t>(step.plan->shape.dk_stride);
  }
  tables.lengths = scratch.take<int32_t>(chunk.batch);
  pointers.lengths = tables.lengths;
  fill_ragged_tables(tables, stream_);
}

// Some versions of cuDNN answer nothing but zeros for some ragged shapes. A plan's first gradients
// that cannot all be zero tell; a plan that fails is not used again.
bool CudnnAttentionOnCard::check_gradients(const Call& call, const Step& step) {
  const AttentionChunk& chunk = step.chunk;
  const auto tensors = tensors_of(call);
  const size_t rows = chunk_tokens(call, chunk);
  const size_t width = static_cast<size_t>(step.plan->shape.head_size);
  const size_t heads = static_cast<size_t>(step.plan->shape.num_heads);
  Scratch scratch(call.forward);
  uint32_t* const flags = scratch.take<uint32_t>(2);
  CUDA_CHECK(cudaMemsetAsync(flags, 0, 2 * sizeof(uint32_t), stream_));
  find_nonzero({chunk_rows(call, chunk, tensors[kDout]), rows, heads * width, tensors[kDout].stride,
                &flags[0]},
               stream_);
  find_nonzero({chunk_rows(call, chunk, tensors[kDv]), rows, chunk.num_kv_heads * width,
                tensors[kDv].stride, &flags[1]},
               stream_);
  uint32_t found[2] = {};
  CUDA_CHECK(cudaMemcpyAsync(found, flags, sizeof(found), cudaMemcpyDeviceToHost, stream_));
  CUDA_CHECK(cudaStreamSynchronize(stream_));
  if (found[0] == 0) return true;  // tells nothing: the next run is looked at
  if (found[1] != 0) {
    step.plan->is_checked = true;
    return true;
  }
  step.plan->graph.reset();
  step.plan->refusal = "cuDNN " + version() + " answers only zeros for " +
                       std::to_string(chunk.batch) + " documents of up to " +
                       std::to_string(chunk.length) + " tokens";
  return refuse(step.plan->refusal);
}

}  // namespace

std::unique_ptr<CudnnAttention> CudnnAttention::open(const Options& options, std::string* why) try {
  return std::make_unique<CudnnAttentionOnCard>(options);
} catch (const CudaFailure& failure) {
  *why = failure.what();
  return nullptr;
}

}  // namespace tunemesh::cuda
