// The gradient frame: a 64-byte little-endian header in front of packed blocks (proto/frame.ts has
// the same layout).
//
//   0 magic u32 "TMG1"   4 version u16     6 kind u8          7 codec u8       8 jobHash u64
//  16 fleetEpoch u32    20 step u32       24 slice u16       26 sliceAttempt u16
//  28 lease u16         30 leaseAttempt u16 (both 0 in a sum) 32 chunk u16     34 numChunks u16
//  36 firstBlock u32    40 numBlocks u32  44 payloadBytes u32
//  48 digest u64 (linear digest of this chunk's integers)    56 flags u32 (0)  60 crc32c u32 (bytes
//  0-59, payload)
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace tunemesh {

inline constexpr uint32_t kFrameMagic = 0x31474d54;  // "TMG1"
inline constexpr uint16_t kFrameVersion = 1;
inline constexpr size_t kFrameHeaderBytes = 64;
inline constexpr size_t kMaxFrameBytes = 1 << 20;
// Most blocks of a chunk: at 64 bits an element the frame still fits.
inline constexpr size_t kMaxChunkBlocks = (kMaxFrameBytes - kFrameHeaderBytes) / (2 + 8 * 256);

enum class FrameKind : uint8_t { kContribution = 1, kSum = 2 };
enum class FrameCodec : uint8_t { kQ24 = 1, kQ12 = 2, kQ8 = 3 };
FrameCodec frame_codec(int significant_bits);

struct FrameHeader {
  FrameKind kind = FrameKind::kContribution;
  FrameCodec codec = FrameCodec::kQ24;
  uint64_t job_hash = 0;
  uint32_t fleet_epoch = 0, step = 0;
  uint16_t slice = 0, slice_attempt = 0, lease = 0, lease_attempt = 0, chunk = 0, num_chunks = 0;
  uint32_t first_block = 0, num_blocks = 0, payload_bytes = 0;
  uint64_t digest = 0;
};

// The job's cut of the trained vector, against which a frame's ranges are checked.
struct FrameLimits {
  size_t num_blocks, slice_blocks, chunk_blocks;
};

enum class FrameFault {
  kNone,
  kTooShort,
  kTooLong,
  kMagic,
  kVersion,
  kKind,
  kCodec,
  kFlags,
  kLength,
  kRange,
  kPayload,
  kChecksum
};
const char* frame_fault_text(FrameFault fault);

// Reads and checks everything: lengths, ranges, checksum, well-formed payload. `header` is set only
// for kNone.
FrameFault parse_frame(std::span<const uint8_t> frame, const FrameLimits& limits,
                       FrameHeader* header);
// Writes the header in front of a payload of header.payload_bytes already in place; fills in the
// checksum.
void write_frame_header(const FrameHeader& header, std::span<uint8_t> frame);

}  // namespace tunemesh
