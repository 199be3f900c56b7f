#include "engine/contribution_writer.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/packed_contribution.h"
#include "engine/stream_out.h"

namespace tunemesh {
namespace {

// Of the staging buffer: one is rounded while the other is filled.
constexpr size_t kPlaces = 2;

}  // namespace

HostContributionWriter::HostContributionWriter(const Device& device, TrainingState& state,
                                               const ContributionTarget& target)
    : device_(device),
      state_(state),
      exchange_(state.exchange()),
      target_(target),
      overwrites_(exchange_.take_cleared(target.slot)),
      accumulator_(exchange_.contribution(target.slot)) {
  if (!target.on_slice) return;
  measures_.assign(exchange_.num_slices(), {0, 0});
  for (size_t slice = 0; slice < exchange_.num_slices(); ++slice) {
    blocks_left_.push_back(exchange_.slice_num_blocks(slice));
  }
}

HostContributionWriter::~HostContributionWriter() {
  for (const Piece& piece : under_way_) device_.ops().finish_copy(device_.context(), piece.lane);
}

void HostContributionWriter::write(size_t part) {
  if (part != next_part_++) throw EngineError("INTERNAL", "parts of a gradient out of order.");
  for (const BlockRange& range : state_.parts()[part]) write_range(range);
}

void HostContributionWriter::finish() {
  while (next_part_ < state_.parts().size()) write(next_part_);
  while (!under_way_.empty()) finish_oldest();
  if (status_ != TM_OK) throw_bad_gradient({device_, state_}, status_, bad_block_);
}

void HostContributionWriter::write_range(const BlockRange& range) {
  const size_t end = range.first_block + range.num_blocks;
  for (size_t block = range.first_block; block < end;) {
    const size_t slice = block / exchange_.options().slice_blocks;
    const size_t slice_end = exchange_.slice_first_block(slice) + exchange_.slice_num_blocks(slice);
    const size_t count = std::min(end, slice_end) - block;
    if (device_.is_host()) {
      const float* const gradient = state_.trained().gradient + block * kBlockElements;
      write_piece({slice, {block, count}, gradient, 0});
    } else {
      fetch(slice, {block, count});
    }
    block += count;
  }
}

// Through the places of the staging buffer, each of which has a lane.
void HostContributionWriter::fetch(size_t slice, const BlockRange& range) {
  const size_t most = state_.staging().size() / kBlockElements / kPlaces;
  for (size_t done = 0; done < range.num_blocks; done += most) {
    if (under_way_.size() == kPlaces) finish_oldest();
    const size_t place = next_place_++ % kPlaces;
    const BlockRange piece = {range.first_block + done, std::min(most, range.num_blocks - done)};
    float* const to = state_.staging().data() + place * most * kBlockElements;
    TmSideCopy copy = {};
    copy.to = to;
    copy.from = state_.trained().gradient + piece.first_block * kBlockElements;
    copy.num_bytes = piece.num_blocks * kBlockElements * sizeof(float);
    copy.to_host = 1;
    copy.lane = TM_GRADIENT_LANE + place;
    TM_RUN(device_, start_copy, &copy);
    under_way_.push_back({slice, piece, to, copy.lane});
  }
}

void HostContributionWriter::finish_oldest() {
  const Piece piece = under_way_.front();
  TM_RUN(device_, finish_copy, piece.lane);
  under_way_.pop_front();
  write_piece(piece);
}

void HostContributionWriter::write_piece(const Piece& piece) {
  // After a failure the other parts are only searched for a tensor that comes before it by name.
  const bool is_told = target_.on_slice && status_ == TM_OK;
  size_t bad_block = 0;
  const TmStatus status = round(piece, &bad_block, is_told ? &measures_[piece.slice] : nullptr);
  if (status != TM_OK) return fail(piece.range.first_block + bad_block, status);
  if (!is_told) return;
  blocks_left_[piece.slice] -= piece.range.num_blocks;
  if (blocks_left_[piece.slice] > 0) return;
  const RangeMeasure& measured = measures_[piece.slice];
  const size_t headers = exchange_.num_chunks(piece.slice) * kFrameHeaderBytes;
  const SliceMeasure measure{measured.digest, measured.packed_bytes + headers};
  exchange_.note_measure(target_.slot, piece.slice, measure);
  target_.on_slice({piece.slice, measure});
}

TmStatus HostContributionWriter::round(const Piece& piece, size_t* bad_block,
                                       RangeMeasure* measure) const {
  const BlockRange& range = piece.range;
  const TmRoundAndAdd call = {piece.gradient, accumulator_ + range.first_block * kBlockElements,
                              range.num_blocks, state_.spec().significant_bits, bad_block};
  if (measure == nullptr) return overwrites_ ? round_to(call) : round_and_add(call);
  return overwrites_ ? round_to_measured(call, range.first_block, measure)
                     : round_and_add_measured(call, range.first_block, measure);
}

// At once: from here on nobody may pack or add what stands in the slot.
void HostContributionWriter::fail(size_t block, TmStatus status) {
  exchange_.poison(target_.slot);
  if (status != TM_NON_FINITE && status != TM_OUT_OF_RANGE) device_.check(status, "round_and_add");
  if (status_ != TM_OK && bad_block_ <= block) return;
  status_ = status;
  bad_block_ = block;
}

void throw_bad_gradient(const BadGradient& where, TmStatus status, size_t block) {
  const TrainedTensor& tensor = where.state.layout().tensor_of_block(block);
  const std::vector<float> values = copied_out(
      where.device, {where.state.trained().gradient + block * kBlockElements, kBlockElements});
  auto largest = std::find_if(values.begin(), values.end(), [](float v) { return std::isnan(v); });
  if (largest == values.end()) {
    largest = std::max_element(values.begin(), values.end(),
                               [](float a, float b) { return std::abs(a) < std::abs(b); });
  }
  const bool not_finite = status == TM_NON_FINITE;
  throw EngineError(
      not_finite ? "NON_FINITE_GRADIENT" : "GRADIENT_OUT_OF_RANGE",
      "the gradient of " + tensor.name + " has the value " + std::to_string(*largest) +
          " near element " + std::to_string((block - tensor.first_block) * kBlockElements) +
          (not_finite ? ". Lower the learning rate or look at the rows of this micro-batch."
                      : "; the exchange carries magnitudes below 32768."),
      tensor.name);
}

std::unique_ptr<ContributionWriter> contribution_writer(const Device& device, TrainingState& state,
                                                        const ContributionTarget& target) {
  if (state.has_device_sums()) {
    return std::make_unique<PackedContributionWriter>(device, state, target);
  }
  return std::make_unique<HostContributionWriter>(device, state, target);
}

void tell_standing_slices(const Device& device, TrainingState& state,
                          const ContributionTarget& target) {
  if (state.has_device_sums() && target.is_packed_after()) {
    return PackedContributionWriter(device, state, target).write_nothing();
  }
  if (!target.on_slice) return;
  ExchangeBuffers& exchange = state.exchange();
  for (size_t slice = exchange.num_slices(); slice-- > 0;) {
    target.on_slice({slice, exchange.measure_contribution(target.slot, slice)});
  }
}

}  // namespace tunemesh
