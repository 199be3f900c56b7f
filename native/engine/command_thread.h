// The one thread that issues an engine's work, fed by a bounded queue.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "engine/error.h"

namespace tunemesh {

class CommandThread {
 public:
  CommandThread() : thread_([this] { run(); }) {}
  ~CommandThread() { stop(); }
  CommandThread(const CommandThread&) = delete;
  CommandThread& operator=(const CommandThread&) = delete;

  // Commands run in order and must not throw. Throws ENGINE_FAILED once stop() was called, or where
  // kMaxQueued wait.
  void post(std::function<void()> command) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_stopping_) throw EngineError("ENGINE_FAILED", "the engine is closed.");
    if (queue_.size() >= kMaxQueued) {
      throw EngineError("ENGINE_FAILED", std::to_string(queue_.size()) +
                                             " commands wait for the engine; that is the limit.");
    }
    queue_.push_back(std::move(command));
    wake_.notify_one();
  }

  // Takes no more commands, lets those already queued run, and waits for the end.
  void stop() {
    refuse_more();
    if (thread_.joinable()) thread_.join();
  }
  // The first half of stop(), for a caller that must not wait.
  void refuse_more() {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
    wake_.notify_one();
  }

 private:
  static constexpr size_t kMaxQueued = 1024;

  void run() {
    while (true) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::function<void()> command = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      command();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool is_stopping_ = false;
  std::thread thread_;  // last: starts when the rest is ready
};

}  // namespace tunemesh
