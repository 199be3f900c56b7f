// Recorded parts of a step (calls_begin, calls_end of kernels/backend.h) as CUDA graphs: what a
// stream is given between the two is captured, instantiated once, and launched as a whole from then
// on. A launch costs the host microseconds, whatever it holds.
//
//   when    a key's first calls run directly: they build plans, load modules and pick algorithms,
//           which must not happen while a stream is captured. The second are captured
//   order   one stream's, so a graph is a chain and gives the bits of the direct calls
//   limits  kMostNodes kernels in all graphs, kMostKeys keys; a caller with ever new ones starts
//           over. A key that fails kMostFailures times runs directly from then on
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace tunemesh::cuda {

// A launch costs some hundred bytes on the host and on the card.
inline constexpr size_t kMostNodes = size_t{1} << 17;
inline constexpr size_t kMostKeys = size_t{1} << 14;
inline constexpr size_t kMostKeyWords = 64;
inline constexpr int kMostFailures = 3;

class GraphExec {
 public:
  GraphExec() = default;
  // Takes over what a capture gave. Throws where it can't be instantiated.
  explicit GraphExec(cudaGraph_t captured);
  ~GraphExec();
  GraphExec(GraphExec&& other) noexcept;
  GraphExec& operator=(GraphExec&& other) noexcept;
  explicit operator bool() const { return exec_ != nullptr; }
  size_t num_nodes() const { return num_nodes_; }
  void launch(cudaStream_t stream) const;

 private:
  cudaGraphExec_t exec_ = nullptr;
  size_t num_nodes_ = 0;
};

class RecordedCalls {
 public:
  explicit RecordedCalls(cudaStream_t stream) : stream_(stream) {}

  TmCallsAction begin(const TmCallsKey& key);
  // Empty, or why nothing has run.
  std::string end(bool is_whole);
  bool is_recording() const { return recording_ != nullptr; }
  // Are so many recorded that begin() must forget them first?
  bool is_full() const { return num_nodes_ >= kMostNodes || entries_.size() >= kMostKeys; }
  // The stream must have passed them.
  void forget();

 private:
  struct Entry {
    bool is_known = false;
    int num_failures = 0;
    GraphExec graph;
  };

  cudaStream_t stream_;
  std::map<std::vector<uint64_t>, Entry> entries_;
  Entry* recording_ = nullptr;
  size_t num_nodes_ = 0;
};

}  // namespace tunemesh::cuda
