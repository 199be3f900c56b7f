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
  const PackedWords words = pack_blocks(values.data(), {77, blocks}, {out, out + 2 * blocks});
  CHECK(words.digest == linear_digest(values.data(), 77, blocks));
  return 2 * blocks + words.bytes;
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
    unpack(source, blocks, out.data());
    CHECK(out == values);
    Fixed sum(values.size(), 0), doubled(values.size());
    CHECK(unpack_add(source, blocks, {sum.data(), sum.data()}));
    CHECK(sum == values);
    for (size_t i = 0; i < values.size(); ++i) doubled[i] = values[i] >> 1;
    sum = doubled;
    Fixed plain = doubled;
    const bool fits = add_blocks(values.data(), blocks, {plain.data(), plain.data()});
    CHECK(unpack_add(source, blocks, {sum.data(), sum.data()}) == fits);
    CHECK(sum == plain);
    // From one place to another, whatever lies there.
    Fixed elsewhere(values.size(), -1), unpacked(values.size(), -1);
    CHECK(add_blocks(values.data(), blocks, {doubled.data(), elsewhere.data()}) == fits);
    CHECK(unpack_add(source, blocks, {doubled.data(), unpacked.data()}) == fits);
    CHECK(elsewhere == plain && unpacked == plain);
  }
  const Fixed zeros(5 * kBlockElements, 0);
  uint8_t packed[10];
  CHECK(pack_whole(zeros, packed) == 10);  // nothing but (0, 0) for a block of zeros
}

double squares_reference(const Floats& values) {
  double total = 0;
  for (size_t at = 0; at < values.size(); at += kBlockElements) {
    double lane[8] = {};
    for (size_t j = 0; j < kBlockElements; ++j) {
      const double x = values[at + j];
      lane[j % 8] += x * x;
    }
    total +=
        ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
  }
  return total;
}

TmStatus finish(const Fixed& sums, int bits, Floats* published, FinishedRange* totals,
                size_t* bad = nullptr) {
  return finish_sum({sums.data(), published->data(), {9, sums.size() / kBlockElements}, bits, bad},
                    totals);
}

// The published value of a sum, one element at a time.
double published_reference(int64_t sum, uint64_t largest, int bits) {
  const int shift = std::max(0, int(std::bit_width(largest)) - bits);
  const int64_t floor = sum >> shift, rest = sum - int64_t(uint64_t(floor) << shift);
  const int64_t half = shift == 0 ? 0 : int64_t{1} << (shift - 1);
  const bool up = shift > 0 && (rest > half || (rest == half && (floor & 1)));
  return std::ldexp(double(floor + up), shift - kFractionBits);
}

void test_sums_round_to_published() {
  for (const int bits : {24, 12, 8}) {
    const size_t blocks = 41;
    Fixed sums = random_fixed(blocks, 5 + bits);
    for (auto& v : sums) v >>= 2;
    Floats published(sums.size());
    FinishedRange totals{1, 2, 0};
    CHECK(finish(sums, bits, &published, &totals) == TM_OK);
    for (size_t b = 0; b < blocks; ++b) {
      uint64_t largest = 0;
      for (size_t j = 0; j < kBlockElements; ++j) {
        largest = std::max(largest, uint64_t(std::llabs(sums[b * kBlockElements + j])));
      }
      for (size_t i = b * kBlockElements; i < (b + 1) * kBlockElements; ++i) {
        CHECK(double(published[i]) == published_reference(sums[i], largest, bits));
      }
    }
    // Published values are exact both ways.
    Fixed back(sums.size());
    CHECK(floats_to_fixed(published.data(), blocks, back.data()) == TM_OK);
    for (size_t i = 0; i < back.size(); ++i) {
      CHECK(double(published[i]) == std::ldexp(double(back[i]), -kFractionBits));
    }
    CHECK(totals.sum_digest == 1 + linear_digest(sums.data(), 9, blocks));
    CHECK(totals.published_digest == 2 + linear_digest(back.data(), 9, blocks));
    CHECK(std::bit_cast<uint64_t>(totals.sum_squares) ==
          std::bit_cast<uint64_t>(squares_reference(published)));
  }
  Fixed edge(kBlockElements, 0);
  Floats out(kBlockElements);
  FinishedRange totals{0, 0, 0};
  size_t bad = 9;
  edge[3] = std::numeric_limits<int64_t>::max();
  CHECK(finish(edge, 24, &out, &totals, &bad) == TM_OUT_OF_RANGE && bad == 0);
  edge[3] = std::numeric_limits<int64_t>::min();
  CHECK(finish(edge, 24, &out, &totals) == TM_OUT_OF_RANGE);
  edge[3] = int64_t{0xffffff} << 39;
  CHECK(finish(edge, 24, &out, &totals) == TM_OK);
}

// Packing floats is packing the integers they stand for, and unpacking gives them back.
void test_published_floats_travel() {
  for (const int bits : {24, 12, 8, 2}) {
    const size_t blocks = 53;
    Fixed sums = random_fixed(blocks, 90 + bits), back(sums.size());
    for (auto& v : sums) v >>= 2;
    // Rounded up to the next power of two: one bit more than the codec's.
    sums[0] = (int64_t{1} << 40) - 1;
    Floats published(sums.size()), stored(sums.size(), -1.0f);
    FinishedRange totals{0, 0, 0};
    CHECK(finish(sums, bits, &published, &totals) == TM_OK);
    CHECK(floats_to_fixed(published.data(), blocks, back.data()) == TM_OK);
    std::vector<uint8_t> fixed(max_packed_bytes(blocks)), packed(max_packed_bytes(blocks));
    const size_t bytes = pack_whole(back, fixed.data());
    const PackedFloats floats =
        pack_floats(published.data(), blocks, {packed.data(), packed.data() + 2 * blocks});
    CHECK(floats.status == TM_OK && floats.bytes + 2 * blocks == bytes);
    CHECK(std::equal(fixed.begin(), fixed.begin() + ptrdiff_t(bytes), packed.begin()));
    const UnpackedFloats unpacked =
        unpack_floats(packed_source({packed.data(), bytes}, blocks), {9, blocks}, stored.data());
    CHECK(stored == published);
    CHECK(unpacked.digest == totals.published_digest);
    CHECK(unpacked.is_exact || bits == 24);
  }
}

// What no owner published is told apart, or rounded once as float32.
void test_foreign_floats() {
  Floats foreign(2 * kBlockElements, 0.0f);
  Fixed out(foreign.size());
  std::vector<uint8_t> packed(max_packed_bytes(2));
  const auto pack = [&] { return pack_floats(foreign.data(), 2, {&packed[0], &packed[4]}).status; };
  foreign[300] = 1.0f;
  foreign[301] = std::ldexp(1.0f, -40);
  CHECK(floats_to_fixed(foreign.data(), 2, out.data()) == TM_BAD_ARGUMENT);
  CHECK(pack() == TM_BAD_ARGUMENT);
  foreign[301] = 32768.0f;
  CHECK(pack() == TM_OUT_OF_RANGE);
  foreign[301] = NAN;
  CHECK(pack() == TM_NON_FINITE);
  for (uint64_t seed = 0; seed < 60; ++seed) {
    const Fixed values = random_fixed(1, seed);
    const size_t bytes = pack_whole(values, packed.data());
    const UnpackedFloats unpacked =
        unpack_floats(packed_source({packed.data(), bytes}, 1), {9, 1}, foreign.data());
    for (size_t i = 0; i < kBlockElements; ++i) {
      CHECK(foreign[i] == float(values[i]) * std::ldexp(1.0f, -kFractionBits));
    }
    CHECK(unpacked.digest == linear_digest(values.data(), 9, 1));
    if (!unpacked.is_exact) continue;
    CHECK(floats_to_fixed(foreign.data(), 1, out.data()) == TM_OK);
    CHECK(std::equal(values.begin(), values.end(), out.begin()));
  }
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

void run_all(const char* path) {
  using test::run;
  run(path, "rounding follows the contract word by word", test_rounding);
  run(path, "rounding measures what it wrote", test_measured_rounding);
  run(path, "rounding error is that of the design", test_rounding_error);
  run(path, "values and sums beyond the range are refused, the last ones within pass", test_range);
  run(path, "packing is exact for every width and shift", test_packing);
  run(path, "sums are rounded to nearest even and published exactly", test_sums_round_to_published);
  run(path, "published floats travel as the integers they are", test_published_floats_travel);
  run(path, "floats that nobody published are told apart", test_foreign_floats);
  run(path, "the digest is linear and sees every bit", test_digest);
}

}  // namespace
}  // namespace tunemesh

int main() { return tunemesh::test::run_on_every_path("codec", tunemesh::run_all); }
