#include "engine/recorded_calls.h"

#include <algorithm>
#include <array>
#include <atomic>

#include "engine/layer_calls.h"

namespace tunemesh {
namespace {

constexpr size_t kOwnWords = 4;
using KeyWords = std::array<uint64_t, kOwnWords + TM_ATTENTION_KEY_WORDS>;

KeyWords key_of(const Device& device, const RecordedPart& part) {
  KeyWords words = {part.recording_id, static_cast<uint64_t>(part.part), part.layer,
                    part.num_tokens};
  if (part.pass == nullptr) return words;
  // Layers differ in pointers alone.
  const TmAttention call = attention_call(*part.pass, part.pass->work.layers[0]);
  device.ops().attention_key(device.context(), &call, words.data() + kOwnWords);
  return words;
}

bool succeeds(const std::function<void()>& calls) {
  try {
    calls();
    return true;
  } catch (const EngineError&) {
    return false;  // of a recording: the calls are issued again, and tell then
  }
}

}  // namespace

uint64_t new_recording_id() {
  static std::atomic<uint64_t> last = 0;
  return ++last;
}

void run_recorded(const Device& device, const RecordedPart& part,
                  const std::function<void()>& calls) {
  if (!device.records_calls() || part.recording_id == 0) return calls();
  const KeyWords words = key_of(device, part);
  const TmCallsKey key = {words.data(), words.size()};
  int action = TM_CALLS_RUN;
  TM_RUN(device, calls_begin, &key, &action);
  if (action == TM_CALLS_DONE) return;
  if (action == TM_CALLS_RUN) return calls();
  const bool is_whole = succeeds(calls);
  int has_run = 0;
  TM_RUN(device, calls_end, is_whole ? 1 : 0, &has_run);
  if (has_run != 0) return;
  calls();
}

}  // namespace tunemesh
