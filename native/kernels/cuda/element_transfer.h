// bfloat16 elements of a device as floats in host memory, and back.
//
// Both ways go through two page-locked pieces: the host converts one while the other is on its way,
// so that a model of any size loads with bounded memory. A piece is converted by several threads:
// one alone is slower than the bus.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {

class ElementTransfer {
 public:
  ElementTransfer() = default;
  ElementTransfer(const ElementTransfer&) = delete;
  ElementTransfer& operator=(const ElementTransfer&) = delete;

  // Rounds to nearest even. Returns when the host's floats may change; the copies may still be
  // under way on the stream.
  void send(const float* host, size_t count, void* elements, cudaStream_t stream);
  // Returns when all floats are there.
  void fetch(float* host, size_t count, const void* elements, cudaStream_t stream);

 private:
  struct Piece {
    Piece();
    PinnedBuffer memory;
    Event passed;  // the stream has done with the memory
    uint16_t* data() const { return static_cast<uint16_t*>(memory.data()); }
  };
  Piece pieces_[2];
};

}  // namespace tunemesh::cuda
