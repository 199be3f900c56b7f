// The gradients of a group's adapters (TmGroupAdapterGrads of kernels/backend.h): by adapter_grads'
// kernels in bf16 where the rows have the form that they need, else as products of cuBLASLt, one
// for each matrix.
#pragma once
#include "kernels/backend.h"

namespace tunemesh::cuda {

// The table's entry.
void fill_group_grads(TmBackend& backend);

}  // namespace tunemesh::cuda
