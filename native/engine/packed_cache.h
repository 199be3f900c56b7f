// Keeps a machine's folder of packed models (base_weights.h) within a limit.
#pragma once
#include <cstdint>
#include <string>

namespace tunemesh {

// A model that is used again after its removal is packed again: seconds to minutes, nothing lost.
struct PackedCacheLimits {
  size_t max_files = 16;
  uintmax_t max_bytes = uintmax_t{64} << 30;
};

// Notes that the file is in use, so that it is removed last.
void touch_packed_file(const std::string& path);
// Removes the least recently used "*.weights" files beyond either limit, but never `kept`, and what
// writers left behind that were killed. A file that a process has mapped lives on for that process.
// What can't be removed is left. The caller holds the folder's lock: nobody writes or opens a file
// there meanwhile.
void prune_packed_cache(const std::string& folder, const std::string& kept,
                        const PackedCacheLimits& limits);

}  // namespace tunemesh
