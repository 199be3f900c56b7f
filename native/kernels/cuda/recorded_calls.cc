#include "kernels/cuda/recorded_calls.h"

#include <utility>

#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {

GraphExec::GraphExec(cudaGraph_t captured) {
  cudaError_t error = cudaGraphGetNodes(captured, nullptr, &num_nodes_);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&exec_, captured, 0);
  cudaGraphDestroy(captured);
  CUDA_CHECK(error);
}

GraphExec::~GraphExec() {
  if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
}

GraphExec::GraphExec(GraphExec&& other) noexcept
    : exec_(std::exchange(other.exec_, nullptr)), num_nodes_(std::exchange(other.num_nodes_, 0)) {}

GraphExec& GraphExec::operator=(GraphExec&& other) noexcept {
  std::swap(exec_, other.exec_);
  std::swap(num_nodes_, other.num_nodes_);
  return *this;
}

void GraphExec::launch(cudaStream_t stream) const { CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

TmCallsAction RecordedCalls::begin(const TmCallsKey& key) {
  if (is_recording()) {
    throw CudaFailure(TM_BAD_ARGUMENT, "calls_begin: a part is being recorded already");
  }
  if (key.num_words > kMostKeyWords) {
    throw CudaFailure(TM_BAD_ARGUMENT, "calls_begin: a key of " + std::to_string(key.num_words) +
                                           " words; at most " + std::to_string(kMostKeyWords));
  }
  Entry& entry = entries_[std::vector<uint64_t>(key.words, key.words + key.num_words)];
  if (entry.graph) {
    entry.graph.launch(stream_);
    return TM_CALLS_DONE;
  }
  if (!std::exchange(entry.is_known, true) || entry.num_failures >= kMostFailures) {
    return TM_CALLS_RUN;
  }
  // Relaxed: other threads may copy between host and device, and libraries load what they need.
  CUDA_CHECK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed));
  recording_ = &entry;
  return TM_CALLS_RECORD;
}

std::string RecordedCalls::end(bool is_whole) {
  if (!is_recording()) throw CudaFailure(TM_BAD_ARGUMENT, "calls_end: nothing is being recorded");
  Entry& entry = *std::exchange(recording_, nullptr);
  cudaGraph_t captured = nullptr;
  const cudaError_t error = cudaStreamEndCapture(stream_, &captured);
  if (error != cudaSuccess || !is_whole) {
    cudaGetLastError();
    if (captured != nullptr) cudaGraphDestroy(captured);
    ++entry.num_failures;
    return error == cudaSuccess ? "a call failed" : cudaGetErrorString(error);
  }
  try {
    entry.graph = GraphExec(captured);
  } catch (const CudaFailure& failure) {
    ++entry.num_failures;
    return failure.what();
  }
  num_nodes_ += entry.graph.num_nodes();
  entry.graph.launch(stream_);
  return "";
}

void RecordedCalls::forget() {
  if (is_recording()) throw CudaFailure(TM_BAD_ARGUMENT, "calls_forget: a part is being recorded");
  entries_.clear();
  num_nodes_ = 0;
}

}  // namespace tunemesh::cuda
