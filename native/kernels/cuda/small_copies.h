// Small copies between host and card through page-locked memory. Those from the host do not wait:
// places are used in turn, so that the caller's bytes may change at once while the card is still
// busy with what came before. Those to the host wait once, with whatever else is waited for.
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <string.h>

#include <array>
#include <memory>

#include "kernels/cuda/device_memory.h"

namespace tunemesh::cuda {

class SmallCopies {
 public:
  static constexpr size_t kMostBytes = size_t{128} << 10;
  static constexpr size_t kPlaces = 8;

  // False, and nothing done, where there are more than kMostBytes.
  bool send(void* device, const void* host, size_t bytes, cudaStream_t stream) {
    if (bytes > kMostBytes) return false;
    std::unique_ptr<Place>& place = places_[next_++ % kPlaces];
    if (place == nullptr) place = std::make_unique<Place>();
    CUDA_CHECK(cudaEventSynchronize(place->passed.get()));
    memcpy(place->memory.data(), host, bytes);
    CUDA_CHECK(
        cudaMemcpyAsync(device, place->memory.data(), bytes, cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(place->passed.get(), stream));
    return true;
  }

  // Where up to kMostBytes from the card may land, until the next call.
  void* landing() {
    if (landing_ == nullptr) landing_ = std::make_unique<PinnedBuffer>(kMostBytes);
    return landing_->data();
  }

 private:
  struct Place {
    Place() : memory(kMostBytes) {}
    PinnedBuffer memory;
    Event passed;  // the stream has done with the memory
  };
  std::array<std::unique_ptr<Place>, kPlaces> places_;
  std::unique_ptr<PinnedBuffer> landing_;
  size_t next_ = 0;
};

}  // namespace tunemesh::cuda
