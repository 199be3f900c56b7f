// The exchange's face for JavaScript (worker/exchange-buffers.ts types it).
#pragma once
#include <napi.h>

#include <memory>
#include <string>

#include "engine/exchange_buffers.h"

namespace tunemesh {

// 16 hex digits.
std::string digest_text(uint64_t digest);

// A plain object of methods over `buffers`, the engine's exchangeHandle. The pointer keeps the
// buffers and their frames alive as long as JavaScript holds the handle or its frames; all other
// memory ends with the engine, after which the methods are refused.
Napi::Object make_exchange_handle(Napi::Env env, std::shared_ptr<ExchangeBuffers> buffers);

// Adds createExchange(options): buffers on memory of their own, without an engine, for tests and
// benchmarks; its handle has two methods more: roundAndAdd(slot, gradient) and published(step).
void register_exchange(Napi::Env env, Napi::Object exports);

}  // namespace tunemesh
