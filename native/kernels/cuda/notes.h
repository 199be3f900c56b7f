// What a person should hear of once: a way around that works and costs time.
#pragma once
#include <deque>
#include <set>
#include <string>

namespace tunemesh::cuda {

class Notes {
 public:
  // Kept until it is taken; a second note of the same `about` is dropped, and all beyond kMost.
  void add(const std::string& about, const std::string& line) {
    if (known_.size() >= kMost || !known_.insert(about).second) return;
    waiting_.push_back(line);
  }
  // Lives until the next call; null: none waits.
  const char* take() {
    if (waiting_.empty()) return nullptr;
    taken_ = std::move(waiting_.front());
    waiting_.pop_front();
    return taken_.c_str();
  }

 private:
  static constexpr size_t kMost = 32;

  std::set<std::string> known_;
  std::deque<std::string> waiting_;
  std::string taken_;
};

}  // namespace tunemesh::cuda
