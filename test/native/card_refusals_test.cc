// The words for drivers and cards that can't be used; needs no CUDA.
#include "kernels/cuda/card_refusals.h"

#include "test_check.h"

namespace tunemesh::test {
namespace {

using namespace tunemesh::cuda;

void expect(const std::string& found, const std::string& wanted) {
  CHECK(found == wanted, "\"" + found + "\", not \"" + wanted + "\"");
}

void test_drivers() {
  expect(refused_driver(13000, 13000), "");
  expect(refused_driver(13020, 13000), "");
  expect(refused_driver(14000, 13000), "");
  expect(refused_driver(0, 13000),
         "no NVIDIA driver is loaded; for GPUs, install NVIDIA's driver 580 or newer");
  expect(refused_driver(12090, 13000),
         "the driver is for CUDA 12.9, this program needs 13.0: install NVIDIA's driver 580 or "
         "newer");
}

void test_cards() {
  expect(refused_card("NVIDIA H100 80GB HBM3", 9, 0), "");
  expect(refused_card("NVIDIA A100", 8, 0), "");
  expect(refused_card("Tesla V100", 7, 0),
         "Tesla V100 is sm_70; cards from sm_80 on are supported (Ampere: A100, RTX 30 and newer). "
         "Use the CPU, by --device cpu, or another card");
  CHECK(refused_card("Tesla T4", 7, 5).starts_with("Tesla T4 is sm_75; "), "a T4 is not refused");
}

void test_memory() {
  expect(memory_text(0), "0 bytes");
  expect(memory_text(1023), "1023 bytes");
  expect(memory_text(1536), "1.5 KiB");
  expect(memory_text(size_t{80} << 30), "80.0 GiB");
  expect(memory_text(size_t{1} << 46), "64.0 TiB");
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  test_drivers();
  test_cards();
  test_memory();
  return finish("card_refusals_test");
}
