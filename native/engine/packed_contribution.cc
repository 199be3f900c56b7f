#include "engine/packed_contribution.h"

#include <algorithm>
#include <string>
#include <utility>

namespace tunemesh {
namespace {

// Parts that the device has been given after a slice was packed, before the host looks at it: it
// waits for none then.
constexpr size_t kLag = 2;

size_t lane_of(size_t place) { return TM_GRADIENT_LANE + place; }

TmSideCopy to_host(void* to, const void* from, size_t num_bytes) {
  TmSideCopy copy = {};
  copy.to = to;
  copy.from = from;
  copy.num_bytes = num_bytes;
  copy.to_host = 1;
  return copy;
}

}  // namespace

PackedContributionWriter::PackedContributionWriter(const Device& device, TrainingState& state,
                                                   const ContributionTarget& target)
    : device_(device),
      state_(state),
      exchange_(state.exchange()),
      sums_(state.device_sums()),
      target_(target) {
  begin();
  if (!target.is_packed_after()) return;
  for (size_t slice = 0; slice < exchange_.num_slices(); ++slice) {
    blocks_left_.push_back(exchange_.slice_num_blocks(slice));
  }
}

PackedContributionWriter::~PackedContributionWriter() {
  for (const UnderWay& slice : under_way_) {
    if (slice.stage == Stage::kDropped) continue;
    device_.ops().finish_copy(device_.context(), lane_of(slice.place));
  }
}

// The device has sums of one slot. A lease that another one interrupts is parked in its slot's
// memory, whose bytes nobody reads before it is packed.
void PackedContributionWriter::begin() {
  const int slot = target_.slot;
  overwrites_ = exchange_.begin_packed(slot);
  if (!overwrites_ && sums_.slot != slot && !sums_.is_parked[slot]) {
    throw EngineError("STATE_CONFLICT",
                      "the sums of contribution slot " + std::to_string(slot) +
                          " are gone from the device; clear it and compute the lease again.");
  }
  const int standing = std::exchange(sums_.slot, -1);
  TM_RUN(device_, fill_zero, sums_.outcome, sizeof *sums_.outcome);
  if (!overwrites_ && standing == slot) return;
  if (standing >= 0 && standing != slot && !sums_.is_packed) park(standing);
  sums_.is_parked[slot] = false;
  if (overwrites_) return;
  TM_RUN(device_, copy_in, sums_.values, exchange_.packed_memory(slot),
         state_.layout().num_floats() * sizeof(int64_t));
}

void PackedContributionWriter::park(int slot) {
  if (exchange_.is_poisoned(slot) || exchange_.is_cleared(slot)) return;
  TM_RUN(device_, copy_out, exchange_.packed_memory(slot), sums_.values,
         state_.layout().num_floats() * sizeof(int64_t));
  sums_.is_parked[slot] = true;
}

void PackedContributionWriter::write(size_t part) {
  if (part != next_part_++) throw EngineError("INTERNAL", "parts of a gradient out of order.");
  for (const BlockRange& range : state_.parts()[part]) round(range);
  if (blocks_left_.empty()) return;
  for (const BlockRange& range : state_.parts()[part]) count(range);
  advance(is_rest_empty());
}

void PackedContributionWriter::finish() {
  while (next_part_ < state_.parts().size()) write(next_part_);
  advance(true);
  close();
}

void PackedContributionWriter::write_nothing() {
  if (overwrites_) {
    TM_RUN(device_, fill_zero, sums_.values, state_.layout().num_floats() * sizeof(int64_t));
  }
  for (size_t slice = exchange_.num_slices(); slice-- > 0;) pack(slice);
  advance(true);
  close();
}

bool PackedContributionWriter::is_rest_empty() const {
  return std::all_of(state_.parts().begin() + static_cast<std::ptrdiff_t>(next_part_),
                     state_.parts().end(), [](const auto& part) { return part.empty(); });
}

void PackedContributionWriter::round(const BlockRange& range) {
  const size_t offset = range.first_block * kBlockElements;
  TmRoundBlocks call = {};
  call.gradient = state_.trained().gradient + offset;
  call.accumulator = sums_.values + offset;
  call.num_blocks = range.num_blocks;
  call.significant_bits = state_.spec().significant_bits;
  call.overwrites = overwrites_ ? 1 : 0;
  call.first_block = range.first_block;
  call.outcome = sums_.outcome;
  TM_RUN(device_, round_blocks, &call);
}

// Packs the slices that stand with this range.
void PackedContributionWriter::count(const BlockRange& range) {
  const size_t end = range.first_block + range.num_blocks;
  for (size_t block = range.first_block; block < end;) {
    const size_t slice = block / exchange_.options().slice_blocks;
    const size_t slice_end = exchange_.slice_first_block(slice) + exchange_.slice_num_blocks(slice);
    const size_t count = std::min(end, slice_end) - block;
    blocks_left_[slice] -= count;
    if (blocks_left_[slice] == 0) pack(slice);
    block += count;
  }
}

PackedSlice PackedContributionWriter::on_device(const UnderWay& slice) const {
  return {sums_.places + slice.place * sums_.place_bytes, exchange_.slice_num_blocks(slice.slice),
          exchange_.options().chunk_blocks};
}

PackedSlice PackedContributionWriter::in_slot(const UnderWay& slice) const {
  return exchange_.packed_slice(target_.slot, slice.slice);
}

void PackedContributionWriter::pack(size_t slice) {
  if (under_way_.size() == DeviceSums::kPlaces) finish_oldest();
  const UnderWay entry = {slice, next_place_++ % DeviceSums::kPlaces, next_part_, Stage::kHead};
  const PackedSlice to = on_device(entry);
  TmPackBlocks call = {};
  call.values = sums_.values + exchange_.slice_first_block(slice) * kBlockElements;
  call.first_block = exchange_.slice_first_block(slice);
  call.num_blocks = to.num_blocks;
  call.chunk_blocks = to.chunk_blocks;
  call.outcome = sums_.outcome;
  call.told = to.told;
  call.shapes = to.shapes;
  call.words = to.words;
  call.block_digests = sums_.block_digests;
  TM_RUN(device_, pack_blocks, &call);
  TmSideCopy copy = to_host(in_slot(entry).told, to.told, to.head_bytes);
  copy.lane = lane_of(entry.place);
  TM_RUN(device_, start_copy, &copy);
  under_way_.push_back(entry);
}

// Those that began their stage some parts ago; all: every slice.
void PackedContributionWriter::advance(bool all) {
  const auto may_tell = [&](const UnderWay& slice) {
    return slice.stage != Stage::kHead && slice.turn < next_part_;
  };
  while (!under_way_.empty() && may_tell(under_way_.front())) finish_oldest();
  for (UnderWay& slice : under_way_) {
    if (slice.stage == Stage::kHead && (all || slice.turn + kLag <= next_part_)) take_head(slice);
  }
  while (all && !under_way_.empty()) finish_oldest();
}

void PackedContributionWriter::take_head(UnderWay& slice) {
  const size_t lane = lane_of(slice.place);
  slice.stage = Stage::kDropped;
  TM_RUN(device_, finish_copy, lane);
  const PackedSlice here = in_slot(slice);
  if (here.told[0] != 0 && !has_failed_) {
    // At once: from here on nobody may pack or add what stands in the slot.
    exchange_.poison(target_.slot);
    has_failed_ = true;
  }
  if (has_failed_) return;
  if (!here.is_whole()) {
    throw EngineError("INTERNAL", "the device packed slice " + std::to_string(slice.slice) +
                                      " into other bytes than its shapes say.");
  }
  TmSideCopy copy = to_host(here.words, on_device(slice).words, here.word_bytes());
  copy.at_once = 1;
  copy.lane = lane;
  TM_RUN(device_, start_copy, &copy);
  slice.stage = Stage::kWords;
  slice.turn = next_part_;
}

void PackedContributionWriter::finish_oldest() {
  if (under_way_.front().stage == Stage::kHead) take_head(under_way_.front());
  const UnderWay slice = under_way_.front();
  if (slice.stage == Stage::kWords) TM_RUN(device_, finish_copy, lane_of(slice.place));
  under_way_.pop_front();
  if (slice.stage == Stage::kWords && !has_failed_) tell(slice);
}

void PackedContributionWriter::tell(const UnderWay& slice) {
  const PackedSlice here = in_slot(slice);
  const size_t headers = here.num_chunks * kFrameHeaderBytes;
  const SliceMeasure measure{here.digest(), headers + 2 * here.num_blocks + here.word_bytes()};
  exchange_.note_measure(target_.slot, slice.slice, measure);
  if (target_.on_slice) target_.on_slice({slice.slice, measure});
}

void PackedContributionWriter::close() {
  uint64_t outcome = 0;
  TM_RUN(device_, copy_out, &outcome, sums_.outcome, sizeof outcome);
  if (outcome != 0) {
    exchange_.poison(target_.slot);
    throw_bad_gradient({device_, state_}, static_cast<TmStatus>(~outcome & 0xff),
                       static_cast<size_t>(~outcome >> 8));
  }
  sums_.slot = target_.slot;
  sums_.is_packed = !blocks_left_.empty();
}

}  // namespace tunemesh
