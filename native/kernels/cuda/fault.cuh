// What a kernel found wrong in data that only the device can see: an index beyond its table,
// documents that do not cover the tokens. The first one to be recorded stays until the host reads
// it (context.h), the rows concerned are left out, and no kernel reads out of bounds for it.
#pragma once
#include <stdint.h>

namespace tunemesh::cuda {

enum class FaultKind : int { kNone = 0, kIndex, kDocumentSpan, kDocumentOrder };
enum class FaultOperation : int { kGather = 0, kScatter, kCrossEntropy, kAttention };

// kIndex          index `value` at `position` is not within [0, limit)
// kDocumentSpan   documents span [position, value), expected [0, limit)
// kDocumentOrder  document `position` starts at `limit` and ends at `value`
struct DeviceFault {
  FaultKind kind;
  FaultOperation operation;
  long long position, value, limit;
};

#ifdef __CUDACC__
__device__ inline void raise_fault(DeviceFault* fault, const DeviceFault& found) {
  int* kind = reinterpret_cast<int*>(&fault->kind);
  if (atomicCAS(kind, 0, static_cast<int>(found.kind)) != 0) return;
  fault->operation = found.operation;
  fault->position = found.position;
  fault->value = found.value;
  fault->limit = found.limit;
}
#endif

}  // namespace tunemesh::cuda
