// Times operations of the CUDA backend: wall clock around as many launches as take a tenth of a
// second, median of five.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace tunemesh::bench {

constexpr size_t kTokens = 8192;
constexpr double kCopyRate = 3.03e12;  // bytes a second that an H100 SXM copies, both ways added
constexpr int kRounds = 5;
constexpr double kRoundSeconds = 0.1;

inline double now() {
  const auto elapsed = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(elapsed).count();
}

class Bench {
 public:
  Bench(const TmBackend* backend, TmContext* context, std::string only)
      : backend_(*backend), context_(context), only_(std::move(only)) {
    pattern_.resize(size_t{16} << 20);
    uint32_t state = 1;
    for (uint16_t& half : pattern_) {
      state = state * 1664525 + 1013904223;
      // Either sign, magnitudes of [0.25, 2): zeros would draw less power.
      half = static_cast<uint16_t>((state >> 16 & 0x8000) | (0x3e80 + (state >> 8 & 0xffff) % 384));
    }
  }

  const TmBackend& ops() const { return backend_; }
  TmContext* context() const { return context_; }
  size_t element_bytes() const { return backend_.element_bytes(context_); }

  void check(TmStatus status) const {
    if (status == TM_OK) return;
    fprintf(stderr, "status %d: %s\n", status, backend_.last_error());
    exit(1);
  }

  // Device memory with a pattern that is sound as bf16 and as float; lives until release_all.
  void* memory(size_t bytes) {
    void* memory = nullptr;
    check(backend_.allocate(context_, bytes, &memory));
    buffers_.push_back(memory);
    const size_t most = pattern_.size() * sizeof(uint16_t);
    for (size_t done = 0; done < bytes; done += most) {
      const size_t part = std::min(most, bytes - done);
      check(backend_.copy_in(context_, static_cast<char*>(memory) + done, pattern_.data(), part));
    }
    return memory;
  }
  TmElement* elements(size_t count) {
    return static_cast<TmElement*>(memory(count * element_bytes()));
  }
  float* floats(size_t count) { return static_cast<float*>(memory(count * sizeof(float))); }
  int32_t* indices(size_t count, size_t limit) {
    std::vector<int32_t> values(count);
    for (size_t i = 0; i < count; ++i) {
      values[i] = static_cast<int32_t>(i * 2654435761u % limit);
    }
    void* device = memory(count * sizeof(int32_t));
    check(backend_.copy_in(context_, device, values.data(), count * sizeof(int32_t)));
    return static_cast<int32_t*>(device);
  }
  void release_all() {
    for (void* buffer : buffers_) backend_.release(context_, buffer);
    buffers_.clear();
  }

  bool wants(const std::string& name) const { return name.find(only_) != std::string::npos; }

  double seconds_of(const std::function<TmStatus()>& call) const {
    for (int i = 0; i < 3; ++i) check(call());
    check(backend_.synchronize(context_));
    std::vector<double> times;
    size_t launches = 1;
    while (times.size() < kRounds) {
      const double start = now();
      for (size_t i = 0; i < launches; ++i) check(call());
      check(backend_.synchronize(context_));
      const double seconds = now() - start;
      if (seconds < kRoundSeconds / 2) {
        launches = std::max(launches + 1, static_cast<size_t>(static_cast<double>(launches) *
                                                              kRoundSeconds / seconds));
        continue;
      }
      times.push_back(seconds / static_cast<double>(launches));
    }
    std::sort(times.begin(), times.end());
    return times[kRounds / 2];
  }

  void memory_bound(const std::string& name, double bytes, const std::function<TmStatus()>& call) {
    const double seconds = seconds_of(call);
    printf("%-34s %9.1f us  %6.3f TB/s  %5.1f %% of copy\n", name.c_str(), seconds * 1e6,
           bytes / seconds * 1e-12, 100 * bytes / seconds / kCopyRate);
    fflush(stdout);
  }
  void product(const std::string& name, double flops, const std::function<TmStatus()>& call) {
    const double seconds = seconds_of(call);
    printf("%-34s %9.1f us  %6.1f TFLOP/s\n", name.c_str(), seconds * 1e6, flops / seconds * 1e-12);
    fflush(stdout);
  }

 private:
  const TmBackend& backend_;
  TmContext* context_;
  std::string only_;
  std::vector<uint16_t> pattern_;
  std::vector<void*> buffers_;
};

}  // namespace tunemesh::bench
