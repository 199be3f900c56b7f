// Gradient memory and frames of the exchange, on every instruction path of this processor.
#include "engine/exchange_buffers.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "codec_inputs.h"
#include "engine/crc32c.h"
#include "engine/frame.h"
#include "path_check.h"

namespace tunemesh {
namespace {

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

template <typename Call>
std::string code_of(Call call) {
  try {
    call();
  } catch (const EngineError& e) {
    return e.code();
  }
  return "nothing";
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
    CHECK(add_blocks(buffers.contribution(slot), kOptions.num_blocks,
                     {expected.data(), expected.data()}));
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
  CHECK(code_of([&] { buffers.measure_contribution(2, 0); }) == "NON_FINITE_GRADIENT");
}

void write_gradient(ExchangeBuffers& buffers, int slot, const Floats& gradient) {
  buffers.clear_slot(slot);
  CHECK(round_and_add({gradient.data(), buffers.contribution(slot), kOptions.num_blocks, 24,
                       nullptr}) == TM_OK);
}

void test_first_contribution_is_not_copied() {
  Memory memory(ExchangeBuffers::plan(kOptions));
  ExchangeBuffers buffers(kOptions, memory.pointers());
  const size_t slice = 1, first = buffers.slice_first_block(slice);
  // Nothing was added: zeros, whatever lay there.
  std::fill(memory.sum.begin(), memory.sum.end(), uint8_t{0x11});
  buffers.clear_sum(slice);
  CHECK(buffers.finish_slice(3, slice).sum_digest == 0);
  // The slot is used again before the slice is finished: the sum keeps what was added.
  write_gradient(buffers, 2, gradient_like(kOptions.num_blocks, 21));
  buffers.clear_sum(slice);
  const uint64_t digest = buffers.add_own_contribution(2, slice);
  CHECK(digest == linear_digest(buffers.contribution(2) + first * kBlockElements, first, 10));
  write_gradient(buffers, 2, gradient_like(kOptions.num_blocks, 22));
  CHECK(buffers.finish_slice(3, slice).sum_digest == digest);
  // Two own contributions, the second one onto the first where it lies.
  write_gradient(buffers, 4, gradient_like(kOptions.num_blocks, 23));
  buffers.clear_sum(slice);
  const uint64_t both =
      buffers.add_own_contribution(2, slice) + buffers.add_own_contribution(4, slice);
  CHECK(buffers.finish_slice(3, slice).sum_digest == both);
  CHECK(buffers.measure_contribution(2, slice).digest +  // both are as they were
            buffers.measure_contribution(4, slice).digest ==
        both);
  // The addition that leaves the range is refused, not the finish after it.
  buffers.contribution(2)[first * kBlockElements] = INT64_MAX - 5;
  buffers.contribution(4)[first * kBlockElements] = 6;
  buffers.clear_sum(slice);
  buffers.add_own_contribution(2, slice);
  CHECK(code_of([&] { buffers.add_own_contribution(4, slice); }) == "GRADIENT_OUT_OF_RANGE");
}

void test_noted_measures() {
  Memory memory(ExchangeBuffers::plan(kOptions));
  ExchangeBuffers buffers(kOptions, memory.pointers());
  write_gradient(buffers, 1, gradient_like(kOptions.num_blocks, 31));
  const SliceMeasure measured = buffers.measure_contribution(1, 2);
  buffers.note_measure(1, 2, {17, 18});
  CHECK(buffers.measure_contribution(1, 2).digest == 17);
  CHECK(buffers.measure_contribution(1, 1).digest != 17);
  buffers.contribution(1);  // somebody is about to add
  CHECK(buffers.measure_contribution(1, 2).digest == measured.digest);
  CHECK(buffers.measure_contribution(1, 2).packed_bytes == measured.packed_bytes);
  buffers.note_measure(1, 2, {17, 18});
  buffers.poison(1);
  CHECK(code_of([&] { buffers.measure_contribution(1, 2); }) == "NON_FINITE_GRADIENT");
  buffers.clear_slot(1);
  CHECK(buffers.measure_contribution(1, 2).digest == 0);
}

// A frame of a sum that no owner wrote: its digest is that of the floats it became.
void test_stored_integers_beyond_float32() {
  Memory memory(ExchangeBuffers::plan(kOptions));
  ExchangeBuffers buffers(kOptions, memory.pointers());
  for (const int64_t extra : {0, 1}) {
    uint64_t expected = 0;
    for (uint16_t chunk = 0; chunk < buffers.num_chunks(2); ++chunk) {
      FrameHeader header{.kind = FrameKind::kSum, .step = 5, .slice = 2, .chunk = chunk};
      header.num_chunks = 3;
      header.first_block = uint32_t(20 + 4 * chunk);
      header.num_blocks = chunk == 2 ? 1 : 4;
      Fixed values(header.num_blocks * kBlockElements, int64_t{1} << 40);
      expected += linear_digest(values.data(), header.first_block, header.num_blocks);
      values[7] += extra;
      std::vector<uint8_t> frame(kMaxFrameBytes);
      uint8_t* shapes = frame.data() + kFrameHeaderBytes;
      const PackedWords words = pack_blocks(values.data(), {header.first_block, header.num_blocks},
                                            {shapes, shapes + 2 * header.num_blocks});
      header.digest = words.digest;
      header.payload_bytes = uint32_t(2 * header.num_blocks + words.bytes);
      frame.resize(kFrameHeaderBytes + header.payload_bytes);
      write_frame_header(header, frame);
      buffers.store_published_frame(frame);
    }
    CHECK(buffers.published_digest(5, 2) == expected);
  }
  // Another step's digest is not taken for this one's: what stands there is read.
  buffers.published(7)[20 * kBlockElements] = 0;
  CHECK(code_of([&] { buffers.published_digest(7, 2); }) == "nothing");
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

void run_all(const char* path) {
  using test::run;
  run(path, "7 contributions through frames add up to the plain sum", test_buffers);
  run(path, "the first contribution is read where it lies", test_first_contribution_is_not_copied);
  run(path, "what rounding measured is taken until the slot changes", test_noted_measures);
  run(path, "stored integers beyond float32 have their floats' digest",
      test_stored_integers_beyond_float32);
  run(path, "damaged and random frames are refused", test_frames_resist_damage);
  run(path, "crc32c matches RFC 3720 and its table-driven form", test_crc);
}

}  // namespace
}  // namespace tunemesh

int main() { return tunemesh::test::run_on_every_path("exchange", tunemesh::run_all); }
