// All memory of one purpose-built set of buffers, reserved at once.
//
// The same reserving code runs twice: on a counting arena, which gives null
// pointers and adds up bytes (that is plan()), then after allocate() on the
// real one. seal() checks that both runs agreed; a reservation after it throws.
#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/device.h"

namespace tunemesh {

struct MemoryUse {
  std::string purpose;
  size_t size_bytes;
};

class Arena {
 public:
  // kHost: host memory that the device copies to and from fast.
  enum class Place { kDevice, kHost };
  explicit Arena(const Device& device, Place place = Place::kDevice)
      : device_(device), is_host_(place == Place::kHost && !device.is_host()) {}
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(const char* purpose, size_t count) {
    return static_cast<T*>(take_bytes(purpose, count * sizeof(T)));
  }
  TmElement* take_elements(const char* purpose, size_t count) {
    return static_cast<TmElement*>(take_bytes(purpose, count * device_.element_bytes()));
  }
  // 64-byte aligned; null while counting.
  void* take_bytes(const std::string& purpose, size_t bytes);

  // Ends counting: reserves what was counted and starts handing it out from the
  // beginning. Zero-filled. DEVICE_MEMORY_SHORT says what was planned and what to change.
  void allocate();
  void seal();

  size_t total_bytes() const { return total_bytes_; }
  const std::vector<MemoryUse>& uses() const { return uses_; }

 private:
  void take_memory();

  const Device& device_;
  const bool is_host_;
  std::vector<MemoryUse> uses_;
  size_t total_bytes_ = 0;
  size_t handed_out_ = 0;
  char* base_ = nullptr;
  bool is_sealed_ = false;
};

}  // namespace tunemesh
