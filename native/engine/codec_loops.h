// The codec's loops, written once on eight lanes and compiled once for each instruction path
// (codec_generic.cc, codec_avx2.cc, codec_avx512.cc), inside the including file's namespace.
//
// Integer results are exact; float64 operations are either exact (noted) or one fixed chain for
// each lane, so every path gives the same bits.
#ifndef TM_CODEC_NAMESPACE
#error "include this from one of codec_{generic,avx2,avx512}.cc"
#endif

#include "engine/codec_table.h"

#pragma GCC diagnostic ignored "-Wpsabi"

// In this order: each uses those before.
// clang-format off
#include "engine/codec_simd.h"
#include "engine/codec_rounding.h"
#include "engine/codec_packing.h"
// clang-format on

namespace tunemesh {
namespace TM_CODEC_NAMESPACE {

extern const CodecTable kTable = {{{round_blocks<false, false>, round_blocks<false, true>},
                                   {round_blocks<true, false>, round_blocks<true, true>}},
                                  add_blocks,
                                  finish_sum,
                                  floats_to_fixed,
                                  packed_bytes,
                                  pack_blocks,
                                  pack_floats,
                                  unpack_add,
                                  unpack,
                                  unpack_floats,
                                  linear_digest};

}  // namespace TM_CODEC_NAMESPACE
}  // namespace tunemesh
