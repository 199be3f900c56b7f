#include "bindings/exchange_bindings.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/exchange_task.h"
#include "bindings/method.h"

namespace tunemesh {

std::string digest_text(uint64_t digest) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(digest));
  return text;
}

namespace {

using Bytes = std::span<const uint8_t>;

struct Nothing {};
const auto kToUndefined = [](Napi::Env env, const Nothing&) { return env.Undefined(); };

const auto kToHex = [](Napi::Env env, uint64_t digest) -> Napi::Value {
  return Napi::String::New(env, digest_text(digest));
};

uint32_t number(const Napi::Value& value) {
  const double v = value.As<Napi::Number>().DoubleValue();
  if (!value.IsNumber() || v < 0 || v > UINT32_MAX ||
      v != static_cast<double>(static_cast<uint32_t>(v))) {
    throw Napi::TypeError::New(value.Env(),
                               "the exchange expects a whole number from 0 to 2^32 - 1");
  }
  return static_cast<uint32_t>(v);
}
uint32_t number(const Napi::Object& from, const char* name) { return number(from.Get(name)); }

std::vector<uint32_t> numbers(const Napi::Value& value) {
  const auto array = value.As<Napi::Array>();
  std::vector<uint32_t> out(array.Length());
  for (uint32_t i = 0; i < out.size(); ++i) out[i] = number(array.Get(i));
  return out;
}

Bytes bytes_of(const Napi::Value& value) {
  if (!value.IsTypedArray())
    throw Napi::TypeError::New(value.Env(), "a frame must be a Uint8Array");
  const auto array = value.As<Napi::Uint8Array>();
  return {array.Data(), array.ByteLength()};
}

std::vector<Bytes> frames_of(const Napi::Value& value) {
  const auto array = value.As<Napi::Array>();
  std::vector<Bytes> out;
  for (uint32_t i = 0; i < array.Length(); ++i) out.push_back(bytes_of(array.Get(i)));
  return out;
}

uint16_t half(const Napi::Object& from, const char* name) {
  const uint32_t value = number(from, name);
  if (value > UINT16_MAX) {
    throw Napi::RangeError::New(from.Env(),
                                std::string(name) + " is beyond the frame header's 65535");
  }
  return static_cast<uint16_t>(value);
}

FrameHeader header_of(const Napi::Object& from) {
  bool lossless = false;
  FrameHeader h;
  h.job_hash = from.Get("jobHash").As<Napi::BigInt>().Uint64Value(&lossless);
  h.fleet_epoch = number(from, "fleetEpoch");
  h.step = number(from, "step");
  h.slice = half(from, "slice");
  h.slice_attempt = half(from, "sliceAttempt");
  h.lease = half(from, "lease");
  h.lease_attempt = half(from, "leaseAttempt");
  return h;
}

// Chunks of one slice to pack, each into a frame slot of its own.
struct PackOrder {
  FrameHeader header;
  std::vector<uint32_t> chunks, frames;
};
PackOrder pack_order(const Napi::Object& from) {
  PackOrder order{header_of(from.Get("header").As<Napi::Object>()), numbers(from.Get("chunks")),
                  numbers(from.Get("frames"))};
  if (order.chunks.size() != order.frames.size()) {
    throw Napi::RangeError::New(from.Env(), "packing needs one frame slot for each chunk");
  }
  return order;
}
template <typename Pack>
std::vector<uint32_t> pack_all(PackOrder order, Pack pack) {
  std::vector<uint32_t> sizes;
  for (size_t i = 0; i < order.chunks.size(); ++i) {
    order.header.chunk = static_cast<uint16_t>(order.chunks[i]);
    sizes.push_back(static_cast<uint32_t>(pack(order.header, static_cast<int>(order.frames[i]))));
  }
  return sizes;
}
const auto kToSizes = [](Napi::Env env, const std::vector<uint32_t>& sizes) -> Napi::Value {
  auto array = Napi::Array::New(env, sizes.size());
  for (uint32_t i = 0; i < sizes.size(); ++i) array.Set(i, Napi::Number::New(env, sizes[i]));
  return array;
};

Napi::Value to_measures(Napi::Env env, const std::vector<SliceMeasure>& measures) {
  auto array = Napi::Array::New(env, measures.size());
  for (uint32_t i = 0; i < measures.size(); ++i) {
    auto entry = Napi::Object::New(env);
    entry.Set("digest", Napi::String::New(env, digest_text(measures[i].digest)));
    entry.Set("packedBytes", Napi::Number::New(env, static_cast<double>(measures[i].packed_bytes)));
    array.Set(i, entry);
  }
  return array;
}

Napi::Value to_finished(Napi::Env env, const FinishedSlice& finished) {
  auto out = Napi::Object::New(env);
  out.Set("sumDigest", Napi::String::New(env, digest_text(finished.sum_digest)));
  out.Set("publishedDigest", Napi::String::New(env, digest_text(finished.published_digest)));
  out.Set("sumSquares", Napi::Number::New(env, finished.sum_squares));
  return out;
}

void add_contribution_methods(Napi::Object object, const std::shared_ptr<ExchangeTasks>& handle) {
  set_method(object, "clearSlot", [handle](const Napi::CallbackInfo& info) {
    const int slot = static_cast<int>(number(info[0]));
    const auto work = [slot](ExchangeBuffers& b) {
      b.clear_slot(slot);
      return Nothing{};
    };
    return handle->run(info.Env(), work, kToUndefined, info.Env().Undefined());
  });
  set_method(object, "measureContribution", [handle](const Napi::CallbackInfo& info) {
    const int slot = static_cast<int>(number(info[0]));
    const auto work = [slot, slices = numbers(info[1])](ExchangeBuffers& b) {
      std::vector<SliceMeasure> out;
      for (const uint32_t slice : slices) out.push_back(b.measure_contribution(slot, slice));
      return out;
    };
    return handle->run(info.Env(), work, to_measures, info.Env().Undefined());
  });
  set_method(object, "packContribution", [handle](const Napi::CallbackInfo& info) {
    const int slot = static_cast<int>(number(info[0]));
    const auto work = [slot, order = pack_order(info[1].As<Napi::Object>())](ExchangeBuffers& b) {
      return pack_all(order, [&](const FrameHeader& header, int frame) {
        return b.pack_contribution(slot, header, frame);
      });
    };
    return handle->run(info.Env(), work, kToSizes, info.Env().Undefined());
  });
}

void add_owner_methods(Napi::Object object, const std::shared_ptr<ExchangeTasks>& handle) {
  set_method(object, "clearSum", [handle](const Napi::CallbackInfo& info) {
    const auto work = [slice = number(info[0])](ExchangeBuffers& b) {
      b.clear_sum(slice);
      return Nothing{};
    };
    return handle->run(info.Env(), work, kToUndefined, info.Env().Undefined());
  });
  set_method(object, "addContributionFrames", [handle](const Napi::CallbackInfo& info) {
    const auto work = [frames = frames_of(info[0])](ExchangeBuffers& b) {
      return b.add_contribution_frames(frames);
    };
    return handle->run(info.Env(), work, kToHex, info[0]);
  });
  set_method(object, "addOwnContribution", [handle](const Napi::CallbackInfo& info) {
    const int slot = static_cast<int>(number(info[0]));
    const auto work = [slot, slice = number(info[1])](ExchangeBuffers& b) {
      return b.add_own_contribution(slot, slice);
    };
    return handle->run(info.Env(), work, kToHex, info.Env().Undefined());
  });
  set_method(object, "finishSlice", [handle](const Napi::CallbackInfo& info) {
    const auto work = [step = number(info[0]), slice = number(info[1])](ExchangeBuffers& b) {
      return b.finish_slice(step, slice);
    };
    return handle->run(info.Env(), work, to_finished, info.Env().Undefined());
  });
}

void add_published_methods(Napi::Object object, const std::shared_ptr<ExchangeTasks>& handle) {
  set_method(object, "packPublished", [handle](const Napi::CallbackInfo& info) {
    const auto work = [order = pack_order(info[0].As<Napi::Object>())](ExchangeBuffers& b) {
      return pack_all(order, [&](const FrameHeader& header, int frame) {
        return b.pack_published(header, frame);
      });
    };
    return handle->run(info.Env(), work, kToSizes, info.Env().Undefined());
  });
  set_method(object, "storePublishedFrames", [handle](const Napi::CallbackInfo& info) {
    const auto work = [frames = frames_of(info[0])](ExchangeBuffers& b) {
      for (const Bytes frame : frames) b.store_published_frame(frame);
      return Nothing{};
    };
    return handle->run(info.Env(), work, kToUndefined, info[0]);
  });
  set_method(object, "publishedDigest", [handle](const Napi::CallbackInfo& info) {
    const auto work = [step = number(info[0]), slice = number(info[1])](ExchangeBuffers& b) {
      return b.published_digest(step, slice);
    };
    return handle->run(info.Env(), work, kToHex, info.Env().Undefined());
  });
  // On the caller's thread: null, or what is wrong with the frame. About 50 microseconds a MiB.
  set_method(object, "frameFault", [handle](const Napi::CallbackInfo& info) -> Napi::Value {
    FrameHeader header;
    const FrameFault fault = parse_frame(bytes_of(info[0]), handle->buffers().limits(), &header);
    if (fault == FrameFault::kNone) return info.Env().Null();
    return Napi::String::New(info.Env(), frame_fault_text(fault));
  });
}

Napi::Object make_handle(Napi::Env env, const std::shared_ptr<ExchangeTasks>& handle) {
  auto object = Napi::Object::New(env);
  const ExchangeOptions& options = handle->buffers().options();
  object.Set("numBlocks", Napi::Number::New(env, static_cast<double>(options.num_blocks)));
  object.Set("sliceBlocks", Napi::Number::New(env, static_cast<double>(options.slice_blocks)));
  object.Set("chunkBlocks", Napi::Number::New(env, static_cast<double>(options.chunk_blocks)));
  object.Set("significantBits", Napi::Number::New(env, options.significant_bits));
  object.Set("numContributionSlots", Napi::Number::New(env, options.num_contribution_slots));
  const auto slabs = handle->buffers().frames();
  object.Set("frames",
             Napi::ArrayBuffer::New(env, slabs.data(), slabs.size(),
                                    [keep = handle->shared_buffers()](Napi::Env, void*) {}));
  add_contribution_methods(object, handle);
  add_owner_methods(object, handle);
  add_published_methods(object, handle);
  return object;
}

// Buffers with memory of their own.
struct OwnedExchange {
  explicit OwnedExchange(const ExchangeOptions& options) {
    const ExchangePlan plan = ExchangeBuffers::plan(options);
    memory.resize(plan.total() + 64);
    auto* at =
        reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    const auto take = [&at](size_t bytes) { return std::exchange(at, at + bytes); };
    const ExchangeMemory pointers{take(plan.contribution_bytes), take(plan.sum_bytes),
                                  take(plan.published_bytes), take(plan.frame_bytes),
                                  take(plan.scratch_bytes)};
    buffers.emplace(options, pointers);
  }
  std::vector<uint8_t> memory;
  std::optional<ExchangeBuffers> buffers;
};

// A whole gradient, slice by slice and measured, as the engine does with a lease's last
// micro-batch.
void round_whole(ExchangeBuffers& b, int slot, std::span<const float> gradient) {
  if (gradient.size() != b.options().num_blocks * kBlockElements)
    throw EngineError("INTERNAL", "the gradient has another size than the exchange");
  const bool is_first = b.take_cleared(slot);
  int64_t* values = b.contribution(slot);
  for (size_t slice = 0; slice < b.num_slices(); ++slice) {
    size_t bad_block = 0;
    const size_t first = b.slice_first_block(slice), offset = first * kBlockElements;
    const TmRoundAndAdd call = {gradient.data() + offset, values + offset,
                                b.slice_num_blocks(slice), b.options().significant_bits,
                                &bad_block};
    RangeMeasure measure{0, 0};
    const TmStatus status = is_first ? round_to_measured(call, first, &measure)
                                     : round_and_add_measured(call, first, &measure);
    if (status != TM_OK) {
      b.poison(slot);
      throw EngineError(status == TM_NON_FINITE ? "NON_FINITE_GRADIENT" : "GRADIENT_OUT_OF_RANGE",
                        "block " + std::to_string(first + bad_block) +
                            " of the gradient does not fit the exchange");
    }
    const size_t headers = b.num_chunks(slice) * kFrameHeaderBytes;
    b.note_measure(slot, slice, {measure.digest, measure.packed_bytes + headers});
  }
}

Napi::Value create_exchange(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const auto from = info[0].As<Napi::Object>();
  ExchangeOptions options;
  options.num_blocks = number(from, "numBlocks");
  options.slice_blocks = number(from, "sliceBlocks");
  options.chunk_blocks = number(from, "chunkBlocks");
  options.significant_bits = static_cast<int>(number(from, "significantBits"));
  options.num_contribution_slots = static_cast<int>(number(from, "numContributionSlots"));
  const auto owned = std::make_shared<OwnedExchange>(options);
  const std::shared_ptr<ExchangeBuffers> buffers(owned, &*owned->buffers);
  const auto handle = std::make_shared<ExchangeTasks>(env, buffers);
  Napi::Object object = make_handle(env, handle);
  set_method(object, "roundAndAdd", [handle](const Napi::CallbackInfo& info) {
    const int slot = static_cast<int>(number(info[0]));
    const auto gradient = info[1].As<Napi::Float32Array>();
    const auto work = [slot, values = std::span<const float>(
                                 gradient.Data(), gradient.ElementLength())](ExchangeBuffers& b) {
      round_whole(b, slot, values);
      return Nothing{};
    };
    return handle->run(info.Env(), work, kToUndefined, info[1]);
  });
  set_method(object, "published", [handle, buffers](const Napi::CallbackInfo& info) -> Napi::Value {
    const size_t bytes = buffers->options().num_blocks * kBlockElements * sizeof(float);
    auto copy = Napi::ArrayBuffer::New(info.Env(), bytes);
    std::memcpy(copy.Data(), buffers->published(number(info[0])), bytes);
    return Napi::Float32Array::New(info.Env(), bytes / sizeof(float), copy, 0);
  });
  return object;
}

}  // namespace

Napi::Object make_exchange_handle(Napi::Env env, std::shared_ptr<ExchangeBuffers> buffers) {
  return make_handle(env, std::make_shared<ExchangeTasks>(env, std::move(buffers)));
}

void register_exchange(Napi::Env env, Napi::Object exports) {
  exports.Set("createExchange",
              Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                try {
                  return create_exchange(info);
                } catch (const EngineError& error) {
                  throw to_error(info.Env(), TaskFailure{error.code(), error.what()});
                }
              }));
}

}  // namespace tunemesh
