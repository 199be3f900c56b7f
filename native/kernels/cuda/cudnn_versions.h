// Of cuDNN, without its headers.
#pragma once
#include <stddef.h>

namespace tunemesh::cuda {

inline constexpr size_t kOldestCudnn = 91200;  // writes log-sum-exps in the layout asked for

}  // namespace tunemesh::cuda
