// A micro-batch's gradient on its way into a contribution slot, on a device that rounds and packs
// (round_blocks, pack_blocks): each part is rounded into the lease's sums on the device; in the
// lease's last micro-batch (ContributionTarget::more_follows) each slice is packed there as soon as
// all of it stands, and copied to the slot beside backward, as the bytes that frames carry.
#pragma once
#include <deque>
#include <vector>

#include "engine/contribution_writer.h"
#include "engine/packed_slots.h"

namespace tunemesh {

class PackedContributionWriter : public ContributionWriter {
 public:
  PackedContributionWriter(const Device& device, TrainingState& state,
                           const ContributionTarget& target);
  ~PackedContributionWriter() override;  // waits for copies that are under way

  void write(size_t part) override;
  void finish() override;
  // Instead, of a micro-batch that adds nothing: every slice stands as it is.
  void write_nothing();

 private:
  // First the head (numbers and shapes) travels, which says how many words do.
  enum class Stage { kHead, kWords, kDropped };
  struct UnderWay {
    size_t slice, place;
    size_t turn;  // parts written when its stage began
    Stage stage;
  };
  void begin();
  void park(int slot);
  void round(const BlockRange& range);
  void count(const BlockRange& range);
  void pack(size_t slice);
  void advance(bool all);
  void take_head(UnderWay& slice);
  void finish_oldest();
  void tell(const UnderWay& slice);
  void close();
  PackedSlice on_device(const UnderWay& slice) const;
  PackedSlice in_slot(const UnderWay& slice) const;
  bool is_rest_empty() const;

  const Device& device_;
  TrainingState& state_;
  ExchangeBuffers& exchange_;
  DeviceSums& sums_;
  const ContributionTarget& target_;
  bool overwrites_ = false;  // nothing to add to
  size_t next_part_ = 0;
  std::vector<size_t> blocks_left_;  // by slice, where slices are packed
  std::deque<UnderWay> under_way_;   // oldest first
  size_t next_place_ = 0;
  bool has_failed_ = false;
};

}  // namespace tunemesh
