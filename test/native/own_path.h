// Files of a test that runs beside others, and beside itself.
#pragma once
#include <unistd.h>

#include <filesystem>
#include <string>

namespace tunemesh::test {

// In the temporary folder, of this process alone; the test removes what it makes there.
inline std::string own_path(const std::string& name) {
  return std::filesystem::temp_directory_path() /
         ("tunemesh-" + std::to_string(::getpid()) + "-" + name);
}

}  // namespace tunemesh::test
