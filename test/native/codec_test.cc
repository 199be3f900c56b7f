// The exchange's codec against plain oracles, on every instruction path of this processor.
#include "engine/codec.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "codec_inputs.h"
#include "engine/crc32c.h"
#include "engine/exchange_buffers.h"
#include "engine/frame.h"

namespace tunemesh {
namespace {

int failures = 0;
#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      if (++failures > 20) std::exit(1);                                  \
    }                                                                     \
  } while (false)

void test_rounding() {
  for (const int bits : {24, 12, 8}) {
    const size_t blocks = 67;
    const Floats gradient = gradient_like(blocks, 7 + bits);
    Fixed sum = random_fixed(blocks, 3);
    for (auto& v : sum) v >>= 20;
    Fixed expected = sum;
    for (size_t b = 0; b < blocks; ++b) {
      float largest = 0;
      for (size_t j = 0; j < kBlockElements; ++j) {
        largest = std::max(largest, std::fabs(gradient[b * kBlockElements + j]));
      }
      if (largest == 0) continue;
      for (size_t i = b * kBlockElements; i < (b + 1) * kBlockElements; ++i) {
        expected[i] += round_reference(gradient[i], largest, bits);
      }
    }
    CHECK(round_and_add({gradient.data(), sum.data(), blocks, bits, nullptr}) == TM_OK);
    CHECK(sum == expected);
    // Into a cleared accumulator, whatever lies there.
    Fixed added(sum.size(), 0), fresh(sum.size(), -7);
    CHECK(round_and_add({gradient.data(), added.data(), blocks, bits, nullptr}) == TM_OK);
    CHECK(round_to({gradient.data(), fresh.data(), blocks, bits, nullptr}) == TM_OK);
    CHECK(added == fresh);
  }
}

// The relative errors that DESIGN 5 measured on gradients: q24 2e-7, q12 8e-4, q8 1.2e-2.
void test_rounding_error() {
  const struct {
    int bits;
    double limit;
    double most_lost;
  } codecs[] = {{24, 2e-7, 0}, {12, 8e-4, 0.006}, {8, 1.2e-2, 0.05}};
  for (const auto& codec : codecs) {
    const size_t blocks = 400;
    const Floats gradient = gradient_like(blocks, 99);
    Fixed sum(gradient.size(), 0);
    CHECK(round_and_add({gradient.data(), sum.data(), blocks, codec.bits, nullptr}) == TM_OK);
    double error = 0, norm = 0, lost = 0, nonzero = 0;
    for (size_t i = 0; i < sum.size(); ++i) {
      const double x = gradient[i], difference = std::ldexp(double(sum[i]), -kFractionBits) - x;
      error += difference * difference;
      norm += x * x;
      nonzero += x != 0;
      lost += x != 0 && sum[i] == 0;
    }
    Fixed packed_from = sum;
    const double bytes = double(packed_bytes(sum.data(), blocks)) / double(sum.size());
    std::printf("  q%d: relative error %.2g, %.2g %% rounded to zero, %.2f bytes an element\n",
                codec.bits, std::sqrt(error / norm), 100 * lost / nonzero, bytes);
    CHECK(std::sqrt(error / norm) <= codec.limit);
    CHECK(lost / nonzero <= codec.most_lost);
  }
}

TmStatus round_one(float value, int bits, int64_t before, size_t at, size_t* bad) {
  Floats gradient(3 * kBlockElements, 0.25f);
  Fixed sum(gradient.size(), 0);
  gradient[at] = value;
  sum[at] = before;
  return round_and_add({gradient.data(), sum.data(), 3, bits, bad});
}

void test_range() {
  size_t bad = 99;
  const float below = std::nextafter(32768.0f, 0.0f);
  CHECK(round_one(below, 24, 0, 5, &bad) == TM_OK);
  CHECK(round_one(-below, 24, 0, 300, &bad) == TM_OK);
  CHECK(round_one(32768.0f, 24, 0, 300, &bad) == TM_OUT_OF_RANGE && bad == 1);
  // Rounded up to 32768 by few bits: refused as well.
  CHECK(round_one(below, 8, 0, 700, &bad) == TM_OUT_OF_RANGE && bad == 2);
  CHECK(round_one(-below, 8, 0, 700, &bad) == TM_OUT_OF_RANGE && bad == 2);
  CHECK(round_one(32640.0f, 8, 0, 700, &bad) == TM_OK);
  for (const float x : {INFINITY, -INFINITY, NAN}) {
    CHECK(round_one(x, 24, 0, 767, &bad) == TM_NON_FINITE && bad == 2);
  }
  // The sum's own limit, both sides and both signs: 1.0 is 2^48.
  const int64_t one = int64_t{1} << kFractionBits, top = std::numeric_limits<int64_t>::max();
  CHECK(round_one(1.0f, 24, top - one, 9, &bad) == TM_OK);
  CHECK(round_one(1.0f, 24, top - one + 1, 9, &bad) == TM_OUT_OF_RANGE && bad == 0);
  CHECK(round_one(-1.0f, 24, -top - 1 + one, 9, &bad) == TM_OK);
  CHECK(round_one(-1.0f, 24, -top - 1 + (one - 1), 9, &bad) == TM_OUT_OF_RANGE && bad == 0);
  CHECK(round_one(1.0f, 1, 0, 9, &bad) == TM_BAD_ARGUMENT);
}

size_t pack_whole(const Fixed& values, uint8_t* out) {
  const size_t blocks = values.size() / kBlockElements;
  return 2 * blocks + pack_blocks(values.data(), blocks, {out, out + 2 * blocks});
}

void test_packing() {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    const size_t blocks = 1 + seed % 13;
    const Fixed values = random_fixed(blocks, seed);
    std::vector<uint8_t> packed(max_packed_bytes(blocks) + 1, 0xee);
    const size_t bytes = pack_whole(values, packed.data());
    CHECK(bytes == packed_bytes(values.data(), blocks));
    CHECK(packed[bytes] == 0xee);
    const std::span<const uint8_t> whole(packed.data(), bytes);
    CHECK(packed_is_valid(whole, blocks));
    CHECK(!packed_is_valid(whole.first(bytes - 1), blocks));
    CHECK(!packed_is_valid({packed.data(), bytes + 1}, blocks));
    Fixed out(values.size(), -1);
    const PackedSource source = packed_source(whole, blocks);
    CHECK(unpack(source, blocks, out.data()) == bytes - 2 * blocks);
    CHECK(out == values);
    Fixed sum(values.size(), 0), doubled(values.size());
    CHECK(unpack_add(source, blocks, sum.data()));
    CHECK(sum == values);
    for (size_t i = 0; i < values.size(); ++i) doubled[i] = values[i] >> 1;
    sum = doubled;
    Fixed plain = doubled;
    const bool fits = add_blocks(values.data(), blocks, plain.data());
    CHECK(unpack_add(source, blocks, sum.data()) == fits);
    CHECK(sum == plain);
  }
  const Fixed zeros(5 * kBlockElements, 0);
  uint8_t packed[10];
  CHECK(pack_whole(zeros, packed) == 10);  // nothing but (0, 0) for a block of zeros
}

void test_sums_round_to_published() {
  for (const int bits : {24, 12, 8}) {
    const size_t blocks = 41;
    Fixed sums = random_fixed(blocks, 5 + bits);
    for (auto& v : sums) v >>= 2;
    Floats published(sums.size());
    CHECK(round_sum({sums.data(), published.data(), blocks, bits, nullptr}) == TM_OK);
    for (size_t b = 0; b < blocks; ++b) {
      uint64_t largest = 0;
      for (size_t j = 0; j < kBlockElements; ++j) {
        largest = std::max(largest, uint64_t(std::llabs(sums[b * kBlockElements + j])));
      }
      const int shift = std::max(0, int(std::bit_width(largest)) - bits);
      for (size_t i = b * kBlockElements; i < (b + 1) * kBlockElements; ++i) {
        const int64_t floor = sums[i] >> shift, rest = sums[i] - int64_t(uint64_t(floor) << shift);
        const int64_t half = shift == 0 ? 0 : int64_t{1} << (shift - 1);
        const bool up = shift > 0 && (rest > half || (rest == half && (floor & 1)));
        CHECK(double(published[i]) == std::ldexp(double(floor + up), shift - kFractionBits));
      }
    }
    // Published values are exact both ways, and survive a frame.
    Fixed back(sums.size());
    CHECK(floats_to_fixed(published.data(), blocks, back.data()) == TM_OK);
    Floats again(sums.size());
    fixed_to_floats(back.data(), blocks, again.data());
    CHECK(std::memcmp(published.data(), again.data(), again.size() * 4) == 0 || published == again);
  }
  Fixed edge(kBlockElements, 0);
  Floats out(kBlockElements);
  size_t bad = 9;
  edge[3] = std::numeric_limits<int64_t>::max();
  CHECK(round_sum({edge.data(), out.data(), 1, 24, &bad}) == TM_OUT_OF_RANGE && bad == 0);
  edge[3] = std::numeric_limits<int64_t>::min();
  CHECK(round_sum({edge.data(), out.data(), 1, 24, &bad}) == TM_OUT_OF_RANGE);
  edge[3] = int64_t{0xffffff} << 39;
  CHECK(round_sum({edge.data(), out.data(), 1, 24, &bad}) == TM_OK);
  Floats foreign(kBlockElements, 0.0f);
  foreign[0] = 1.0f;
  foreign[1] = std::ldexp(1.0f, -40);
  CHECK(floats_to_fixed(foreign.data(), 1, edge.data()) == TM_BAD_ARGUMENT);
}

void test_digest() {
  const size_t blocks = 19, first = 100'003;
  const Fixed a = random_fixed(blocks, 1), b = random_fixed(blocks, 2);
  Fixed sum(a.size());
  uint64_t reference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    sum[i] = int64_t(uint64_t(a[i]) + uint64_t(b[i]));
    reference += uint64_t(a[i]) * digest_block_factor(first + i / kBlockElements) *
                 digest_lane_factor(i % kBlockElements);
  }
  const uint64_t da = linear_digest(a.data(), first, blocks);
  CHECK(da == reference);
  CHECK(linear_digest(sum.data(), first, blocks) == da + linear_digest(b.data(), first, blocks));
  CHECK(linear_digest(a.data() + 4 * kBlockElements, first + 4, blocks - 4) +
            linear_digest(a.data(), first, 4) ==
        da);
  CHECK(linear_digest(a.data(), first + 1, blocks) != da);
  for (int bit = 0; bit < 64; ++bit) {
    Fixed flipped = a;
    flipped[777] ^= int64_t(uint64_t{1} << bit);
    CHECK(linear_digest(flipped.data(), first, blocks) != da);
  }
}

void test_sum_squares() {
  const size_t blocks = 23;
  const Floats values = gradient_like(blocks, 4);
  double total = 0;
  for (size_t b = 0; b < blocks; ++b) {
    double lane[8] = {};
    for (size_t j = 0; j < kBlockElements; ++j) {
      const double x = values[b * kBlockElements + j];
      lane[j % 8] += x * x;
    }
    total +=
        ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }
  CHECK(std::bit_cast<uint64_t>(add_squares(0, values.data(), blocks)) ==
        std::bit_cast<uint64_t>(total));
}

void test_crc() {
  CHECK(crc32c("123456789", 9) == 0xe3069283);  // RFC 3720's check value
  std::mt19937_64 random(1);
  std::vector<uint8_t> bytes(100'003);
  for (auto& byte : bytes) byte = uint8_t(random());
  for (const size_t size : {0, 1, 7, 8, 4095, 12'287, 12'288, 12'289, 50'001, 100'003}) {
    CHECK(crc32c(bytes.data(), size) == crc32c_portable(bytes.data(), size));
    const size_t cut = size / 3;
    CHECK(crc32c(bytes.data() + cut, size - cut, crc32c(bytes.data(), cut)) ==
          crc32c(bytes.data(), size));
  }
}

void test_buffers() {
  Memory memory(ExchangeBuffers::plan(kOptions));
  ExchangeBuffers buffers(kOptions, memory.pointers());
  Fixed expected(kOptions.num_blocks * kBlockElements, 0);
  for (int slot = 0; slot < 7; ++slot) {
    const Floats gradient = gradient_like(kOptions.num_blocks, 50 + slot);
    buffers.clear_slot(slot);
    CHECK(round_and_add({gradient.data(), buffers.contribution(slot), kOptions.num_blocks, 24,
                         nullptr}) == TM_OK);
    CHECK(add_blocks(buffers.contribution(slot), kOptions.num_blocks, expected.data()));
  }
  for (size_t slice = 0; slice < buffers.num_slices(); ++slice) {
    buffers.clear_sum(slice);
    uint64_t digest = 0;
    for (const int slot : {3, 6, 0, 5, 1, 2}) {
      std::vector<std::vector<uint8_t>> frames;
      for (size_t chunk = 0; chunk < buffers.num_chunks(slice); ++chunk) {
        frames.insert(frames.begin(), frame_of(buffers, slot,
                                               {.slice = uint16_t(slice),
                                                .lease = uint16_t(slot),
                                                .chunk = uint16_t(chunk)}));
      }
      std::vector<std::span<const uint8_t>> spans(frames.begin(), frames.end());
      const uint64_t added = buffers.add_contribution_frames(spans);
      const SliceMeasure measure = buffers.measure_contribution(slot, slice);
      size_t bytes = 0;
      for (const auto& frame : frames) bytes += frame.size();
      CHECK(added == measure.digest && bytes == measure.packed_bytes);
      digest += added;
    }
    digest += buffers.add_own_contribution(4, slice);
    const FinishedSlice finished = buffers.finish_slice(8, slice);
    CHECK(finished.sum_digest == digest);
    const size_t first = buffers.slice_first_block(slice), blocks = buffers.slice_num_blocks(slice);
    CHECK(finished.sum_digest ==
          linear_digest(expected.data() + first * kBlockElements, first, blocks));
    // A receiver that stores the published frames holds the same floats.
    const Floats own(buffers.published(8) + first * kBlockElements,
                     buffers.published(8) + (first + blocks) * kBlockElements);
    for (size_t chunk = 0; chunk < buffers.num_chunks(slice); ++chunk) {
      const size_t bytes = buffers.pack_published(
          {.step = 8, .slice = uint16_t(slice), .chunk = uint16_t(chunk)}, 2);
      std::vector<uint8_t> frame(memory.frames.begin() + 2 * kMaxFrameBytes,
                                 memory.frames.begin() + 2 * kMaxFrameBytes + bytes);
      std::fill_n(buffers.published(8) + (first + chunk * 4) * kBlockElements, kBlockElements,
                  0.0f);
      buffers.store_published_frame(frame);
    }
    CHECK(std::equal(own.begin(), own.end(), buffers.published(8) + first * kBlockElements));
    CHECK(buffers.published_digest(8, slice) == finished.published_digest);
  }
  buffers.poison(2);
  bool refused = false;
  try {
    buffers.measure_contribution(2, 0);
  } catch (const EngineError& e) {
    refused = e.code() == "NON_FINITE_GRADIENT";
  }
  CHECK(refused);
}

void test_frames_resist_damage() {
  Memory memory(ExchangeBuffers::plan(kOptions));
  ExchangeBuffers buffers(kOptions, memory.pointers());
  const Floats gradient = gradient_like(kOptions.num_blocks, 3);
  buffers.clear_slot(0);
  CHECK(round_and_add(
            {gradient.data(), buffers.contribution(0), kOptions.num_blocks, 24, nullptr}) == TM_OK);
  const std::vector<uint8_t> good =
      frame_of(buffers, 0, {.job_hash = 77, .step = 4, .slice = 2, .chunk = 1});
  const FrameLimits limits{kOptions.num_blocks, kOptions.slice_blocks, kOptions.chunk_blocks};
  FrameHeader header;
  CHECK(parse_frame(good, limits, &header) == FrameFault::kNone);
  CHECK(header.job_hash == 77 && header.step == 4 && header.num_chunks == 3 &&
        header.first_block == 24);
  std::mt19937_64 random(11);
  for (int i = 0; i < 10'000; ++i) {
    std::vector<uint8_t> bad = good;
    bad[random() % bad.size()] ^= uint8_t(1 << (random() % 8));
    CHECK(parse_frame(bad, limits, &header) != FrameFault::kNone);
  }
  for (size_t size = 0; size < good.size(); size += 1 + size / 9) {
    CHECK(parse_frame({good.data(), size}, limits, &header) != FrameFault::kNone);
  }
  // Random headers with a right checksum: refused for their content alone, never read out of
  // bounds.
  for (int i = 0; i < 20'000; ++i) {
    std::vector<uint8_t> bad(kFrameHeaderBytes + random() % 3000);
    for (auto& byte : bad) byte = uint8_t(random());
    std::memcpy(bad.data(), good.data(), random() % 48);
    const uint32_t bytes = uint32_t(bad.size() - kFrameHeaderBytes), zero = 0;
    std::memcpy(bad.data() + 44, &bytes, 4);
    std::memcpy(bad.data() + 56, &zero, 4);
    const uint32_t crc = crc32c(bad.data() + 64, bytes, crc32c(bad.data(), 60));
    std::memcpy(bad.data() + 60, &crc, 4);
    CHECK(parse_frame(bad, limits, &header) != FrameFault::kNone);
  }
}

int passed = 0, failed = 0, skipped = 0;

void run(const char* path, const char* name, void (*test)()) {
  const int before = failures;
  test();
  (failures == before ? passed : failed)++;
  if (failures != before) std::printf("not ok: codec %s: %s\n", path, name);
}

void run_all(const char* path) {
  std::printf("codec path %s\n", path);
  run(path, "rounding follows the contract word by word", test_rounding);
  run(path, "rounding error is that of the design", test_rounding_error);
  run(path, "values and sums beyond the range are refused, the last ones within pass", test_range);
  run(path, "packing is exact for every width and shift", test_packing);
  run(path, "sums are rounded to nearest even and published exactly", test_sums_round_to_published);
  run(path, "the digest is linear and sees every bit", test_digest);
  run(path, "squares are added in the stated order", test_sum_squares);
  run(path, "7 contributions through frames add up to the plain sum", test_buffers);
}

}  // namespace
}  // namespace tunemesh

int main() {
  using namespace tunemesh;
  const struct {
    CodecPath path;
    const char* name;
  } paths[] = {
      {CodecPath::kGeneric, "generic"}, {CodecPath::kAvx2, "avx2"}, {CodecPath::kAvx512, "avx512"}};
  run("any", "crc32c matches RFC 3720 and its table-driven form", test_crc);
  for (const auto& p : paths) {
    if (set_codec_path(p.path)) {
      run_all(p.name);
    } else {
      std::printf("skipped: codec path %s is not on this processor\n", p.name);
      ++skipped;
    }
  }
  run("any", "damaged and random frames are refused", test_frames_resist_damage);
  std::printf("codec: %d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed == 0 ? 0 : 1;
}
