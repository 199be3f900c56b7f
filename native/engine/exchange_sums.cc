// The owner's and the receiver's side of the exchange's gradient memory: sums so far, published
// sums.
#include <algorithm>
#include <cstring>

#include "engine/exchange_buffers.h"

namespace tunemesh {
namespace {

std::string text(size_t value) { return std::to_string(value); }

}  // namespace

uint64_t ExchangeBuffers::add_contribution_frames(
    std::span<const std::span<const uint8_t>> frames) {
  if (frames.empty()) throw EngineError("FRAME_INVALID", "a contribution without frames");
  std::vector<FrameHeader> headers;
  std::vector<bool> seen(frames.size(), false);
  uint64_t digest = 0;
  for (const auto frame : frames) {
    const FrameHeader h = parse(frame, FrameKind::kContribution);
    const FrameHeader& first = headers.empty() ? h : headers.front();
    if (h.num_chunks != frames.size() || seen[h.chunk] || !same_contribution(h, first)) {
      throw EngineError("FRAME_INVALID", "slice " + text(h.slice) + " of lease " + text(h.lease) +
                                             " attempt " + text(h.lease_attempt) + ": chunk " +
                                             text(h.chunk) +
                                             " is doubled or belongs to another contribution");
    }
    seen[h.chunk] = true;
    digest += h.digest;
    headers.push_back(h);
  }
  bool fits = true;
  const size_t slice = headers.front().slice;
  const int64_t* before = added_to(slice);
  sum_source_[slice] = kInSum;
  for (size_t i = 0; i < frames.size(); ++i) {
    const FrameHeader& h = headers[i];
    const auto source = packed_source(frames[i].subspan(kFrameHeaderBytes), h.num_blocks);
    int64_t* to = sum_ + h.first_block * kBlockElements;
    if (before == nullptr) {
      unpack(source, h.num_blocks, to);
    } else {
      const size_t within = (h.first_block - slice_first_block(slice)) * kBlockElements;
      fits &= unpack_add(source, h.num_blocks, {before + within, to});
    }
  }
  if (!fits) throw_overflow(slice);
  return digest;
}

bool ExchangeBuffers::same_contribution(const FrameHeader& a, const FrameHeader& b) {
  return a.job_hash == b.job_hash && a.fleet_epoch == b.fleet_epoch && a.step == b.step &&
         a.slice == b.slice && a.slice_attempt == b.slice_attempt && a.lease == b.lease &&
         a.lease_attempt == b.lease_attempt;
}

void ExchangeBuffers::throw_overflow(size_t slice) {
  throw EngineError(
      "GRADIENT_OUT_OF_RANGE",
      "the sum of slice " + text(slice) +
          " leaves the exchange's range of +-32768; lower the learning rate or check the data");
}

uint64_t ExchangeBuffers::add_own_contribution(int slot, size_t slice) {
  const size_t first = slice_first_block(checked_slice(slice)), blocks = slice_num_blocks(slice);
  const uint64_t digest = measure_contribution(slot, slice).digest;
  const int64_t* before = added_to(slice);
  if (before == nullptr) {
    sum_source_[slice] = slot;
    return digest;
  }
  sum_source_[slice] = kInSum;
  const SumPlace place{before, sum_ + first * kBlockElements};
  const bool fits = packed_ ? unpack_add(packed_->slice(slot, slice).all(), blocks, place)
                            : add_blocks(readable(slot, first), blocks, place);
  if (!fits) throw_overflow(slice);
  return digest;
}

// The slice's sum so far, as integers; null where it was cleared.
const int64_t* ExchangeBuffers::added_to(size_t slice) {
  if (packed_ && sum_source_[slice] >= 0) keep_sum(slice);
  return sum_values(slice);
}

void ExchangeBuffers::clear_sum(size_t slice) { sum_source_[checked_slice(slice)] = kCleared; }

// The slice's sum so far; null where it was cleared. Not of a packed slot.
const int64_t* ExchangeBuffers::sum_values(size_t slice) const {
  const int source = sum_source_[slice];
  if (source == kCleared) return nullptr;
  const size_t offset = slice_first_block(slice) * kBlockElements;
  if (source == kInSum) return sum_ + offset;
  return contributions_ + source * options_.num_blocks * kBlockElements + offset;
}

void ExchangeBuffers::keep_sum(size_t slice) {
  int64_t* sum = sum_ + slice_first_block(slice) * kBlockElements;
  const size_t bytes = slice_num_blocks(slice) * kBlockElements * sizeof(int64_t);
  const int source = sum_source_[slice];
  if (packed_ && source >= 0) {
    unpack(packed_->slice(source, slice).all(), slice_num_blocks(slice), sum);
    sum_source_[slice] = kInSum;
    return;
  }
  const int64_t* values = sum_values(slice);
  sum_source_[slice] = kInSum;
  if (values == nullptr) {
    std::memset(sum, 0, bytes);
  } else if (values != sum) {
    std::memcpy(sum, values, bytes);
  }
}

FinishedSlice ExchangeBuffers::finish_slice(size_t step, size_t slice) {
  if (sum_source_[checked_slice(slice)] == kCleared) keep_sum(slice);
  const int source = sum_source_[slice];
  const bool is_packed = packed_ && source >= 0;
  const int64_t* sums = is_packed ? nullptr : sum_values(slice);
  FinishedSlice finished{0, 0, 0};
  for (size_t chunk = 0; chunk < num_chunks(slice); ++chunk) {
    const NumberedBlocks blocks = chunk_blocks(slice, chunk);
    ChunkDigest& known = chunk_digest(step, slice, chunk);
    known.step.reset();
    const uint64_t digest_before = finished.published_digest;
    if (is_packed) {
      finish_packed({step, &finished}, blocks, packed_->slice(source, slice).chunk(chunk).at);
    } else {
      const size_t within = (blocks.first_block - slice_first_block(slice)) * kBlockElements;
      finish_blocks({step, &finished}, blocks, sums + within);
    }
    known = {step, finished.published_digest - digest_before};
  }
  return finished;
}

void ExchangeBuffers::finish_blocks(const Finishing& to, const NumberedBlocks& blocks,
                                    const int64_t* sums) {
  const TmStatus status =
      finish_sum({.sums = sums,
                  .published = published(to.step) + blocks.first_block * kBlockElements,
                  .blocks = blocks,
                  .significant_bits = options_.significant_bits,
                  .bad_block = nullptr},
                 to.totals);
  if (status != TM_OK) throw_overflow(blocks.first_block / options_.slice_blocks);
}

// Tile by tile: the integers are never anywhere but in the caches.
void ExchangeBuffers::finish_packed(const Finishing& to, const NumberedBlocks& blocks,
                                    PackedSource from) {
  for (size_t at = 0; at < blocks.num_blocks; at += kTileBlocks) {
    const NumberedBlocks tile{blocks.first_block + at,
                              std::min(kTileBlocks, blocks.num_blocks - at)};
    unpack(from, tile.num_blocks, scratch_);
    finish_blocks(to, tile, scratch_);
    from.words += packed_word_bytes(from.shapes, tile.num_blocks);
    from.shapes += 2 * tile.num_blocks;
  }
}

void ExchangeBuffers::throw_not_published(size_t step, const NumberedBlocks& blocks) {
  throw EngineError("DIGEST_MISMATCH",
                    "the published sum of step " + text(step) +
                        " holds no published value at blocks " + text(blocks.first_block) + " to " +
                        text(blocks.first_block + blocks.num_blocks) + "; ask for the slice again");
}

ExchangeBuffers::ChunkDigest& ExchangeBuffers::chunk_digest(size_t step, size_t slice,
                                                            size_t chunk) {
  return chunk_digests_[((step % 2) * num_slices() + slice) * num_chunks(0) + chunk];
}

uint64_t ExchangeBuffers::published_chunk_digest(size_t step, size_t slice, size_t chunk) {
  const ChunkDigest& known = chunk_digest(step, slice, chunk);
  if (known.step == step) return known.digest;
  const NumberedBlocks blocks = chunk_blocks(slice, chunk);
  const size_t end = blocks.first_block + blocks.num_blocks;
  uint64_t digest = 0;
  for (size_t at = blocks.first_block; at < end; at += kTileBlocks) {
    const NumberedBlocks tile{at, std::min(kTileBlocks, end - at)};
    const float* values = published(step) + at * kBlockElements;
    if (floats_to_fixed(values, tile.num_blocks, scratch_) != TM_OK) {
      throw_not_published(step, tile);
    }
    digest += linear_digest(scratch_, at, tile.num_blocks);
  }
  return digest;
}

size_t ExchangeBuffers::pack_published(FrameHeader header, int frame) {
  place_chunk(header, frame);
  header.kind = FrameKind::kSum;
  header.lease = header.lease_attempt = 0;
  const NumberedBlocks blocks{header.first_block, header.num_blocks};
  header.digest = published_chunk_digest(header.step, header.slice, header.chunk);
  const PackedFloats packed =
      pack_floats(published(header.step) + blocks.first_block * kBlockElements, blocks.num_blocks,
                  packed_place(header, frame));
  if (packed.status != TM_OK) throw_not_published(header.step, blocks);
  return close_frame(header, frame, packed.bytes);
}

void ExchangeBuffers::store_published_frame(std::span<const uint8_t> frame) {
  const FrameHeader h = parse(frame, FrameKind::kSum);
  const UnpackedFloats unpacked = unpack_floats(
      packed_source(frame.subspan(kFrameHeaderBytes), h.num_blocks), {h.first_block, h.num_blocks},
      published(h.step) + h.first_block * kBlockElements);
  ChunkDigest& known = chunk_digest(h.step, h.slice, h.chunk);
  known.digest = unpacked.digest;
  known.step = unpacked.is_exact ? std::optional<size_t>(h.step) : std::nullopt;
}

uint64_t ExchangeBuffers::published_digest(size_t step, size_t slice) {
  uint64_t digest = 0;
  for (size_t chunk = 0; chunk < num_chunks(checked_slice(slice)); ++chunk) {
    digest += published_chunk_digest(step, slice, chunk);
  }
  return digest;
}

}  // namespace tunemesh
