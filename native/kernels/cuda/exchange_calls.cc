// The exchange's entries of the table: rounding and packing on the device, without waiting.
#include "kernels/cuda/guard.h"
#include "kernels/cuda/pack_blocks.cuh"
#include "kernels/cuda/round_and_add.cuh"

namespace tunemesh::cuda {
namespace {

constexpr size_t kMostBlocks = size_t{1} << 31;  // of a grid

TmStatus round_some(TmContext* context, const TmRoundBlocks* args) {
  return guarded(context, [&] {
    if (args->significant_bits < 2 || args->significant_bits > 24) {
      refuse("round_blocks: significant_bits is ", args->significant_bits, "; use 2 to 24");
    }
    round_blocks(*args, context->stream());
  });
}

TmStatus pack_some(TmContext* context, const TmPackBlocks* args) {
  return guarded(context, [&] {
    if (args->chunk_blocks == 0 || args->num_blocks >= kMostBlocks) {
      refuse("pack_blocks: ", args->num_blocks, " blocks in chunks of ", args->chunk_blocks,
             "; use chunks of 1 or more and fewer than 2^31 blocks");
    }
    pack_blocks(*args, context->stream());
  });
}

}  // namespace

void fill_exchange(TmBackend& backend) {
  backend.round_blocks = round_some;
  backend.pack_blocks = pack_some;
}

}  // namespace tunemesh::cuda
