#include "kernels/cuda/context.h"

#include <algorithm>
#include <cstring>

#include "kernels/cuda/card_memory.h"
#include "kernels/cuda/card_refusals.h"
#include "kernels/cuda/round_and_add.cuh"

using tunemesh::cuda::CudaFailure;
using tunemesh::cuda::DeviceFault;
using tunemesh::cuda::FaultKind;

namespace {

constexpr size_t kHostBytes = 64;
constexpr size_t kBlockElements = 256;
// Blocks of a host's accumulator that visit the device at once: 8 MiB.
constexpr size_t kStagedBlocks = 4096;
static_assert(sizeof(DeviceFault) <= kHostBytes);

using tunemesh::cuda::cuda_text;

// Refuses an index that is not there and a card that is too old, by name.
cudaDeviceProp select_device(int index) {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    cudaGetLastError();
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const std::string refused = tunemesh::cuda::refused_driver(driver, runtime);
    if (!refused.empty()) throw CudaFailure(TM_DEVICE_ERROR, "no CUDA device: " + refused);
    throw CudaFailure(
        TM_DEVICE_ERROR,
        std::string("no CUDA device: ") +
            (error != cudaSuccess ? cudaGetErrorString(error) : "none is visible") +
            "; the driver is for CUDA " + cuda_text(driver) +
            ". Use the CPU, or see that nvidia-smi lists a card and CUDA_VISIBLE_DEVICES does "
            "not hide it");
  }
  if (index < 0 || index >= num_devices) {
    throw CudaFailure(TM_BAD_ARGUMENT, "device " + std::to_string(index) + " is not there; this " +
                                           "machine shows " + std::to_string(num_devices));
  }
  tunemesh::cuda::select_and_measure(index);
  cudaDeviceProp properties{};
  CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  const std::string refused =
      tunemesh::cuda::refused_card(properties.name, properties.major, properties.minor);
  if (!refused.empty()) throw CudaFailure(TM_BAD_ARGUMENT, refused);
  return properties;
}

std::string folder_of(const TmContextOptions& options) {
  return options.library_folder != nullptr ? options.library_folder : "";
}

std::string text_of(const DeviceFault& fault) {
  static const char* const names[] = {"gather", "scatter", "cross_entropy", "attention"};
  const std::string name = names[static_cast<int>(fault.operation)];
  const auto number = [](long long value) { return std::to_string(value); };
  if (fault.kind == FaultKind::kIndex) {
    return name + ": index " + number(fault.value) + " at position " + number(fault.position) +
           " is not within [0, " + number(fault.limit) + ")";
  }
  if (fault.kind == FaultKind::kDocumentSpan) {
    return name + ": documents span [" + number(fault.position) + ", " + number(fault.value) +
           "), expected [0, " + number(fault.limit) + ")";
  }
  return name + ": document " + number(fault.position) + " starts at " + number(fault.limit) +
         " and ends at " + number(fault.value);
}

constexpr const char* kOwnAttention =
    "The plugin's own attention serves, without tensor cores: many times slower, the more so the "
    "longer documents are.";

}  // namespace

TmContext::TmContext(const TmContextOptions& options)
    : device_((select_device(options.device_index), options.device_index)),
      precision_(options.precision == TM_FP32 ? TM_FP32 : TM_BF16),
      free_at_start_(tunemesh::cuda::free_device_bytes()),
      fault_(sizeof(DeviceFault)),
      outcome_(sizeof(unsigned long long)),
      staging_(kStagedBlocks * kBlockElements * sizeof(int64_t)),
      host_(kHostBytes),
      gemm_(std::make_unique<tunemesh::cuda::Gemm>(precision_, folder_of(options))),
      recorded_(stream()) {
  cudaDeviceProp properties{};
  int driver = 0;
  CUDA_CHECK(cudaGetDeviceProperties(&properties, device_));
  CUDA_CHECK(cudaDriverGetVersion(&driver));
  std::string attention, why;
  if (precision_ == TM_BF16) {
    const bool is_free = options.is_free != 0;
    cudnn_ = tunemesh::cuda::CudnnAttention::open({folder_of(options), stream(), is_free}, &why);
    attention = cudnn_ == nullptr
                    ? ", no cuDNN"
                    : ", cuDNN " + cudnn_->version() + (is_free ? " (free mode)" : "");
    if (cudnn_ == nullptr) {
      notes_.add("no cuDNN", "attention runs without cuDNN: " + why + ". " + kOwnAttention +
                                 " Install it: tunemesh doctor --install-libs DIR.");
    }
  }
  const std::string card = std::string(properties.name) + " (sm_" +
                           std::to_string(properties.major) + std::to_string(properties.minor) +
                           ")";
  const bool has_fp8 = options.precision == TM_FP8;
  if (has_fp8) {
    fp8_gemm_ = std::make_unique<tunemesh::cuda::Fp8Gemm>(*gemm_, card);
  }
  instruction_path_ = card + ", cuBLASLt " + gemm_->library().version() + attention +
                      (precision_ == TM_BF16 ? ", bf16" : "") +
                      (has_fp8 ? " with an fp8 base" : "");
  description_ = "cuda: " + instruction_path_ + ", driver CUDA " + cuda_text(driver);
  memory_bytes_ = properties.totalGlobalMem;
  CUDA_CHECK(cudaMemsetAsync(fault_.data(), 0, fault_.bytes(), stream()));
  CUDA_CHECK(cudaStreamSynchronize(stream()));
  const size_t free_now = tunemesh::cuda::free_device_bytes();
  opened_bytes_ = free_at_start_ - std::min(free_at_start_, free_now);
}

size_t TmContext::overhead_bytes() const {
  return tunemesh::cuda::context_bytes(device_) + opened_bytes_ + tunemesh::cuda::kLazyModuleBytes;
}

size_t TmContext::workspace_bytes() const {
  return fault_.bytes() + outcome_.bytes() + staging_.bytes() + gemm_->workspace_bytes();
}

void TmContext::note_own_attention(const char* direction, const TmAttention& args) {
  const auto number = [](size_t value) { return std::to_string(value); };
  const std::string shape = std::string(direction) + " of " + number(args.num_heads) +
                            " query and " + number(args.num_kv_heads) +
                            " key/value heads of size " + number(args.head_size);
  const std::string about = shape + cudnn_->refusal();
  notes_.add(about, "attention " + shape + ", " + number(args.n) + " tokens in " +
                        number(args.num_documents) + " documents: cuDNN " + cudnn_->version() +
                        " does not serve it (" + cudnn_->refusal() + "). " + kOwnAttention);
}

tunemesh::cuda::ElementTransfer& TmContext::transfer() {
  if (!transfer_) transfer_ = std::make_unique<tunemesh::cuda::ElementTransfer>();
  return *transfer_;
}

tunemesh::cuda::SideCopies& TmContext::side_copies() {
  if (!side_copies_) side_copies_ = std::make_unique<tunemesh::cuda::SideCopies>();
  return *side_copies_;
}

void TmContext::enter() {
  if (!failure_.empty()) throw CudaFailure(TM_DEVICE_ERROR, failure_);
  CUDA_CHECK(cudaSetDevice(device_));
  tunemesh::cuda::check_launches_of_thread(is_checked_);
}

void TmContext::check_operation() {
  CUDA_CHECK(cudaDeviceSynchronize());
  wait();
}

void TmContext::wait() {
  if (is_recording()) {
    throw CudaFailure(TM_BAD_ARGUMENT, "recorded calls can't wait for the device");
  }
  auto* found = static_cast<DeviceFault*>(host_.data());
  CUDA_CHECK(
      cudaMemcpyAsync(found, fault(), sizeof(DeviceFault), cudaMemcpyDeviceToHost, stream()));
  CUDA_CHECK(cudaStreamSynchronize(stream()));
  if (found->kind == FaultKind::kNone) return;
  CUDA_CHECK(cudaMemsetAsync(fault_.data(), 0, fault_.bytes(), stream()));
  throw CudaFailure(TM_BAD_ARGUMENT, text_of(*found));
}

TmCallsAction TmContext::begin_calls(const TmCallsKey& key) {
#ifdef TUNEMESH_SYNC_LAUNCHES
  static_cast<void>(key);
  return TM_CALLS_RUN;
#else
  if (is_checked_) return TM_CALLS_RUN;
  if (recorded_.is_full()) forget_calls();
  return recorded_.begin(key);
#endif
}

void TmContext::forget_calls() {
  CUDA_CHECK(cudaStreamSynchronize(stream()));
  recorded_.forget();
  if (cudnn_ != nullptr) cudnn_->forget_recorded();
}

void TmContext::copy_in(void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  if (is_recording()) {
    throw CudaFailure(TM_BAD_ARGUMENT, "recorded calls can't read the host's memory");
  }
  if (small_copies_.send(device, host, bytes, stream())) return;
  CUDA_CHECK(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream()));
  wait();
}

void TmContext::copy_out(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  if (is_recording()) {
    throw CudaFailure(TM_BAD_ARGUMENT, "recorded calls can't write the host's memory");
  }
  const bool is_small = bytes <= tunemesh::cuda::SmallCopies::kMostBytes;
  void* const to = is_small ? small_copies_.landing() : host;
  CUDA_CHECK(cudaMemcpyAsync(to, device, bytes, cudaMemcpyDeviceToHost, stream()));
  wait();
  if (is_small) memcpy(host, to, bytes);
}

TmStatus TmContext::round_and_add(const TmRoundAndAdd& args) {
  cudaPointerAttributes attributes{};
  CUDA_CHECK(cudaPointerGetAttributes(&attributes, args.accumulator));
  if (attributes.type != cudaMemoryTypeUnregistered) return round_on_device(args);
  TmRoundAndAdd part = args;
  part.accumulator = static_cast<int64_t*>(staging_.data());
  for (size_t done = 0; done < args.num_blocks; done += part.num_blocks) {
    part.num_blocks = std::min(args.num_blocks - done, kStagedBlocks);
    part.gradient = args.gradient + done * kBlockElements;
    int64_t* host = args.accumulator + done * kBlockElements;
    const size_t bytes = part.num_blocks * kBlockElements * sizeof(int64_t);
    CUDA_CHECK(cudaMemcpyAsync(part.accumulator, host, bytes, cudaMemcpyHostToDevice, stream()));
    const TmStatus status = round_on_device(part);
    if (status != TM_OK && args.bad_block != nullptr) *args.bad_block += done;
    if (status != TM_OK) return status;
    CUDA_CHECK(cudaMemcpyAsync(host, part.accumulator, bytes, cudaMemcpyDeviceToHost, stream()));
  }
  CUDA_CHECK(cudaStreamSynchronize(stream()));
  return TM_OK;
}

TmStatus TmContext::round_on_device(const TmRoundAndAdd& args) {
  auto* outcome = static_cast<uint64_t*>(outcome_.data());
  CUDA_CHECK(cudaMemsetAsync(outcome, 0, sizeof *outcome, stream()));
  tunemesh::cuda::round_blocks(
      {args.gradient, args.accumulator, args.num_blocks, args.significant_bits, 0, 0, outcome},
      stream());
  auto* found = static_cast<uint64_t*>(host_.data());
  CUDA_CHECK(cudaMemcpyAsync(found, outcome, sizeof *found, cudaMemcpyDeviceToHost, stream()));
  CUDA_CHECK(cudaStreamSynchronize(stream()));
  if (*found == 0) return TM_OK;
  if (args.bad_block != nullptr) *args.bad_block = static_cast<size_t>(~*found >> 8);
  return static_cast<TmStatus>(~*found & 0xff);
}
