// Work on host memory by several threads, where one is slower than memory: reading and converting
// tensors.
#pragma once
#include <algorithm>
#include <future>
#include <thread>
#include <vector>

namespace tunemesh {

// work(first, count) over parts of [0, count) units, at once; a unit is `size` elements of work.
// Throws what a part throws, after all have ended.
template <typename Work>
void in_parallel_parts(size_t count, size_t size, const Work& work) {
  constexpr size_t kThreadElements = size_t{512} << 10;
  constexpr size_t kMostThreads = 8;  // these saturate a socket's memory
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t num_parts = std::min({cores, kMostThreads, 1 + count * size / kThreadElements});
  const size_t step = std::max<size_t>(1, (count + num_parts - 1) / num_parts);
  std::vector<std::future<void>> others;  // their destructors wait
  for (size_t first = step; first < count; first += step) {
    others.push_back(std::async(std::launch::async, [&work, first, step, count] {
      work(first, std::min(step, count - first));
    }));
  }
  work(0, std::min(step, count));
  for (std::future<void>& other : others) other.get();
}

}  // namespace tunemesh
