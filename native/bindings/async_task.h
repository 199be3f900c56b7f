// Work on an engine's thread that answers with a promise.
//
// The engine's thread never touches a JavaScript value: work() makes a T there, to_js() turns it
// into a value on the JavaScript thread, which is also where every reference is released. The
// process is kept alive only while tasks are under way.
#pragma once
#include <napi.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "engine/command_thread.h"
#include "engine/error.h"

namespace tunemesh {

inline Napi::Error js_error(Napi::Env env, const EngineError& error) {
  Napi::Error made = Napi::Error::New(env, error.what());
  made.Set("code", Napi::String::New(env, error.code()));
  made.Set("subject", Napi::String::New(env, error.subject()));
  return made;
}

// The way from an engine's thread to JavaScript. Made and ended on the JavaScript thread.
class TaskQueue : public std::enable_shared_from_this<TaskQueue> {
 public:
  explicit TaskQueue(Napi::Env env) : env_(env) {
    const auto nothing = Napi::Function::New(env, [](const Napi::CallbackInfo&) {});
    reply_ = Napi::ThreadSafeFunction::New(env, nothing, "tunemesh engine", 0, 1);
    reply_.Unref(env);
    // Runs before the environment closes the thread-safe function, which nobody may touch after.
    cleanup_ = env.AddCleanupHook(std::function<void()>([this] { close(); }));
  }
  ~TaskQueue() {
    if (is_closed_) return;
    cleanup_.Remove(env_);
    close();
  }

  // Asks long commands to end early; they look at it.
  std::atomic<bool>& is_ending() { return is_ending_; }
  CommandThread& thread() { return thread_; }

  // From the engine's thread, inside a task: runs `callback` on the JavaScript thread, before the
  // task is settled.
  void call_js(std::function<void(Napi::Env)> callback) {
    auto* held = new std::function<void(Napi::Env)>(std::move(callback));
    const napi_status status = reply_.BlockingCall(
        held, [](Napi::Env env, Napi::Function, std::function<void(Napi::Env)>* run) {
          const std::unique_ptr<std::function<void(Napi::Env)>> owned(run);
          (*owned)(env);
        });
    // The environment is ending: nobody will run it, and its references can't be released from this
    // thread.
    (void)status;
  }

  void begin(Napi::Env env) {
    if (num_running_++ == 0) reply_.Ref(env);
  }
  void end(Napi::Env env) {
    if (--num_running_ == 0) reply_.Unref(env);
  }

 private:
  using Hook = decltype(std::declval<Napi::Env>().AddCleanupHook(std::function<void()>()));

  void close() {
    is_ending_ = true;
    thread_.stop();
    reply_.Release();
    is_closed_ = true;
  }

  Napi::Env env_;
  Napi::ThreadSafeFunction reply_;
  Hook cleanup_;
  bool is_closed_ = false;  // JavaScript thread only, as num_running_
  size_t num_running_ = 0;
  std::atomic<bool> is_ending_{false};
  CommandThread thread_;
};

template <class T>
struct AsyncTask {
  std::shared_ptr<TaskQueue> queue;
  std::function<T()> work;
  std::function<Napi::Value(Napi::Env, T&)> to_js;
  // On the JavaScript thread before the promise settles, whatever happened: lets references go.
  std::function<void()> release = [] {};

  Napi::Promise start(Napi::Env env) {
    struct Running {
      AsyncTask task;
      Napi::Promise::Deferred deferred;
      std::optional<T> result;
      std::optional<EngineError> failure;
    };
    auto running = std::make_shared<Running>(
        Running{std::move(*this), Napi::Promise::Deferred::New(env), {}, {}});
    const Napi::Promise promise = running->deferred.Promise();
    const std::shared_ptr<TaskQueue> owner = running->task.queue;
    auto settle = [running](Napi::Env settle_env) {
      // Taken out here: the engine's thread may hold `running` a moment longer, and must not be the
      // one that lets the queue go, whose end joins that very thread.
      const auto last = std::move(running->task.queue);
      const auto to_js = std::move(running->task.to_js);
      last->end(settle_env);
      running->task.release();
      if (running->failure) {
        running->deferred.Reject(js_error(settle_env, *running->failure).Value());
        return;
      }
      running->deferred.Resolve(to_js(settle_env, *running->result));
    };
    owner->begin(env);
    try {
      owner->thread().post([running, settle] {
        try {
          running->result.emplace(running->task.work());
        } catch (const EngineError& error) {
          running->failure = error;
        } catch (const std::bad_alloc&) {
          running->failure = EngineError("DEVICE_MEMORY_SHORT", "the host is out of memory.");
        } catch (const std::exception& error) {
          running->failure = EngineError("INTERNAL", error.what());
        }
        running->task.work = nullptr;
        running->task.queue->call_js(settle);
      });
    } catch (const EngineError& error) {
      running->failure = error;
      settle(env);
    }
    return promise;
  }
};

}  // namespace tunemesh
