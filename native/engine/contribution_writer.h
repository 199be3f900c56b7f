// A micro-batch's gradient on its way into a contribution slot, part by part, while backward goes
// on with the layers below: rounded, added, and in a lease's last micro-batch measured. A slice is
// told as soon as all of it stands. A device with memory of its own rounds and packs where it can
// and its plan has room for the sums (packed_contribution.h). Else the host does; from a device the
// parts then come by copies beside backward: a piece is rounded when the next ones are under way,
// so that the device has work meanwhile.
#pragma once
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "engine/training_state.h"

namespace tunemesh {

struct ContributionSlice {
  size_t slice;
  SliceMeasure measure;
};
using SliceListener = std::function<void(const ContributionSlice&)>;

struct ContributionTarget {
  ContributionTarget(int into, SliceListener listener = {})
      : slot(into), on_slice(std::move(listener)) {}
  int slot;
  // Set in a lease's last micro-batch: hears every slice once, on the engine's thread.
  SliceListener on_slice;
  // The device waits for each operation of the micro-batch: DEVICE_FAILED names the one that
  // failed.
  bool is_checked = false;
  // More is added to the slot before anything reads it: a device that packs need not do so yet.
  bool more_follows = false;
  bool is_packed_after() const { return on_slice || !more_follows; }
};

class ContributionWriter {
 public:
  ContributionWriter() = default;
  virtual ~ContributionWriter() = default;
  ContributionWriter(const ContributionWriter&) = delete;
  ContributionWriter& operator=(const ContributionWriter&) = delete;

  // The gradient of this part (gradient_parts) is final, and stays until finish(). Parts come in
  // order.
  virtual void write(size_t part) = 0;
  // The parts that are left. Throws NON_FINITE_GRADIENT or GRADIENT_OUT_OF_RANGE, named after the
  // first tensor of the canonical order that fails, whichever part it was met in.
  virtual void finish() = 0;
};

// Where the job's plan rounds. The target outlives the writer.
std::unique_ptr<ContributionWriter> contribution_writer(const Device& device, TrainingState& state,
                                                        const ContributionTarget& target);

struct BadGradient {
  const Device& device;
  const TrainingState& state;
};
[[noreturn]] void throw_bad_gradient(const BadGradient& where, TmStatus status, size_t block);

class HostContributionWriter : public ContributionWriter {
 public:
  HostContributionWriter(const Device& device, TrainingState& state,
                         const ContributionTarget& target);
  ~HostContributionWriter() override;  // waits for copies that are under way

  void write(size_t part) override;
  void finish() override;

 private:
  void write_range(const BlockRange& range);
  // Part of one slice, in host memory once its copy (of this lane) has ended.
  struct Piece {
    size_t slice;
    BlockRange range;
    const float* gradient;
    size_t lane;
  };
  void fetch(size_t slice, const BlockRange& range);
  void finish_oldest();
  void write_piece(const Piece& piece);
  TmStatus round(const Piece& piece, size_t* bad_block, RangeMeasure* measure) const;
  void fail(size_t block, TmStatus status);

  const Device& device_;
  TrainingState& state_;
  ExchangeBuffers& exchange_;
  const ContributionTarget& target_;
  const bool overwrites_;  // the slot was cleared: nothing to add to
  int64_t* const accumulator_;
  size_t next_part_ = 0;
  std::deque<Piece> under_way_;  // oldest first
  size_t next_place_ = 0;
  // By slice, where somebody listens.
  std::vector<size_t> blocks_left_;
  std::vector<RangeMeasure> measures_;
  TmStatus status_ = TM_OK;
  size_t bad_block_ = 0;
};

// A micro-batch without tokens adds nothing: every slice stands as it is.
void tell_standing_slices(const Device& device, TrainingState& state,
                          const ContributionTarget& target);

}  // namespace tunemesh
