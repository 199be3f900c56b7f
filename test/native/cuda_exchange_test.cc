// Rounding and packing of the exchange on a card: the accumulators, wire bytes and digests of the
// CPU's codec, to the bit, on random odd sizes; failures are told by the first bad block.
//
//   cuda_exchange_test [--small] [tunemesh_cuda.so]; the plugin is otherwise sought in build/native
//
// The same checks run on the host's own entries (host_exchange.h) first, which need no card.
#include <cstring>

#include "codec_inputs.h"
#include "cuda_device.h"
#include "engine/device.h"
#include "host_exchange.h"
#include "test_check.h"
#include "test_options.h"

namespace tunemesh::test {
namespace {

// Memory of the device that starts as poison or as what the host has.
template <class T>
class OnDevice {
 public:
  OnDevice(const Device& device, size_t count) : device_(device), count_(count) {
    TM_RUN(device_, allocate, count * sizeof(T), &at_);
    std::vector<T> poison(count);
    std::memset(poison.data(), 0xa5, count * sizeof(T));
    set(poison);
  }
  OnDevice(const Device& device, const std::vector<T>& values) : OnDevice(device, values.size()) {
    set(values);
  }
  ~OnDevice() { device_.ops().release(device_.context(), at_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* at() const { return static_cast<T*>(at_); }
  void set(const std::vector<T>& values) {
    TM_RUN(device_, copy_in, at_, values.data(), values.size() * sizeof(T));
  }
  std::vector<T> values() const {
    std::vector<T> host(count_);
    TM_RUN(device_, copy_out, host.data(), at_, count_ * sizeof(T));
    return host;
  }

 private:
  const Device& device_;
  size_t count_;
  void* at_ = nullptr;
};

std::string named(const Device& device, const std::string& what) {
  return std::string(device.ops().name) + ": " + what;
}

// Some gradients one after the other, the first one over poison.
void test_rounding(const Device& device, size_t num_blocks, int bits) {
  const std::string what = named(device, "rounding of " + std::to_string(num_blocks) +
                                             " blocks to " + std::to_string(bits) + " bits");
  const OnDevice<uint64_t> outcome(device, std::vector<uint64_t>{0});
  const OnDevice<int64_t> sums(device, num_blocks * kBlockElements);
  Fixed wanted(num_blocks * kBlockElements);
  for (int round = 0; round < 3; ++round) {
    const Floats gradient = gradient_like(num_blocks, 7 * num_blocks + static_cast<size_t>(round));
    const OnDevice<float> values(device, gradient);
    const TmRoundAndAdd call = {gradient.data(), wanted.data(), num_blocks, bits, nullptr};
    CHECK((round == 0 ? round_to(call) : round_and_add(call)) == TM_OK, what + ": the CPU fails");
    // In two ranges, as parts of backward come.
    const size_t cut = num_blocks / 3;
    for (const NumberedBlocks& range : {NumberedBlocks{cut, num_blocks - cut}, {0, cut}}) {
      const size_t offset = range.first_block * kBlockElements;
      const TmRoundBlocks part = {values.at() + offset, sums.at() + offset, range.num_blocks, bits,
                                  round == 0,           range.first_block,  outcome.at()};
      TM_RUN(device, round_blocks, &part);
    }
    CHECK(sums.values() == wanted, what + ": other sums");
  }
  CHECK(outcome.values()[0] == 0, what + ": a failure is told");
}

void test_failures(const Device& device) {
  constexpr size_t kBlocks = 20;
  const struct {
    size_t block;
    float value;
    TmStatus status;
  } cases[] = {{19, -40000.0f, TM_OUT_OF_RANGE},
               {18, 32768.0f, TM_OUT_OF_RANGE},
               {7, INFINITY, TM_NON_FINITE},
               {3, NAN, TM_NON_FINITE}};
  Floats gradient = gradient_like(kBlocks, 9);
  for (const auto& bad : cases) {  // each before those that stay
    gradient[bad.block * kBlockElements + 77] = bad.value;
    const OnDevice<float> values(device, gradient);
    const OnDevice<int64_t> sums(device, kBlocks * kBlockElements);
    const OnDevice<uint64_t> outcome(device, std::vector<uint64_t>{0});
    for (size_t first : {size_t{10}, size_t{0}}) {
      const TmRoundBlocks part = {values.at() + first * kBlockElements,
                                  sums.at() + first * kBlockElements,
                                  10,
                                  24,
                                  1,
                                  first + 100,
                                  outcome.at()};
      TM_RUN(device, round_blocks, &part);
    }
    const uint64_t found = ~outcome.values()[0];
    CHECK(found >> 8 == bad.block + 100 && (found & 0xff) == bad.status,
          named(device, "another first bad block than " + std::to_string(bad.block)));
  }
  // A sum that leaves int64.
  const OnDevice<float> values(device, Floats(3 * kBlockElements, 32767.99f));
  const OnDevice<int64_t> sums(device, Fixed(3 * kBlockElements, INT64_MAX - 5));
  const OnDevice<uint64_t> outcome(device, std::vector<uint64_t>{0});
  const TmRoundBlocks call = {values.at(), sums.at(), 3, 24, 0, 5, outcome.at()};
  TM_RUN(device, round_blocks, &call);
  CHECK(~outcome.values()[0] == (5 << 8 | TM_OUT_OF_RANGE), named(device, "a sum overflows"));
}

struct Packing {
  size_t first_block, chunk_blocks;
};

void test_packing(const Device& device, const Fixed& values, const Packing& cut) {
  const size_t num_blocks = values.size() / kBlockElements;
  const size_t num_chunks = (num_blocks + cut.chunk_blocks - 1) / cut.chunk_blocks;
  const std::string what =
      named(device, "packing of " + std::to_string(num_blocks) + " blocks in chunks of " +
                        std::to_string(cut.chunk_blocks));
  std::vector<uint64_t> told(1 + 2 * num_chunks);
  std::vector<uint8_t> shapes(2 * num_blocks), words(2048 * num_blocks, 0xa5);
  const TmPackBlocks wanted = {values.data(),    cut.first_block, num_blocks,
                               cut.chunk_blocks, nullptr,         told.data(),
                               shapes.data(),    words.data(),    nullptr};
  host_pack_blocks(nullptr, &wanted);
  const uint64_t failure = 1234567;
  const OnDevice<int64_t> on_device(device, values);
  const OnDevice<uint64_t> outcome(device, std::vector<uint64_t>{failure});
  const OnDevice<uint64_t> got_told(device, told.size()), digests(device, num_blocks);
  const OnDevice<uint8_t> got_shapes(device, shapes.size()), got_words(device, words.size());
  const TmPackBlocks call = {on_device.at(),   cut.first_block, num_blocks,
                             cut.chunk_blocks, outcome.at(),    got_told.at(),
                             got_shapes.at(),  got_words.at(),  digests.at()};
  TM_RUN(device, pack_blocks, &call);
  told[0] = failure;
  CHECK(got_told.values() == told, what + ": other digests or sizes");
  CHECK(got_shapes.values() == shapes, what + ": other shapes");
  CHECK(got_words.values() == words, what + ": other words, or more than its words are written");
}

void run(const Device& device, bool is_small) {
  const size_t most = is_small ? 30 : 2000;
  for (const size_t num_blocks : {1u, 2u, 7u, 8u, 9u, 61u, 1037u}) {
    if (num_blocks > most) break;
    for (const int bits : {2, 8, 12, 16, 24}) test_rounding(device, num_blocks, bits);
  }
  test_failures(device);
  uint64_t seed = 11;
  for (const size_t num_blocks : {1u, 3u, 8u, 29u, 517u, 1300u}) {
    if (num_blocks > most) break;
    for (const size_t chunk_blocks : {size_t{1}, size_t{4}, size_t{255}, kMaxChunkBlocks}) {
      const Packing cut = {seed * 1000003, chunk_blocks};
      test_packing(device, random_fixed(num_blocks, seed++), cut);
      Fixed rounded(num_blocks * kBlockElements);
      const Floats gradient = gradient_like(num_blocks, seed++);
      for (int i = 0; i < 2; ++i) {
        const TmStatus status =
            round_and_add({gradient.data(), rounded.data(), num_blocks, 24, nullptr});
        CHECK(status == TM_OK, "the CPU fails");
      }
      test_packing(device, rounded, cut);
    }
  }
  test_packing(device, Fixed(5 * kBlockElements), {3, 2});
  test_packing(device, Fixed(5 * kBlockElements, INT64_MIN), {3, 2});
  test_packing(device, Fixed(5 * kBlockElements, -1), {3, 2});
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh;
  using namespace tunemesh::test;
  TmBackend host = *tm_cpu_backend();
  add_host_exchange(host);
  const TestOptions options = options_of(argc, argv);
  run(Device(&host, {}), options.is_small);
  if (const TmBackend* const cuda = cuda_backend_or_skip(options.plugin)) {
    run(Device(cuda, {}), options.is_small);
  }
  return finish("cuda_exchange_test");
}
