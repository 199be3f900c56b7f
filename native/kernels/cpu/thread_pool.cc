#include "kernels/cpu/thread_pool.h"

#include <sched.h>
#include <stdio.h>

#include <algorithm>
#include <string>

namespace tunemesh {
namespace {

// The quota of one cgroup in CPUs, rounded up; 0 where there is none.
int quota_of(const char* path) {
  FILE* file = fopen(path, "r");
  if (!file) return 0;
  long quota = 0, period = 0;
  const bool is_limited = fscanf(file, "%ld %ld", &quota, &period) == 2;
  fclose(file);
  if (!is_limited || quota <= 0 || period <= 0) return 0;
  return static_cast<int>((quota + period - 1) / period);
}

long number_in(const char* path) {
  FILE* file = fopen(path, "r");
  if (!file) return -1;
  long value = -1;
  if (fscanf(file, "%ld", &value) != 1) value = -1;
  fclose(file);
  return value;
}

int cgroup_quota() {
  // Inside a container the process's own group is the mounted root, in version 2 and in version 1.
  if (const int cpus = quota_of("/sys/fs/cgroup/cpu.max")) return cpus;
  const long quota = number_in("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  const long period = number_in("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (quota > 0 && period > 0) return static_cast<int>((quota + period - 1) / period);
  // On a plain system the group is named in /proc/self/cgroup ("0::/path").
  FILE* file = fopen("/proc/self/cgroup", "r");
  if (!file) return 0;
  char line[512];
  int cpus = 0;
  while (fgets(line, sizeof line, file)) {
    std::string text(line);
    if (text.rfind("0::", 0) != 0) continue;
    text.erase(text.find_last_not_of("\n") + 1);
    cpus = quota_of(("/sys/fs/cgroup" + text.substr(3) + "/cpu.max").c_str());
  }
  fclose(file);
  return cpus;
}

}  // namespace

int usable_cpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
  if (const int quota = cgroup_quota()) cpus = std::min(cpus, quota);
  return std::max(cpus, 1);
}

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads > 0 ? num_threads : usable_cpus()),
      shares_(static_cast<size_t>(num_threads_)) {
  threads_.reserve(static_cast<size_t>(num_threads_ - 1));
  for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(size_t num_tasks, Body body, const void* fn) {
  if (num_tasks <= 1 || num_threads_ == 1) {
    for (size_t task = 0; task < num_tasks; task++) body(fn, task, 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    body_ = body;
    fn_ = fn;
    for (size_t i = 0; i < shares_.size(); i++) {
      shares_[i].next.store(num_tasks * i / shares_.size(), std::memory_order_relaxed);
      shares_[i].end = num_tasks * (i + 1) / shares_.size();
    }
    generation_++;
    is_open_ = true;
  }
  if (num_tasks >= static_cast<size_t>(num_threads_)) {
    wake_.notify_all();
  } else {
    for (size_t i = 1; i < num_tasks; i++) wake_.notify_one();
  }
  take_tasks(0);
  // A thread that has not woken yet finds the job closed and goes back to sleep: nobody waits for
  // it.
  std::unique_lock<std::mutex> lock(mutex_);
  is_open_ = false;
  idle_.wait(lock, [this] { return num_busy_ == 0; });
}

void ThreadPool::take_tasks(int thread) {
  for (int i = 0; i < num_threads_; i++) {
    Share& share = shares_[static_cast<size_t>((thread + i) % num_threads_)];
    for (;;) {
      const size_t task = share.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= share.end) break;
      body_(fn_, task, thread);
    }
  }
}

void ThreadPool::work(int thread) {
  unsigned long seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return is_stopping_ || (is_open_ && generation_ != seen); });
    if (is_stopping_) return;
    seen = generation_;
    num_busy_++;
    lock.unlock();
    take_tasks(thread);
    lock.lock();
    if (--num_busy_ == 0) idle_.notify_one();
  }
}

}  // namespace tunemesh
