// Cross entropy of rows of logits, and their gradient in place; Element float or bfloat16
// (s bytes).
//   row_loss = max + log(sum_v exp(x_v - max)) - x_target
//   dlogits  = exp(x_v - max) (grad_scale / sum); (exp(x_target - max) / sum - 1) grad_scale at the
//              target
//
//   shapes  logits [rows, v] in rows of `stride`; targets [rows]; row_losses f64 [rows]
//   launch  grid rows; block 256, or 1024 where a row is above 16 KiB; shared memory: as much of
//   the
//           row as the card lets a block have (none without dlogits)
//   memory  the first pass finds maximum and sum together and leaves the row in shared memory for
//           the second; what does not fit there is read again, from the second-level cache at best
//   faults  a target outside [0, v) is recorded; its row stays as it is and its loss becomes NaN
//   order   a thread takes its chunks of 16 bytes ascending by the number of threads, four at a
//           time: their terms exp(x - its maximum so far) in float, added to its sum in double,
//           which follows the maximum. Threads by block_reduce.cuh's tree in double
//   numbers log, the row's loss and the target's gradient are double, rounded once. A NaN in a row
//           makes its loss NaN
//   floor   s bytes a logit, 2 s with the gradient
#pragma once
#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/fault.cuh"

namespace tunemesh::cuda {

template <typename Element>
void cross_entropy(const TmCrossEntropy& args, DeviceFault* fault, cudaStream_t stream);

}  // namespace tunemesh::cuda
