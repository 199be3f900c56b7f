// The folder of packed models stays within its limits.
#include "engine/packed_cache.h"

#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <set>
#include <vector>

#include "test/native/test_check.h"

namespace tunemesh::test {
namespace {

namespace fs = std::filesystem;

// Files of 100 bytes, the first one used longest ago.
struct Folder {
  fs::path path = fs::temp_directory_path() / ("packed-cache-" + std::to_string(::getpid()));
  explicit Folder(const std::vector<std::string>& names) {
    fs::remove_all(path);
    fs::create_directories(path);
    auto used = fs::file_time_type::clock::now() - std::chrono::hours(names.size());
    for (const std::string& name : names) {
      std::ofstream(path / name) << std::string(100, 'x');
      fs::last_write_time(path / name, used);
      used += std::chrono::hours(1);
    }
  }
  ~Folder() { fs::remove_all(path); }
  std::set<std::string> files() const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(path)) names.insert(entry.path().filename());
    return names;
  }
};

using Names = std::set<std::string>;

void check_limits() {
  Folder folder({"a.weights", "b.weights", "c.weights", "lock"});
  prune_packed_cache(folder.path, folder.path / "c.weights", {3, 300});
  CHECK(folder.files() == (Names{"a.weights", "b.weights", "c.weights", "lock"}),
        "at both limits nothing is removed");
  prune_packed_cache(folder.path, folder.path / "c.weights", {3, 299});
  CHECK(folder.files() == (Names{"b.weights", "c.weights", "lock"}),
        "a byte over the limit removes the least recently used file");
  prune_packed_cache(folder.path, folder.path / "c.weights", {1, 299});
  CHECK(folder.files() == (Names{"c.weights", "lock"}), "a file over the limit is removed");
}

void check_kept() {
  Folder folder({"a.weights", "b.weights"});
  prune_packed_cache(folder.path, folder.path / "a.weights", {1, 10});
  CHECK(folder.files() == Names{"a.weights"}, "the kept file stays, though old and too large");
}

void check_left_behind() {
  Folder folder({"a.weights", "b.weights.tmp-7-0", "other"});
  prune_packed_cache(folder.path, folder.path / "a.weights", {3, 300});
  CHECK(folder.files() == (Names{"a.weights", "other"}), "what a killed writer left stays");
}

void check_touch() {
  Folder folder({"a.weights", "b.weights", "c.weights"});
  touch_packed_file(folder.path / "a.weights");
  prune_packed_cache(folder.path, folder.path / "c.weights", {2, 1000});
  CHECK(folder.files() == (Names{"a.weights", "c.weights"}), "a file just used outlives others");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  tunemesh::test::check_limits();
  tunemesh::test::check_kept();
  tunemesh::test::check_left_behind();
  tunemesh::test::check_touch();
  return tunemesh::test::finish("packed_cache_test");
}
