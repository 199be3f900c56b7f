// Checks that run once on each instruction path of the codec.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "engine/codec.h"

namespace tunemesh::test {

inline int failures = 0;
#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      if (++::tunemesh::test::failures > 20) std::exit(1);                \
    }                                                                     \
  } while (false)

inline int passed = 0, failed = 0, skipped = 0;

inline void run(const char* path, const char* name, void (*test)()) {
  const int before = failures;
  test();
  (failures == before ? passed : failed)++;
  if (failures != before) std::printf("not ok: %s: %s\n", path, name);
}

// Calls run_all(path) with each path set; the exit code of the program.
inline int run_on_every_path(const char* program, void (*run_all)(const char*)) {
  const struct {
    CodecPath path;
    const char* name;
  } paths[] = {
      {CodecPath::kGeneric, "generic"}, {CodecPath::kAvx2, "avx2"}, {CodecPath::kAvx512, "avx512"}};
  for (const auto& p : paths) {
    if (set_codec_path(p.path)) {
      std::printf("codec path %s\n", p.name);
      run_all(p.name);
    } else {
      std::printf("skipped: codec path %s is not on this processor\n", p.name);
      ++skipped;
    }
  }
  std::printf("%s: %d passed, %d failed, %d skipped\n", program, passed, failed, skipped);
  return failed == 0 ? 0 : 1;
}

}  // namespace tunemesh::test
