// The oldest libraries that serve, without their headers.
#pragma once
#include <stddef.h>

namespace tunemesh::cuda {

inline constexpr size_t kOldestCublasLt = 120800;
inline constexpr size_t kOldestCudnn = 91200;  // writes log-sum-exps in the layout asked for

}  // namespace tunemesh::cuda
