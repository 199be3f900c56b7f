#include "engine/codec.h"

#include <array>
#include <atomic>

#include "engine/codec_table.h"

namespace tunemesh {
namespace {

bool processor_has(CodecPath path) {
#if defined(__x86_64__)
  if (path == CodecPath::kAvx2) return __builtin_cpu_supports("avx2");
  if (path == CodecPath::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return path == CodecPath::kGeneric;
}

const CodecTable* table_of(CodecPath path) {
#if defined(__x86_64__)
  if (path == CodecPath::kAvx512) return &codec_avx512::kTable;
  if (path == CodecPath::kAvx2) return &codec_avx2::kTable;
#endif
  static_cast<void>(path);
  return &codec_generic::kTable;
}

std::atomic<CodecPath>& chosen_path() {
  static std::atomic<CodecPath> path{widest_codec_path()};
  return path;
}

const CodecTable& table() { return *table_of(chosen_path().load(std::memory_order_relaxed)); }

// splitmix64 (Steele, Lea and Flood 2014): the generator's output for state `x` before its step.
constexpr uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

constexpr uint64_t kBlockSeed = 0x74756e656d657368;  // "tunemesh"

constexpr std::array<uint64_t, kBlockElements> lane_factors() {
  std::array<uint64_t, kBlockElements> factors{};
  for (size_t j = 0; j < kBlockElements; ++j) factors[j] = splitmix64(j) | 1;
  return factors;
}
constexpr std::array<uint64_t, kBlockElements> kLaneFactors = lane_factors();

TmStatus round_blocks(const TmRoundAndAdd& args, bool overwrites, const MeasuredRange& range) {
  if (args.significant_bits < 2 || args.significant_bits > 24) return TM_BAD_ARGUMENT;
  return table().round[overwrites][range.measure != nullptr](args, range);
}

DigestRange digest_range(const NumberedBlocks& blocks) {
  return {kLaneFactors.data(), blocks.first_block, blocks.num_blocks};
}

}  // namespace

CodecPath widest_codec_path() {
  if (processor_has(CodecPath::kAvx512)) return CodecPath::kAvx512;
  if (processor_has(CodecPath::kAvx2)) return CodecPath::kAvx2;
  return CodecPath::kGeneric;
}

CodecPath codec_path() { return chosen_path().load(); }

bool set_codec_path(CodecPath path) {
  if (!processor_has(path)) return false;
  chosen_path().store(path);
  return true;
}

TmStatus round_and_add(const TmRoundAndAdd& args) {
  return round_blocks(args, false, {nullptr, 0, nullptr});
}
TmStatus round_to(const TmRoundAndAdd& args) {
  return round_blocks(args, true, {nullptr, 0, nullptr});
}
TmStatus round_and_add_measured(const TmRoundAndAdd& args, size_t first_block,
                                RangeMeasure* measure) {
  return round_blocks(args, false, {kLaneFactors.data(), first_block, measure});
}
TmStatus round_to_measured(const TmRoundAndAdd& args, size_t first_block, RangeMeasure* measure) {
  return round_blocks(args, true, {kLaneFactors.data(), first_block, measure});
}

bool add_blocks(const int64_t* values, size_t num_blocks, const SumPlace& sum) {
  return table().add_blocks(values, num_blocks, sum);
}

TmStatus finish_sum(const FinishSum& args, FinishedRange* totals) {
  if (args.significant_bits < 2 || args.significant_bits > 24) return TM_BAD_ARGUMENT;
  return table().finish_sum(args, kLaneFactors.data(), totals);
}

TmStatus floats_to_fixed(const float* published, size_t num_blocks, int64_t* out) {
  return table().floats_to_fixed(published, num_blocks, out);
}

size_t packed_bytes(const int64_t* values, size_t num_blocks) {
  return table().packed_bytes(values, num_blocks);
}

PackedWords pack_blocks(const int64_t* values, const NumberedBlocks& blocks,
                        const PackedPlace& to) {
  return table().pack_blocks(values, digest_range(blocks), to);
}

PackedFloats pack_floats(const float* published, size_t num_blocks, const PackedPlace& to) {
  return table().pack_floats(published, num_blocks, to);
}

bool packed_is_valid(std::span<const uint8_t> payload, size_t num_blocks) {
  if (payload.size() / 2 < num_blocks) return false;
  uint64_t bytes = 2 * num_blocks;
  for (size_t b = 0; b < num_blocks; ++b) {
    const int shift = payload[2 * b], width = payload[2 * b + 1];
    if (shift + width > kMaxWidth || (width == 0 && shift != 0)) return false;
    bytes += 32 * static_cast<uint64_t>(width);
  }
  return bytes == payload.size();
}

bool unpack_add(const PackedSource& from, size_t num_blocks, const SumPlace& sum) {
  return table().unpack_add(from, num_blocks, sum);
}

void unpack(const PackedSource& from, size_t num_blocks, int64_t* out) {
  table().unpack(from, num_blocks, out);
}

UnpackedFloats unpack_floats(const PackedSource& from, const NumberedBlocks& blocks,
                             float* published) {
  return table().unpack_floats(from, digest_range(blocks), published);
}

uint64_t linear_digest(const int64_t* values, size_t first_block, size_t num_blocks) {
  return table().linear_digest(values, digest_range({first_block, num_blocks}));
}

uint64_t digest_block_factor(size_t block) { return splitmix64(kBlockSeed ^ block) | 1; }
uint64_t digest_lane_factor(size_t element) { return kLaneFactors.at(element); }

}  // namespace tunemesh
