#include "engine/arena.h"

#include <cstring>

namespace tunemesh {
namespace {
constexpr size_t kAlignment = 64;
}

Arena::~Arena() {
  if (base_ == nullptr) return;
  (is_host_ ? device_.ops().release_host : device_.ops().release)(device_.context(), base_);
}

void* Arena::take_bytes(const std::string& purpose, size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (is_sealed_) {
    throw EngineError("INTERNAL", "a reservation of " + std::to_string(bytes) + " bytes for " +
                                      purpose + " came after the arena was sealed at " +
                                      std::to_string(total_bytes_) + " bytes.");
  }
  if (base_ == nullptr) {
    if (rounded == 0) return nullptr;
    total_bytes_ += rounded;
    for (MemoryUse& use : uses_) {
      if (use.purpose != purpose) continue;
      use.size_bytes += rounded;
      return nullptr;
    }
    uses_.push_back({purpose, rounded});
    return nullptr;
  }
  if (rounded > total_bytes_ - handed_out_) {
    throw EngineError("INTERNAL", "the plan of " + std::to_string(total_bytes_) +
                                      " bytes has no room for " + std::to_string(bytes) +
                                      " bytes of " + purpose + ".");
  }
  char* found = base_ + handed_out_;
  handed_out_ += rounded;
  return rounded == 0 ? nullptr : found;
}

void Arena::allocate() {
  void* memory = nullptr;
  if (is_host_) {
    TM_RUN(device_, allocate_host, total_bytes_, &memory);
    base_ = static_cast<char*>(memory);
    std::memset(base_, 0, total_bytes_);
    return;
  }
  TM_RUN(device_, allocate, total_bytes_, &memory);
  base_ = static_cast<char*>(memory);
  TM_RUN(device_, fill_zero, base_, total_bytes_);
}

void Arena::seal() {
  if (base_ == nullptr || handed_out_ != total_bytes_) {
    throw EngineError("INTERNAL", "the plan says " + std::to_string(total_bytes_) + " bytes, " +
                                      std::to_string(handed_out_) + " were taken.");
  }
  is_sealed_ = true;
}

}  // namespace tunemesh
