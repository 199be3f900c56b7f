// The CPU's table behaving as a card's does in what memory is concerned: linear groups, memory of
// its own, packed weights as plain rows, and copies beside the operations that end as late as they
// may. What reads a buffer before its copy was awaited finds what was there before.
#pragma once
#include <cstdlib>
#include <vector>

#include "host_exchange.h"
#include "host_groups.h"
#include "test_check.h"

namespace tunemesh::test {

struct LateCopies {
  std::vector<TmSideCopy> waiting;
  size_t num_started = 0;

  void start(const TmSideCopy& copy) {
    for (const TmSideCopy& other : waiting) {
      CHECK(other.lane != copy.lane, "a lane's copy starts before its last one was awaited");
    }
    waiting.push_back(copy);
    ++num_started;
  }
  // Copies run in order: whoever awaits one has those before it too.
  void await(size_t lane) {
    size_t end = waiting.size();
    while (end > 0 && waiting[end - 1].lane != lane) --end;
    for (size_t i = 0; i < end; ++i) {
      std::memcpy(waiting[i].to, waiting[i].from, waiting[i].num_bytes);
    }
    waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(end));
  }
};
inline LateCopies late_copies;

inline void add_row_major_packs(TmBackend& device) {
  device.packs_row_major = [](TmContext*) { return 1; };
  device.packed_weight_elements = [](size_t out, size_t in) { return out * in; };
  device.pack_trained_weight = device.pack_weight = [](TmContext*, const float* rows, size_t out,
                                                       size_t in, TmElement* packed) {
    std::memcpy(packed, rows, out * in * sizeof(float));
    return TM_OK;
  };
  static const auto as_rows = [](TmWeight weight) {
    if (weight.packed != nullptr) weight.rows = reinterpret_cast<const float*>(weight.packed);
    weight.packed = nullptr;
    return weight;
  };
  device.linear_forward = [](TmContext* context, const TmLinear* args) {
    TmLinear call = *args;
    call.w = as_rows(call.w);
    return tm_cpu_backend()->linear_forward(context, &call);
  };
  device.linear_backward_input = [](TmContext* context, const TmLinear* args) {
    TmLinear call = *args;
    call.w = as_rows(call.w);
    return tm_cpu_backend()->linear_backward_input(context, &call);
  };
  device.embedding_forward = [](TmContext* context, const int32_t* tokens, size_t n,
                                const TmWeight* table, TmElement* out) {
    const TmWeight rows = as_rows(*table);
    return tm_cpu_backend()->embedding_forward(context, tokens, n, &rows, out);
  };
}

// `memory_bytes` is what it says to have, all of it free.
inline size_t device_like_bytes = size_t{1} << 40;

inline const TmBackend* device_like_backend() {
  static const TmBackend backend = [] {
    TmBackend device = *host_group_backend();
    add_row_major_packs(device);
    device.allocate_host = device.allocate;
    device.release_host = device.release;
    device.start_copy = [](TmContext*, const TmSideCopy* copy) {
      late_copies.start(*copy);
      return TM_OK;
    };
    device.finish_copy = device.await_copy = [](TmContext*, size_t lane) {
      late_copies.await(lane);
      return TM_OK;
    };
    add_host_exchange(device);
    device.memory_bytes = device.free_bytes = [](TmContext*) { return device_like_bytes; };
    return device;
  }();
  return &backend;
}

}  // namespace tunemesh::test
