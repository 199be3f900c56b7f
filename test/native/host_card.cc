// A library in the place of tunemesh_cuda.so whose card is the host: bf16 elements, linear groups,
// memory of its own, by the CPU's kernels (half_backend.h). With it whole jobs run as on a card
// where there is none, slowly (test/integration/host-card.ts).
//
// Its elements are bf16 whatever a job asks for. The environment says more:
//
//   TUNEMESH_HOST_CARD_BYTES        what the card says to have
//   TUNEMESH_HOST_CARD_FREE_BYTES   of it, what no other program has; more is refused as by a card
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "half_backend.h"
#include "host_exchange.h"
#include "kernels/cuda/card_refusals.h"
#include "kernels/cuda/plugin.h"

namespace tunemesh::test {
namespace {

thread_local char error_line[200] = "";

size_t bytes_of(const char* variable, size_t otherwise) {
  const char* const wanted = std::getenv(variable);
  return wanted == nullptr ? otherwise : std::strtoull(wanted, nullptr, 10);
}
size_t card_bytes() { return bytes_of("TUNEMESH_HOST_CARD_BYTES", size_t{64} << 30); }
size_t free_bytes() { return bytes_of("TUNEMESH_HOST_CARD_FREE_BYTES", card_bytes()); }

// The words of kernels/cuda/device_memory.cc.
TmStatus allocate(TmContext* context, size_t bytes, void** out) {
  *out = nullptr;
  if (bytes <= free_bytes()) return half_host()->allocate(context, bytes, out);
  std::snprintf(error_line, sizeof error_line,
                "no device memory for %s: %s of %s are free (device 0, host card)",
                cuda::memory_text(bytes).c_str(), cuda::memory_text(free_bytes()).c_str(),
                cuda::memory_text(card_bytes()).c_str());
  return TM_OUT_OF_MEMORY;
}

const TmBackend* table() {
  static const TmBackend backend = [] {
    TmBackend card = *half_backend(true);
    card.name = "cuda";
    card.num_devices = [] { return 1; };
    card.describe = [](TmContext*) { return "cuda: host card (sm_80), bf16"; };
    card.instruction_path = [](TmContext*) { return "host card (sm_80), bf16"; };
    card.memory_bytes = [](TmContext*) { return card_bytes(); };
    card.free_bytes = [](TmContext*) { return free_bytes(); };
    card.last_error = [] {
      return error_line[0] != '\0' ? static_cast<const char*>(error_line)
                                   : half_host()->last_error();
    };
    card.attention_scratch_bytes = [](TmContext* context, const TmAttentionJob* job) {
      if (job->head_size <= 256) return half_backend(true)->attention_scratch_bytes(context, job);
      std::snprintf(error_line, sizeof error_line, "attention: head size %zu is above 256",
                    job->head_size);
      return SIZE_MAX;
    };
    card.allocate_host = card.allocate;
    card.release_host = card.release;
    card.allocate = allocate;
    card.start_copy = [](TmContext*, const TmSideCopy* copy) {
      std::memcpy(copy->to, copy->from, copy->num_bytes);
      return TM_OK;
    };
    card.finish_copy = card.await_copy = [](TmContext*, size_t) { return TM_OK; };
    add_host_exchange(card);
    return card;
  }();
  return &backend;
}

}  // namespace
}  // namespace tunemesh::test

#define EXPORTED __attribute__((visibility("default")))

EXPORTED const TmBackend* tm_cuda_backend() { return tunemesh::test::table(); }

EXPORTED size_t tm_cuda_libraries(const char*, const TmCudaFinding** findings) {
  static const TmCudaFinding found[] = {{"driver", 1, "a host in the place of a card"}};
  *findings = found;
  return 1;
}
