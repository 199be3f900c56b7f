// Buffers that share one reservation: laid one behind the other from `base`, each 64-byte aligned.
// With a null base it only counts, as the arena does while it counts.
#pragma once
#include <cstddef>

#include "engine/device.h"

namespace tunemesh {

class Region {
 public:
  Region(const Device& device, void* base) : device_(device), base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  TmElement* take_elements(size_t count) {
    return static_cast<TmElement*>(take_bytes(count * device_.element_bytes()));
  }
  void* take_bytes(size_t bytes) {
    char* const found = base_ == nullptr || bytes == 0 ? nullptr : base_ + num_bytes_;
    num_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return found;
  }
  const Device& device() const { return device_; }
  size_t num_bytes() const { return num_bytes_; }

 private:
  static constexpr size_t kAlignment = 64;
  const Device& device_;
  char* const base_;
  size_t num_bytes_ = 0;
};

}  // namespace tunemesh
