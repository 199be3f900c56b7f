// A host's table that records calls as a device does (calls_begin of kernels/backend.h): between
// begin and end nothing runs, what is launched later are copies of the calls' arguments, and what
// only the host knows of the documents is gone. So whatever a key misses gives other bits.
#pragma once
#include <functional>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace tunemesh::test {

// One at a time in a process: the table's functions have no place for a state.
struct Recording {
  using Calls = std::vector<std::function<TmStatus()>>;
  const TmBackend* inner = nullptr;
  std::map<std::vector<uint64_t>, Calls> known;
  Calls* current = nullptr;
  size_t num_launched = 0, num_failed = 0;
  int num_failures_left = 0;  // of the next recordings
};
inline Recording recording;

// An argument as it is kept: structs behind pointers by value, all else as it is.
template <class Arg>
struct KeptArgument {
  static constexpr bool is_struct = false;
  Arg value;
  explicit KeptArgument(Arg from) : value(from) {}
  Arg get() { return value; }
};
template <class T>
requires(std::is_class_v<T>&& requires { sizeof(T); }) struct KeptArgument<const T*> {
  static constexpr bool is_struct = true;
  T value;
  TmGroupShape shape = {};
  explicit KeptArgument(const T* from) : value(*from) {
    if constexpr (requires { value.host_document_starts; }) forget_documents(value);
    if constexpr (requires { value.forward.host_document_starts; }) forget_documents(value.forward);
    if constexpr (requires { value.shape; }) shape = *value.shape;
  }
  const T* get() {
    if constexpr (requires { value.shape; }) value.shape = &shape;
    return &value;
  }
  static void forget_documents(TmAttention& a) {
    a.num_documents = a.padded_documents;
    a.host_document_starts = nullptr;
  }
};

template <auto Member>
struct RecordedOp;
template <class... Args, TmStatus (*TmBackend::*Member)(TmContext*, Args...)>
struct RecordedOp<Member> {
  static TmStatus call(TmContext* context, Args... args) {
    if (recording.current == nullptr) return (recording.inner->*Member)(context, args...);
    recording.current->push_back([context,
                                  kept = std::tuple<KeptArgument<Args>...>(args...)]() mutable {
      return std::apply(
          [&](auto&... each) { return (recording.inner->*Member)(context, each.get()...); }, kept);
    });
    return TM_OK;
  }
};

// Of what reads or writes the host's memory.
template <auto Member>
struct UnrecordedOp;
template <class... Args, TmStatus (*TmBackend::*Member)(TmContext*, Args...)>
struct UnrecordedOp<Member> {
  static TmStatus call(TmContext* context, Args... args) {
    if (recording.current != nullptr) return TM_BAD_ARGUMENT;
    return (recording.inner->*Member)(context, args...);
  }
};

inline TmStatus begin_recording(TmContext*, const TmCallsKey* key, int* action) {
  const std::vector<uint64_t> words(key->words, key->words + key->num_words);
  const auto [found, is_new] = recording.known.try_emplace(words);
  *action = TM_CALLS_RUN;
  if (is_new) return TM_OK;
  if (found->second.empty()) {
    *action = TM_CALLS_RECORD;
    recording.current = &found->second;
    return TM_OK;
  }
  *action = TM_CALLS_DONE;
  ++recording.num_launched;
  for (const auto& call : found->second) {
    if (const TmStatus status = call(); status != TM_OK) return status;
  }
  return TM_OK;
}

inline TmStatus end_recording(TmContext*, int is_whole, int* has_run) {
  Recording::Calls& calls = *std::exchange(recording.current, nullptr);
  *has_run = 0;
  if (is_whole == 0 || recording.num_failures_left-- > 0) {
    calls.clear();
    ++recording.num_failed;
    return TM_OK;
  }
  for (const auto& call : calls) {
    if (const TmStatus status = call(); status != TM_OK) return status;
  }
  *has_run = 1;
  return TM_OK;
}

inline void add_recording(TmBackend& table) {
  table.calls_begin = begin_recording;
  table.calls_end = end_recording;
  table.calls_forget = [](TmContext*) {
    recording.known.clear();
    return TM_OK;
  };
  // Padded, all layouts of the documents are the same calls.
  table.attention_key = [](TmContext*, const TmAttention* a, uint64_t* key) {
    for (int i = 0; i < TM_ATTENTION_KEY_WORDS; ++i) key[i] = 0;
    if (a->padded_documents == 0) key[0] = a->num_documents;
  };
}

// Lives as long as the process; `inner` is a host's table.
inline const TmBackend* recording_backend(const TmBackend* inner) {
  static std::map<const TmBackend*, TmBackend> tables;
  recording.inner = inner;
  TmBackend& table = tables[inner];
  table = *inner;
#define TM_RECORDED(op) \
  if (inner->op != nullptr) table.op = RecordedOp<&TmBackend::op>::call
#define TM_UNRECORDED(op) \
  if (inner->op != nullptr) table.op = UnrecordedOp<&TmBackend::op>::call
  TM_UNRECORDED(allocate);
  TM_UNRECORDED(copy_in);
  TM_UNRECORDED(copy_out);
  TM_UNRECORDED(read_elements);
  TM_UNRECORDED(pack_weight);
  TM_UNRECORDED(pack_group_base);
  TM_UNRECORDED(decode_attention);
  TM_RECORDED(fill_zero);
  TM_RECORDED(pack_trained_weight);
  TM_RECORDED(embedding_forward);
  TM_RECORDED(embedding_backward_add);
  TM_RECORDED(rms_norm_forward);
  TM_RECORDED(rms_norm_backward);
  TM_RECORDED(linear_forward);
  TM_RECORDED(linear_backward_input);
  TM_RECORDED(linear_weight_grad);
  TM_RECORDED(bias_add);
  TM_RECORDED(bias_grad_add);
  TM_RECORDED(rope);
  TM_RECORDED(attention_forward);
  TM_RECORDED(attention_backward);
  TM_RECORDED(swiglu_forward);
  TM_RECORDED(swiglu_backward);
  TM_RECORDED(add);
  TM_RECORDED(gather_rows);
  TM_RECORDED(scatter_rows_add);
  TM_RECORDED(cross_entropy);
  TM_RECORDED(adamw);
  TM_RECORDED(sum_squares);
  TM_RECORDED(pack_group_trained);
  TM_RECORDED(group_forward);
  TM_RECORDED(group_backward);
  TM_RECORDED(group_adapter_grads);
  TM_RECORDED(copy_rows);
  TM_RECORDED(start_copy);
  TM_RECORDED(await_copy);
#undef TM_RECORDED
#undef TM_UNRECORDED
  add_recording(table);
  return &table;
}

}  // namespace tunemesh::test
