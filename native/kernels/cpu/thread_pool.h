// A fixed pool of threads that sleep between jobs: the machine is shared with other workers, so
// nobody spins. One thread at a time (the engine's) calls parallel_for; it works along.
#pragma once
#include <stddef.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace tunemesh {

// CPUs this process may use: the affinity mask, cut by the cgroup's quota (rounded up). At least 1.
int usable_cpus();

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // 0 = usable_cpus()
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls fn(task, thread) for every task in [0, num_tasks), thread in [0, num_threads()), and
  // returns when all are done. Each thread has an equal, contiguous share of the tasks (so that
  // rows stay in the cache of the core that computed them last) and, when done with it, takes tasks
  // of the others. So a task's result must not depend on `thread`, which is only an index for
  // scratch memory. fn must not throw and must not call parallel_for. Allocates nothing.
  template <typename F>
  void parallel_for(size_t num_tasks, const F& fn) {
    run(
        num_tasks,
        [](const void* f, size_t task, int thread) { (*static_cast<const F*>(f))(task, thread); },
        &fn);
  }

 private:
  using Body = void (*)(const void* fn, size_t task, int thread);

  // The tasks of one thread's share that nobody has taken yet.
  struct alignas(64) Share {
    std::atomic<size_t> next{0};
    size_t end = 0;
  };

  void run(size_t num_tasks, Body body, const void* fn);
  void take_tasks(int thread);
  void work(int thread);

  int num_threads_;
  std::vector<std::thread> threads_;
  std::vector<Share> shares_;

  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  // Written under mutex_ while no thread is busy; read by the busy ones.
  Body body_ = nullptr;
  const void* fn_ = nullptr;
  unsigned long generation_ = 0;
  int num_busy_ = 0;
  bool is_open_ = false, is_stopping_ = false;
};

// Calls fn(begin, end) on ranges of at most `grain` that cover [0, n).
template <typename F>
void parallel_ranges(ThreadPool& pool, size_t n, size_t grain, const F& fn) {
  pool.parallel_for((n + grain - 1) / grain, [&](size_t task, int) {
    const size_t begin = task * grain;
    fn(begin, begin + grain < n ? begin + grain : n);
  });
}

}  // namespace tunemesh
