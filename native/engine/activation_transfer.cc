#include "engine/activation_transfer.h"

namespace tunemesh {
namespace {

const LayerTransfer* transfer_of(const Pass& pass, size_t layer) {
  if (pass.work.transfers.empty()) return nullptr;
  const LayerTransfer& found = pass.work.transfers[layer];
  return found.lane < 0 ? nullptr : &found;
}

void await_lane(const Pass& pass, int lane) {
  TM_RUN(pass.device, await_copy, static_cast<size_t>(lane));
}

void start(const Pass& pass, const LayerTransfer& transfer, bool to_host) {
  TmSideCopy copy = {};
  copy.to = to_host ? transfer.host : transfer.device;
  copy.from = to_host ? transfer.device : transfer.host;
  copy.num_bytes = transfer.num_bytes;
  copy.to_host = to_host ? 1 : 0;
  copy.lane = static_cast<size_t>(transfer.lane);
  TM_RUN(pass.device, start_copy, &copy);
}

}  // namespace

void await_place(const Pass& pass, size_t layer) {
  const LayerTransfer* const transfer = transfer_of(pass, layer);
  if (transfer != nullptr && transfer->below >= 0) await_lane(pass, transfer->lane);
}

void send_layer(const Pass& pass, size_t layer) {
  const LayerTransfer* const transfer = transfer_of(pass, layer);
  if (transfer != nullptr && transfer->is_moved) start(pass, *transfer, true);
}

void await_layer(const Pass& pass, size_t layer) {
  const LayerTransfer* const transfer = transfer_of(pass, layer);
  if (transfer != nullptr && transfer->is_moved) await_lane(pass, transfer->lane);
}

void fetch_layer_below(const Pass& pass, size_t layer) {
  const LayerTransfer* const transfer = transfer_of(pass, layer);
  if (transfer == nullptr || transfer->below < 0) return;
  start(pass, pass.work.transfers[static_cast<size_t>(transfer->below)], false);
}

}  // namespace tunemesh
