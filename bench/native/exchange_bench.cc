// Times what the exchange's own code costs in one of two workers: rounding and measuring a
// contribution, packing the half that another worker owns, adding the other's half and its own,
// finishing, packing the sum, storing the other's sum.
//
//   exchange_bench [--elements N] [--bits 24|12|8] [--path generic|avx2|avx512] [--rounds N]
//
// CPU milliseconds of the thread, median and best of the rounds. Both halves are the same values.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engine/exchange_buffers.h"

namespace tunemesh::bench {
namespace {

struct Options {
  size_t num_blocks = 42'000'000 / kBlockElements;
  int bits = 8, rounds = 7;
};

double cpu_ms() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return 1e3 * double(t.tv_sec) + 1e-6 * double(t.tv_nsec);
}

// As the CPU backend allocates the engine's arena.
void* allocate(size_t bytes) {
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  memset(memory, 1, bytes);  // takes the pages
  return memory;
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options), buffers_(exchange_options(options), memory(options)) {
    const size_t elements = options.num_blocks * kBlockElements;
    gradient_ = static_cast<float*>(allocate(elements * sizeof(float)));
    uint32_t state = 1;
    for (size_t i = 0; i < elements; ++i) {
      state = state * 1664525 + 1013904223;
      const float tail = float(state >> 8) / float(1 << 24);
      gradient_[i] =
          (state & 1 ? -1 : 1) * tail * tail * tail / float(256 << (i / kBlockElements % 13));
    }
  }

  void run() {
    for (int round = 0; round <= options_.rounds; ++round) step(uint32_t(round));
    double total = 0;
    for (auto& [name, times] : phases_) {
      times.erase(times.begin());  // the first touches everything
      std::sort(times.begin(), times.end());
      total += times[times.size() / 2];
      std::printf("q%-2d  %-28s %7.1f ms  (best %.1f)\n", options_.bits, name.c_str(),
                  times[times.size() / 2], times.front());
    }
    std::printf("q%-2d  %-28s %7.1f ms\n", options_.bits, "total", total);
  }

 private:
  static ExchangeOptions exchange_options(const Options& o) {
    return {.num_blocks = o.num_blocks,
            .slice_blocks = (o.num_blocks + 40) / 41,
            .chunk_blocks = 256,
            .num_contribution_slots = 1,
            .significant_bits = o.bits};
  }
  static ExchangeMemory memory(const Options& o) {
    const ExchangePlan plan = ExchangeBuffers::plan(exchange_options(o));
    return {allocate(plan.contribution_bytes), allocate(plan.sum_bytes),
            allocate(plan.published_bytes), allocate(plan.frame_bytes),
            allocate(plan.scratch_bytes)};
  }

  void timed(const char* name, const std::function<void()>& work) {
    const double start = cpu_ms();
    work();
    const double ms = cpu_ms() - start;
    const auto phase = std::find_if(phases_.begin(), phases_.end(),
                                    [&](const auto& p) { return p.first == name; });
    if (phase == phases_.end()) {
      phases_.push_back({name, {ms}});
    } else {
      phase->second.push_back(ms);
    }
  }

  // This worker owns the even slices; what it sends of the odd ones stands for the other's frames.
  void step(uint32_t number) {
    const size_t slices = buffers_.num_slices();
    buffers_.clear_slot(0);
    timed("round and measure", [&] { round(); });
    std::vector<std::vector<std::vector<uint8_t>>> frames(slices);
    for (size_t slice = 0; slice < slices; slice += 2) {
      buffers_.clear_sum(slice);
      timed("own", [&] { buffers_.add_own_contribution(0, slice); });
      frames[slice] = copied(slice, number, "pack", [&](const FrameHeader& header) {
        return buffers_.pack_contribution(0, header, 0);
      });
    }
    for (size_t slice = 0; slice < slices; slice += 2) {
      const std::vector<std::span<const uint8_t>> spans(frames[slice].begin(), frames[slice].end());
      timed("add", [&] { buffers_.add_contribution_frames(spans); });
      timed("finish", [&] { buffers_.finish_slice(number, slice); });
      frames[slice] = copied(slice, number, "pack the sum", [&](const FrameHeader& header) {
        return buffers_.pack_published(header, 0);
      });
    }
    for (size_t slice = 0; slice < slices; slice += 2) {
      timed("store", [&] {
        for (const auto& frame : frames[slice]) buffers_.store_published_frame(frame);
      });
      timed("digest of a stored sum", [&] { buffers_.published_digest(number, slice); });
    }
    sum_phases();
  }

  void round() {
    const bool is_first = buffers_.take_cleared(0);
    int64_t* values = buffers_.contribution(0);
    for (size_t slice = 0; slice < buffers_.num_slices(); ++slice) {
      const size_t first = buffers_.slice_first_block(slice), offset = first * kBlockElements;
      RangeMeasure measure{0, 0};
      const TmRoundAndAdd call = {gradient_ + offset, values + offset,
                                  buffers_.slice_num_blocks(slice), options_.bits, nullptr};
      if (!is_first || round_to_measured(call, first, &measure) != TM_OK) std::abort();
      buffers_.note_measure(0, slice, {measure.digest, measure.packed_bytes});
    }
  }

  std::vector<std::vector<uint8_t>> copied(size_t slice, uint32_t number, const char* phase,
                                           const std::function<size_t(const FrameHeader&)>& pack) {
    std::vector<std::vector<uint8_t>> frames;
    for (size_t chunk = 0; chunk < buffers_.num_chunks(slice); ++chunk) {
      size_t bytes = 0;
      timed(phase, [&] {
        bytes = pack({.step = number, .slice = uint16_t(slice), .chunk = uint16_t(chunk)});
      });
      frames.emplace_back(buffers_.frames().begin(), buffers_.frames().begin() + ptrdiff_t(bytes));
    }
    return frames;
  }

  // One number a step for each phase.
  void sum_phases() {
    ++num_steps_;
    for (auto& [name, times] : phases_) {
      double total = 0;
      while (times.size() >= num_steps_) {
        total += times.back();
        times.pop_back();
      }
      times.push_back(total);
    }
  }

  const Options options_;
  ExchangeBuffers buffers_;
  float* gradient_ = nullptr;
  size_t num_steps_ = 0;
  std::vector<std::pair<std::string, std::vector<double>>> phases_;
};

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i], value = argv[i + 1];
    if (name == "--elements") options.num_blocks = std::stoul(value) / kBlockElements;
    if (name == "--bits") options.bits = std::stoi(value);
    if (name == "--rounds") options.rounds = std::stoi(value);
    if (name == "--path") {
      const auto path = value == "avx512" ? CodecPath::kAvx512
                        : value == "avx2" ? CodecPath::kAvx2
                                          : CodecPath::kGeneric;
      if (!set_codec_path(path)) {
        std::fprintf(stderr, "this processor lacks the path %s\n", argv[i + 1]);
        return 2;
      }
    }
  }
  Bench(options).run();
  return 0;
}

}  // namespace
}  // namespace tunemesh::bench

int main(int argc, char** argv) { return tunemesh::bench::main(argc, argv); }
