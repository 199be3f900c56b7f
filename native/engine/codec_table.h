// The codec's loops as a table: one for each instruction path; codec.cc chooses.
#pragma once
#include "engine/codec.h"

namespace tunemesh {

// Shape of a packed block.
struct PackedBlock {
  uint8_t shift, width;
};

struct DigestRange {
  const uint64_t* lane_factors;  // 256
  size_t first_block, num_blocks;
};

struct CodecTable {
  TmStatus (*round_and_add)(const TmRoundAndAdd&);
  TmStatus (*round_to)(const TmRoundAndAdd&);
  bool (*add_blocks)(const int64_t*, size_t, int64_t*);
  TmStatus (*round_sum)(const RoundSum&);
  TmStatus (*floats_to_fixed)(const float*, size_t, int64_t*);
  void (*fixed_to_floats)(const int64_t*, size_t, float*);
  size_t (*packed_bytes)(const int64_t*, size_t);
  size_t (*pack_blocks)(const int64_t*, size_t, const PackedPlace&);
  bool (*unpack_add)(const PackedSource&, size_t, int64_t*);
  size_t (*unpack)(const PackedSource&, size_t, int64_t*);
  uint64_t (*linear_digest)(const int64_t*, const DigestRange&);
  double (*add_squares)(double, const float*, size_t);
};

namespace codec_generic {
extern const CodecTable kTable;
}
namespace codec_avx2 {
extern const CodecTable kTable;
}
namespace codec_avx512 {
extern const CodecTable kTable;
}

}  // namespace tunemesh
