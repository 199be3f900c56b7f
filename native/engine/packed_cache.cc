#include "engine/packed_cache.h"

#include <algorithm>
#include <filesystem>
#include <vector>

namespace tunemesh {

namespace fs = std::filesystem;

void touch_packed_file(const std::string& path) {
  std::error_code ignored;
  fs::last_write_time(path, fs::file_time_type::clock::now(), ignored);
}

void prune_packed_cache(const std::string& folder, const std::string& kept,
                        const PackedCacheLimits& limits) {
  struct File {
    fs::path path;
    fs::file_time_type used;
    uintmax_t bytes;
  };
  std::vector<File> others;
  std::vector<fs::path> left_behind;
  size_t num_files = 0;
  uintmax_t num_bytes = 0;
  std::error_code failure;
  for (const auto& entry : fs::directory_iterator(folder, failure)) {
    const bool is_left_behind =
        entry.path().filename().string().find(".weights.tmp-") != std::string::npos;
    if (is_left_behind) left_behind.push_back(entry.path());
    if (entry.path().extension() != ".weights") continue;
    const File file = {entry.path(), entry.last_write_time(failure), entry.file_size(failure)};
    if (failure) continue;
    ++num_files;
    num_bytes += file.bytes;
    if (file.path != fs::path(kept)) others.push_back(file);
  }
  for (const fs::path& path : left_behind) fs::remove(path, failure);
  std::sort(others.begin(), others.end(),
            [](const File& a, const File& b) { return a.used < b.used; });
  for (const File& file : others) {
    if (num_files <= limits.max_files && num_bytes <= limits.max_bytes) return;
    if (!fs::remove(file.path, failure)) continue;
    --num_files;
    num_bytes -= file.bytes;
  }
}

}  // namespace tunemesh
