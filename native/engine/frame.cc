#include "engine/frame.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "engine/codec.h"
#include "engine/crc32c.h"

namespace tunemesh {
namespace {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");

// The header as it lies in memory.
struct Wire {
  uint32_t magic;
  uint16_t version;
  uint8_t kind, codec;
  uint64_t job_hash;
  uint32_t fleet_epoch, step;
  uint16_t slice, slice_attempt, lease, lease_attempt, chunk, num_chunks;
  uint32_t first_block, num_blocks, payload_bytes;
  uint64_t digest;
  uint32_t flags, crc32c;
};
static_assert(sizeof(Wire) == kFrameHeaderBytes);

constexpr size_t kCheckedHeaderBytes = offsetof(Wire, crc32c);

size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

// Is [first_block, + num_blocks) exactly the chunk that the header names?
bool range_is_valid(const Wire& w, const FrameLimits& limits) {
  const size_t slice_first = w.slice * limits.slice_blocks;
  if (slice_first >= limits.num_blocks) return false;
  const size_t slice_blocks = std::min(limits.slice_blocks, limits.num_blocks - slice_first);
  if (w.num_chunks != divide_up(slice_blocks, limits.chunk_blocks)) return false;
  if (w.chunk >= w.num_chunks) return false;
  const size_t chunk_first = w.chunk * limits.chunk_blocks;
  return w.first_block == slice_first + chunk_first &&
         w.num_blocks == std::min(limits.chunk_blocks, slice_blocks - chunk_first);
}

FrameFault fault_of(const Wire& w, std::span<const uint8_t> frame, const FrameLimits& limits) {
  if (w.magic != kFrameMagic) return FrameFault::kMagic;
  if (w.version != kFrameVersion) return FrameFault::kVersion;
  if (w.kind != 1 && w.kind != 2) return FrameFault::kKind;
  if (w.kind == 2 && (w.lease != 0 || w.lease_attempt != 0)) return FrameFault::kKind;
  if (w.codec < 1 || w.codec > 3) return FrameFault::kCodec;
  if (w.flags != 0) return FrameFault::kFlags;
  if (w.payload_bytes != frame.size() - kFrameHeaderBytes) return FrameFault::kLength;
  if (!range_is_valid(w, limits)) return FrameFault::kRange;
  const auto payload = frame.subspan(kFrameHeaderBytes);
  const uint32_t crc =
      crc32c(payload.data(), payload.size(), crc32c(frame.data(), kCheckedHeaderBytes));
  if (w.crc32c != crc) return FrameFault::kChecksum;
  if (!packed_is_valid(payload, w.num_blocks)) return FrameFault::kPayload;
  return FrameFault::kNone;
}

}  // namespace

FrameCodec frame_codec(int significant_bits) {
  if (significant_bits == 24) return FrameCodec::kQ24;
  return significant_bits == 12 ? FrameCodec::kQ12 : FrameCodec::kQ8;
}

const char* frame_fault_text(FrameFault fault) {
  switch (fault) {
    case FrameFault::kNone:
      return "no fault";
    case FrameFault::kTooShort:
      return "shorter than its header";
    case FrameFault::kTooLong:
      return "longer than 1 MiB";
    case FrameFault::kMagic:
      return "not a gradient frame";
    case FrameFault::kVersion:
      return "of another frame version";
    case FrameFault::kKind:
      return "neither contribution nor sum";
    case FrameFault::kCodec:
      return "of an unknown codec";
    case FrameFault::kFlags:
      return "with unknown flags";
    case FrameFault::kLength:
      return "of another length than its header says";
    case FrameFault::kRange:
      return "with a chunk that this job does not have";
    case FrameFault::kPayload:
      return "with a malformed payload";
    case FrameFault::kChecksum:
      return "with a wrong checksum";
  }
  return "of an unknown fault";
}

FrameFault parse_frame(std::span<const uint8_t> frame, const FrameLimits& limits,
                       FrameHeader* header) {
  if (frame.size() < kFrameHeaderBytes) return FrameFault::kTooShort;
  if (frame.size() > kMaxFrameBytes) return FrameFault::kTooLong;
  Wire w;
  std::memcpy(&w, frame.data(), sizeof w);
  const FrameFault fault = fault_of(w, frame, limits);
  if (fault != FrameFault::kNone) return fault;
  *header = {.kind = static_cast<FrameKind>(w.kind),
             .codec = static_cast<FrameCodec>(w.codec),
             .job_hash = w.job_hash,
             .fleet_epoch = w.fleet_epoch,
             .step = w.step,
             .slice = w.slice,
             .slice_attempt = w.slice_attempt,
             .lease = w.lease,
             .lease_attempt = w.lease_attempt,
             .chunk = w.chunk,
             .num_chunks = w.num_chunks,
             .first_block = w.first_block,
             .num_blocks = w.num_blocks,
             .payload_bytes = w.payload_bytes,
             .digest = w.digest};
  return FrameFault::kNone;
}

void write_frame_header(const FrameHeader& h, std::span<uint8_t> frame) {
  const Wire w = {.magic = kFrameMagic,
                  .version = kFrameVersion,
                  .kind = static_cast<uint8_t>(h.kind),
                  .codec = static_cast<uint8_t>(h.codec),
                  .job_hash = h.job_hash,
                  .fleet_epoch = h.fleet_epoch,
                  .step = h.step,
                  .slice = h.slice,
                  .slice_attempt = h.slice_attempt,
                  .lease = h.lease,
                  .lease_attempt = h.lease_attempt,
                  .chunk = h.chunk,
                  .num_chunks = h.num_chunks,
                  .first_block = h.first_block,
                  .num_blocks = h.num_blocks,
                  .payload_bytes = h.payload_bytes,
                  .digest = h.digest,
                  .flags = 0,
                  .crc32c = 0};
  std::memcpy(frame.data(), &w, sizeof w);
  const uint32_t crc = crc32c(frame.data() + kFrameHeaderBytes, h.payload_bytes,
                              crc32c(frame.data(), kCheckedHeaderBytes));
  std::memcpy(frame.data() + kCheckedHeaderBytes, &crc, sizeof crc);
}

}  // namespace tunemesh
