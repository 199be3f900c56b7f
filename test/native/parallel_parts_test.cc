// Work in parts (kernels/parallel_parts.h): every unit once, in one part or in several, and an
// error of any part reaches the caller.
#include "kernels/parallel_parts.h"

#include <atomic>
#include <string>

#include "test_check.h"

namespace tunemesh::test {
namespace {

void test_units(size_t count, size_t size) {
  std::vector<std::atomic<int>> seen(count);
  std::atomic<size_t> num_parts = 0;
  in_parallel_parts(count, size, [&](size_t first, size_t part) {
    ++num_parts;
    for (size_t i = first; i < first + part; ++i) ++seen.at(i);
  });
  const std::string what = std::to_string(count) + " units of " + std::to_string(size);
  size_t num_once = 0;
  for (const std::atomic<int>& times : seen) num_once += times == 1;
  CHECK(num_once == count, what + ": " + std::to_string(num_once) + " once");
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const bool is_large = count > 1 && count * size > size_t{1} << 20;
  if (is_large && cores > 1) CHECK(num_parts > 1, what + " in one part");
  CHECK(num_parts <= std::max<size_t>(1, std::min<size_t>(count, 8)), what + ": too many parts");
}

void test_error(size_t bad_unit) {
  constexpr size_t kCount = 64, kSize = size_t{1} << 20;
  CHECK_THROWS(in_parallel_parts(kCount, kSize,
                                 [&](size_t first, size_t part) {
                                   if (first <= bad_unit && bad_unit < first + part) {
                                     throw EngineError("MODEL_INVALID", "bad unit");
                                   }
                                 }),
               "MODEL_INVALID", "bad unit");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (const size_t count : {0, 1, 2, 7, 8, 9, 1023}) {
    for (const size_t size : {size_t{1}, size_t{4096}, size_t{3} << 20}) test_units(count, size);
  }
  test_units((size_t{3} << 20) + 5, 1);
  for (const size_t unit : {0, 1, 31, 63}) test_error(unit);
  return finish("parallel_parts_test");
}
