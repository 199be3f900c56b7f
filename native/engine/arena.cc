#include "engine/arena.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace tunemesh {
namespace {

constexpr size_t kAlignment = 64;

std::string amount(size_t bytes) {
  char text[32];
  const double mib = static_cast<double>(bytes) / (1 << 20);
  if (mib < 1024) {
    std::snprintf(text, sizeof text, "%.1f MiB", mib);
  } else {
    std::snprintf(text, sizeof text, "%.1f GiB", mib / 1024);
  }
  return text;
}

// The backend's line says what is free; this adds what was planned, largest first.
std::string planned(std::vector<MemoryUse> uses, size_t total_bytes) {
  std::sort(uses.begin(), uses.end(),
            [](const MemoryUse& a, const MemoryUse& b) { return a.size_bytes > b.size_bytes; });
  std::string text = " Planned: " + amount(total_bytes) + " (";
  for (size_t i = 0; i < std::min<size_t>(uses.size(), 4); ++i) {
    text += (i > 0 ? ", " : "") + amount(uses[i].size_bytes) + " " + uses[i].purpose;
  }
  return text + ").";
}

constexpr const char* kOnDevice =
    " Lower per_device_train_batch_size or max_length, compute in bf16 (GPUs), or end what else "
    "takes this memory.";
constexpr const char* kOnHost = " It is the host's memory: end what else uses it.";

}  // namespace

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
  try {
    take_memory();
  } catch (const EngineError& error) {
    if (error.code() != "DEVICE_MEMORY_SHORT") throw;
    const char* remedy = is_host_ ? kOnHost : kOnDevice;
    throw EngineError(error.code(), error.what() + planned(uses_, total_bytes_) + remedy);
  }
}

void Arena::take_memory() {
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
