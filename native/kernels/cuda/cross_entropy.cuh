// Cross entropy of rows of logits, and their gradient in place.
//   row_loss = max + log(sum_v exp(x_v - max)) - x_target
//   dlogits  = exp(x_v - max) (grad_scale / sum); (exp(x_target - max) / sum - 1) grad_scale at the
//              target
//
//   shapes  logits [rows, v] in rows of `stride`; targets [rows]; row_losses f64 [rows]
//   launch  grid rows, block 512
//   faults  a target outside [0, v) is recorded; its row stays as it is and its loss becomes NaN
//   order   a thread adds its columns (ascending by 512) in float, spans of 32 terms in double; the
//           threads by block_reduce.cuh's tree in double
//   numbers log, the row's loss and the target's gradient are double, rounded once. A NaN in a row
//           makes its loss NaN
//   floor   4 bytes a logit, 12 with the gradient; two passes of it come from the caches
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/fault.cuh"

namespace tunemesh::cuda {

void cross_entropy(const TmCrossEntropy& args, DeviceFault* fault, cudaStream_t stream);

}  // namespace tunemesh::cuda
