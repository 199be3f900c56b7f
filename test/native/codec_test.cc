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
#include "path_check.h"

namespace tunemesh {
namespace {

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

// Rounding with its measure equals rounding, then measuring, for ranges that begin anywhere.
void test_measured_rounding() {
  for (const int bits : {24, 12, 8}) {
    const size_t blocks = 61, first = 70'001;
    Fixed sum = random_fixed(blocks, 13);
    for (auto& v : sum) v >>= 20;
    Fixed measured_sum = sum, measured_fresh(sum.size(), -7), fresh(sum.size());
    const Floats gradient = gradient_like(blocks, bits);
    CHECK(round_and_add({gradient.data(), sum.data(), blocks, bits, nullptr}) == TM_OK);
    CHECK(round_to({gradient.data(), fresh.data(), blocks, bits, nullptr}) == TM_OK);
    RangeMeasure added{5, 7}, overwritten{0, 0};
    for (size_t at = 0, count = 1; at < blocks; at += count, count = 2 * count + 1) {
      const size_t from = at * kBlockElements, number = std::min(count, blocks - at);
      TmRoundAndAdd call{&gradient[from], &measured_sum[from], number, bits, nullptr};
      CHECK(round_and_add_measured(call, first + at, &added) == TM_OK);
      call.accumulator = &measured_fresh[from];
      CHECK(round_to_measured(call, first + at, &overwritten) == TM_OK);
    }
    CHECK(measured_sum == sum && measured_fresh == fresh);
    CHECK(added.digest == 5 + linear_digest(sum.data(), first, blocks));
    CHECK(added.packed_bytes == 7 + packed_bytes(sum.data(), blocks));
    CHECK(overwritten.digest == linear_digest(fresh.data(), first, blocks));
    CHECK(overwritten.packed_bytes == packed_bytes(fresh.data(), blocks));
  }
  Floats gradient(40 * kBlockElements, 0.5f);
  Fixed sum(gradient.size(), 0);
  size_t bad = 0;
  RangeMeasure measure{0, 0};
  gradient[37 * kBlockElements + 9] = NAN;
  const TmRoundAndAdd call{gradient.data(), sum.data(), 40, 24, &bad};
  CHECK(round_and_add_measured(call, 3, &measure) == TM_NON_FINITE && bad == 37);
  gradient[21 * kBlockElements] = 40000.0f;
  CHECK(round_to_measured(call, 3, &measure) == TM_OUT_OF_RANGE && bad == 21);
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

void run_all(const char* path) {
  using test::run;
  run(path, "rounding follows the contract word by word", test_rounding);
  run(path, "rounding measures what it wrote", test_measured_rounding);
  run(path, "rounding error is that of the design", test_rounding_error);
  run(path, "values and sums beyond the range are refused, the last ones within pass", test_range);
  run(path, "packing is exact for every width and shift", test_packing);
  run(path, "sums are rounded to nearest even and published exactly", test_sums_round_to_published);
  run(path, "the digest is linear and sees every bit", test_digest);
  run(path, "squares are added in the stated order", test_sum_squares);
}

}  // namespace
}  // namespace tunemesh

int main() { return tunemesh::test::run_on_every_path("codec", tunemesh::run_all); }
