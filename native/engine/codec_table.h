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

// `measure` is set where the caller measures.
struct MeasuredRange {
  const uint64_t* lane_factors;
  size_t first_block;
  RangeMeasure* measure;
};

struct CodecTable {
  // [overwrites][measures]
  TmStatus (*round[2][2])(const TmRoundAndAdd&, const MeasuredRange&);
  bool (*add_blocks)(const int64_t*, size_t, const SumPlace&);
  TmStatus (*finish_sum)(const FinishSum&, const uint64_t* lane_factors, FinishedRange*);
  TmStatus (*floats_to_fixed)(const float*, size_t, int64_t*);
  size_t (*packed_bytes)(const int64_t*, size_t);
  PackedWords (*pack_blocks)(const int64_t*, const DigestRange&, const PackedPlace&);
  PackedFloats (*pack_floats)(const float*, size_t, const PackedPlace&);
  bool (*unpack_add)(const PackedSource&, size_t, const SumPlace&);
  void (*unpack)(const PackedSource&, size_t, int64_t*);
  UnpackedFloats (*unpack_floats)(const PackedSource&, const DigestRange&, float*);
  uint64_t (*linear_digest)(const int64_t*, const DigestRange&);
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
