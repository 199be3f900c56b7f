// Work on the exchange thread that answers with a promise.
#pragma once
#include <napi.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "engine/exchange_buffers.h"

namespace tunemesh {

struct TaskFailure {
  std::string code, message;
};

inline Napi::Error to_error(Napi::Env env, const TaskFailure& failure) {
  Napi::Error error = Napi::Error::New(env, failure.message);
  error.Set("code", Napi::String::New(env, failure.code));
  return error;
}

// The buffers and the way back to the JavaScript thread, which keeps the process alive only while
// tasks are under way. Created and destroyed on the JavaScript thread: each task holds it until it
// is settled there, so the exchange thread never lets the last reference go.
class ExchangeTasks : public std::enable_shared_from_this<ExchangeTasks> {
 public:
  ExchangeTasks(Napi::Env env, std::shared_ptr<ExchangeBuffers> buffers)
      : env_(env), buffers_(std::move(buffers)) {
    const auto nothing = Napi::Function::New(env, [](const Napi::CallbackInfo&) {});
    reply_ = Napi::ThreadSafeFunction::New(env, nothing, "tunemesh exchange", 0, 1);
    reply_.Unref(env);
    // Runs before the environment closes the thread-safe function, which nobody may call after.
    cleanup_ = env.AddCleanupHook(std::function<void()>([this] { close(); }));
  }
  ~ExchangeTasks() {
    if (is_closed_) return;
    cleanup_.Remove(env_);
    reply_.Release();
  }

  ExchangeBuffers& buffers() { return *buffers_; }
  const std::shared_ptr<ExchangeBuffers>& shared_buffers() const { return buffers_; }

  // Runs work(buffers) on the exchange thread and resolves with convert(env, result). `pins`, where
  // it is an object, lives until then: memory that the work reads.
  template <typename Work, typename Convert>
  Napi::Value run(Napi::Env env, Work work, Convert convert, Napi::Value pins);

 private:
  using Hook = decltype(std::declval<Napi::Env>().AddCleanupHook(std::function<void()>()));

  template <typename Result>
  struct Task {
    std::shared_ptr<ExchangeTasks> tasks;
    Napi::Promise::Deferred deferred;
    Napi::ObjectReference pins;
    std::optional<Result> result;
    std::optional<TaskFailure> failure;
  };

  void begin(Napi::Env env) {
    if (num_running_++ == 0) reply_.Ref(env);
  }
  void end(Napi::Env env) {
    if (--num_running_ == 0) reply_.Unref(env);
  }

  // Waits for the tasks under way; their promises will not be settled any more.
  void close() {
    is_closed_ = true;
    buffers_->stop();
  }

  Napi::Env env_;
  std::shared_ptr<ExchangeBuffers> buffers_;
  Napi::ThreadSafeFunction reply_;
  Hook cleanup_;
  bool is_closed_ = false;
  size_t num_running_ = 0;  // JavaScript thread only
};

template <typename Work, typename Convert>
Napi::Value ExchangeTasks::run(Napi::Env env, Work work, Convert convert, Napi::Value pins) {
  using Result = decltype(work(*buffers_));
  auto* task = new Task<Result>{shared_from_this(), Napi::Promise::Deferred::New(env), {}, {}, {}};
  const Napi::Promise promise = task->deferred.Promise();
  if (pins.IsObject()) task->pins = Napi::Persistent(pins.As<Napi::Object>());
  const auto settle = [task, convert](Napi::Env env, Napi::Function) {
    const std::unique_ptr<Task<Result>> owned(task);
    owned->tasks->end(env);
    if (owned->failure) {
      owned->deferred.Reject(to_error(env, *owned->failure).Value());
    } else {
      owned->deferred.Resolve(convert(env, *owned->result));
    }
  };
  begin(env);
  try {
    buffers_->post([task, work, settle] {
      // A copy of the raw handle: the task may be settled and gone before the call returns.
      const Napi::ThreadSafeFunction reply(task->tasks->reply_);
      try {
        task->result = work(*task->tasks->buffers_);
      } catch (const EngineError& error) {
        task->failure = TaskFailure{error.code(), error.what()};
      } catch (const std::exception& error) {
        task->failure = TaskFailure{"INTERNAL", error.what()};
      }
      reply.BlockingCall(settle);
    });
  } catch (const EngineError& error) {
    task->failure = TaskFailure{error.code(), error.what()};
    settle(env, Napi::Function());
  }
  return promise;
}

}  // namespace tunemesh
