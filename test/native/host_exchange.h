// The exchange's entries of a backend (round_blocks, pack_blocks) on memory of the host, by the
// codec of the CPU.
#pragma once
#include <algorithm>

#include "engine/codec.h"
#include "kernels/backend.h"

namespace tunemesh::test {

// A range fails at its first bad block: the rest of it stays as it is.
inline TmStatus host_round_blocks(TmContext*, const TmRoundBlocks* args) {
  size_t bad_block = 0;
  const TmRoundAndAdd call = {args->gradient, args->accumulator, args->num_blocks,
                              args->significant_bits, &bad_block};
  const TmStatus status = args->overwrites ? round_to(call) : round_and_add(call);
  if (status == TM_BAD_ARGUMENT) return status;
  if (status != TM_OK) {
    const uint64_t found = ~((args->first_block + bad_block) << 8 | uint64_t(status));
    *args->outcome = std::max(*args->outcome, found);
  }
  return TM_OK;
}

inline TmStatus host_pack_blocks(TmContext*, const TmPackBlocks* args) {
  uint8_t* words = args->words;
  args->told[0] = args->outcome != nullptr ? *args->outcome : 0;
  for (size_t first = 0, chunk = 0; first < args->num_blocks;
       first += args->chunk_blocks, ++chunk) {
    const size_t count = std::min(args->chunk_blocks, args->num_blocks - first);
    const PackedWords packed =
        pack_blocks(args->values + first * kBlockElements, {args->first_block + first, count},
                    {args->shapes + 2 * first, words});
    args->told[1 + 2 * chunk] = packed.digest;
    args->told[2 + 2 * chunk] = packed.bytes;
    words += packed.bytes;
  }
  return TM_OK;
}

inline void add_host_exchange(TmBackend& backend) {
  backend.round_blocks = host_round_blocks;
  backend.pack_blocks = host_pack_blocks;
}

}  // namespace tunemesh::test
