// One card and its stream. Calls come from one thread at a time.
#pragma once
#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/column_sum.cuh"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/element_transfer.h"
#include "kernels/cuda/fault.cuh"
#include "kernels/cuda/fp8_gemm.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/notes.h"
#include "kernels/cuda/recorded_calls.h"
#include "kernels/cuda/side_copies.h"
#include "kernels/cuda/small_copies.h"

struct TmContext {
  explicit TmContext(const TmContextOptions& options);
  ~TmContext() = default;

  cudaStream_t stream() const { return stream_.get(); }
  tunemesh::cuda::DeviceFault* fault() const {
    return static_cast<tunemesh::cuda::DeviceFault*>(fault_.data());
  }
  // Of the elements: TM_FP32 or TM_BF16.
  TmPrecision precision() const { return precision_; }
  bool has_fp8_base() const { return fp8_gemm_ != nullptr; }
  tunemesh::cuda::Gemm& gemm() { return *gemm_; }
  tunemesh::cuda::Fp8Gemm& fp8_gemm() { return *fp8_gemm_; }  // with has_fp8_base()
  // Of one call: the products' workspace.
  tunemesh::cuda::Scratch scratch() const {
    return {static_cast<float*>(gemm_->workspace()),
            tunemesh::cuda::kGemmWorkspaceBytes / sizeof(float)};
  }
  // Null in float32 and where there is no cuDNN: the own attention then serves.
  tunemesh::cuda::CudnnAttention* cudnn() { return cudnn_.get(); }
  // Made when first used; bfloat16 only.
  tunemesh::cuda::ElementTransfer& transfer();
  tunemesh::cuda::SideCopies& side_copies();  // made when first used
  const std::string& description() const { return description_; }
  // Card, its architecture, the libraries' versions and the elements: all that bits depend on.
  const std::string& instruction_path() const { return instruction_path_; }
  size_t memory_bytes() const { return memory_bytes_; }
  // What the card holds for this process beside the buffers that an engine takes: the context, what
  // opening took (libraries, workspaces, measured), and an allowance for what is loaded later.
  size_t overhead_bytes() const;
  // Of it, the buffers that products and the exchange work in.
  size_t workspace_bytes() const;

  // Makes this the thread's device; throws again where the device has failed before.
  void enter();
  void fail(const std::string& message) { failure_ = message; }
  // Checked: every launch is waited for, and so is the end of each operation.
  bool is_checked() const { return is_checked_; }
  void set_checked(bool is_checked) { is_checked_ = is_checked; }
  // Waits for everything that the device was given, copies beside the stream included.
  void check_operation();
  tunemesh::cuda::Notes& notes() { return notes_; }
  // cuDNN did not serve an attention: told once a shape, with cuDNN's words.
  void note_own_attention(const char* direction, const TmAttention& args);
  // Waits for the stream. Throws TM_BAD_ARGUMENT for a fault that a kernel recorded, and forgets
  // it; also while calls are recorded, which can't wait.
  void wait();
  // The accumulator may be any memory of the host: it is then staged. Returns when it is changed.
  TmStatus round_and_add(const TmRoundAndAdd& args);

  // A part of a step as one launch (recorded_calls.h).
  bool is_recording() const { return recorded_.is_recording(); }
  TmCallsAction begin_calls(const TmCallsKey& key);
  std::string end_calls(bool is_whole) { return recorded_.end(is_whole); }
  void forget_calls();

  // From the host, which may change its bytes once the call returns.
  void copy_in(void* device, const void* host, size_t bytes);
  // To the host; returns when it is there, and throws as wait() does.
  void copy_out(void* host, const void* device, size_t bytes);

 private:
  TmStatus round_on_device(const TmRoundAndAdd& args);

  int device_;
  TmPrecision precision_;
  std::string description_, instruction_path_, failure_;
  bool is_checked_ = false;
  tunemesh::cuda::Notes notes_;
  size_t memory_bytes_ = 0, opened_bytes_ = 0;
  size_t free_at_start_;  // before anything below is made
  // In this order: what uses the stream and the device's memory goes first.
  tunemesh::cuda::Stream stream_;
  tunemesh::cuda::DeviceBuffer fault_, outcome_, staging_;
  tunemesh::cuda::PinnedBuffer host_;  // a fault or an outcome, read back
  std::unique_ptr<tunemesh::cuda::Gemm> gemm_;
  std::unique_ptr<tunemesh::cuda::Fp8Gemm> fp8_gemm_;  // with TM_FP8
  std::unique_ptr<tunemesh::cuda::ElementTransfer> transfer_;
  std::unique_ptr<tunemesh::cuda::CudnnAttention> cudnn_;
  std::unique_ptr<tunemesh::cuda::SideCopies> side_copies_;
  tunemesh::cuda::SmallCopies small_copies_;
  tunemesh::cuda::RecordedCalls recorded_;
};
