// Copies between the card's memory and page-locked host memory on a stream of their own, in order,
// beside the operations' stream.
#pragma once
#include "kernels/backend.h"
#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {

class SideCopies {
 public:
  // Starts after all that `operations` has been given, unless it is at_once.
  void start(const TmSideCopy& copy, cudaStream_t operations);
  // What `operations` is given from here on waits for the lane's last copy.
  void await(size_t lane, cudaStream_t operations);
  // The host waits for it.
  void finish(size_t lane);

 private:
  Stream stream_;
  Event given_;
  Event ended_[TM_COPY_LANES];
};

void fill_side_copies(TmBackend& backend);

}  // namespace tunemesh::cuda
