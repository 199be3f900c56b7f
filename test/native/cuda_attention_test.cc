// Attention by cuDNN (kernels/cuda/attention_cudnn.h): packs of odd documents against the reference
// in double, the same bits when run again, guards left alone; then times and workspaces, printed
// and not judged. Built with -DTUNEMESH_CUDA=ON only.
//
//   cuda_attention_test [folder of libcudnn.so.9]
#include <chrono>
#include <cstdio>
#include <random>

#include "attention_reference.h"
#include "kernels/cuda/attention_cudnn.h"
#include "kernels/cuda/device_memory.h"
#include "test_check.h"

namespace tunemesh {
namespace {

using namespace test;
using cuda::CudnnAttention;
using cuda::DeviceBuffer;

constexpr size_t kGuardBytes = 256 << 10;
constexpr int kPoison = 0xff;  // no number, in bf16 and float
// Where bf16 costs nothing (a document of one token has zeros for dq) the float sums still differ.
constexpr double kFloatSums = 1e-5;

// Rows on the device between guards of no numbers, filled with no numbers.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes), buffer_(bytes + 2 * kGuardBytes) { poison(); }

  void poison() { CUDA_CHECK(cudaMemset(buffer_.data(), kPoison, buffer_.bytes())); }
  char* data() const { return static_cast<char*>(buffer_.data()) + kGuardBytes; }
  TmElement* elements() const { return reinterpret_cast<TmElement*>(data()); }
  template <typename T>
  std::vector<T> read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    CUDA_CHECK(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }
  template <typename T>
  void write(const std::vector<T>& host) {
    CUDA_CHECK(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice));
  }
  bool guards_hold() const {
    std::vector<unsigned char> all(buffer_.bytes());
    CUDA_CHECK(cudaMemcpy(all.data(), buffer_.data(), all.size(), cudaMemcpyDeviceToHost));
    const auto is_poison = [](unsigned char byte) { return byte == kPoison; };
    return std::all_of(all.begin(), all.begin() + kGuardBytes, is_poison) &&
           std::all_of(all.end() - kGuardBytes, all.end(), is_poison);
  }

 private:
  size_t bytes_;
  DeviceBuffer buffer_;
};

// bf16 rows with a gap after each.
struct Rows {
  Rows(size_t count, size_t row_width, size_t gap)
      : n(count), width(row_width), stride(row_width + gap), memory(count * stride * 2) {}

  void write(const std::vector<double>& values) {
    std::vector<uint16_t> rounded(n * stride, 0xffff);
    for (size_t i = 0; i < values.size(); ++i) {
      rounded[i / width * stride + i % width] = to_bf16(values[i]);
    }
    memory.write(rounded);
  }
  std::vector<double> read() const {
    const auto bits = memory.read<uint16_t>();
    std::vector<double> values(n * width);
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = from_bf16(bits[i / width * stride + i % width]);
    }
    return values;
  }
  bool gaps_hold() const {
    const auto bits = memory.read<uint16_t>();
    for (size_t i = 0; i < bits.size(); ++i) {
      if (i % stride >= width && bits[i] != 0xffff) return false;
    }
    return memory.guards_hold();
  }

  size_t n, width, stride;
  Guarded memory;
};

struct DeviceCall {
  DeviceCall(const AttentionSizes& sizes, size_t scratch_bytes, size_t gap)
      : s(sizes),
        q(s.n(), s.query_width(), gap),
        k(s.n(), s.kv_width(), gap),
        v(s.n(), s.kv_width(), gap),
        out(s.n(), s.query_width(), gap / 2),
        dout(s.n(), s.query_width(), 0),
        dq(s.n(), s.query_width(), gap),
        dk(s.n(), s.kv_width(), gap),
        dv(s.n(), s.kv_width(), gap),
        lse(s.n() * s.num_heads * sizeof(float)),
        starts(s.starts.size() * sizeof(int32_t)),
        scratch(scratch_bytes) {
    starts.write(s.starts);
    TmAttention& a = args.forward;
    a.q = q.memory.elements();
    a.k = k.memory.elements();
    a.v = v.memory.elements();
    a.q_stride = q.stride;
    a.k_stride = a.v_stride = k.stride;
    a.out = out.memory.elements();
    a.out_stride = out.stride;
    a.lse = reinterpret_cast<float*>(lse.data());
    a.document_starts = reinterpret_cast<const int32_t*>(starts.data());
    a.host_document_starts = s.starts.data();
    a.num_documents = s.starts.size() - 1;
    a.n = s.n();
    a.num_heads = s.num_heads;
    a.num_kv_heads = s.num_kv_heads;
    a.head_size = s.head_size;
    a.window = s.window;
    a.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.head_size)));
    a.scratch = scratch.data();
    a.scratch_bytes = scratch_bytes;
    args.dout = dout.memory.elements();
    args.dq = dq.memory.elements();
    args.dk = dk.memory.elements();
    args.dv = dv.memory.elements();
    args.dout_stride = dout.stride;
    args.dq_stride = dq.stride;
    args.dk_stride = args.dv_stride = dk.stride;
  }
  DeviceCall(const DeviceCall&) = delete;

  void fill(const AttentionInputs& in) {
    q.write(in.q);
    k.write(in.k);
    v.write(in.v);
    dout.write(in.dout);
  }
  bool guards_hold() const {
    for (const Rows* rows : {&q, &k, &v, &out, &dout, &dq, &dk, &dv}) {
      if (!rows->gaps_hold()) return false;
    }
    return lse.guards_hold() && starts.guards_hold() && scratch.guards_hold();
  }

  const AttentionSizes& s;
  Rows q, k, v, out, dout, dq, dk, dv;
  Guarded lse, starts, scratch;
  TmAttentionBackward args = {};
};

// From a pool, whose size divides no row.
AttentionInputs random_inputs(const AttentionSizes& s) {
  std::mt19937 random(20261124);
  std::normal_distribution<double> normal;
  std::vector<double> pool(65521);
  for (double& x : pool) x = from_bf16(to_bf16(normal(random)));
  AttentionInputs in;
  size_t next = 0;
  const auto fill = [&](std::vector<double>& values, size_t count) {
    values.resize(count);
    for (double& x : values) x = pool[next++ % pool.size()];
  };
  fill(in.q, s.n() * s.query_width());
  fill(in.k, s.n() * s.kv_width());
  fill(in.v, s.n() * s.kv_width());
  fill(in.dout, s.n() * s.query_width());
  return in;
}

struct Distance {
  double rms = 0, most = 0;
};
Distance distance(const std::vector<double>& found, const std::vector<double>& exact) {
  Distance d;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double error = std::abs(found[i] - exact[i]);
    if (!(error <= 1e30)) return {INFINITY, INFINITY};
    d.rms += error * error / static_cast<double>(exact.size());
    d.most = std::max(d.most, error);
  }
  d.rms = std::sqrt(d.rms);
  return d;
}

struct Comparison {
  const char* what;
  const Rows& found;
  const std::vector<double>&exact, &rounded;
};

void compare(const std::string& name, const Comparison& c) {
  const Distance found = distance(c.found.read(), c.exact);
  const Distance cost = distance(c.rounded, c.exact);
  std::printf("  %-4s rms %.2e (bf16 costs %.2e)  most %.2e (%.2e)\n", c.what, found.rms, cost.rms,
              found.most, cost.most);
  CHECK_BELOW(found.rms, 2 * cost.rms + kFloatSums, name + ": rms of " + c.what);
  CHECK_BELOW(found.most, 2 * cost.most + kFloatSums, name + ": most of " + c.what);
}

void check_numbers(const std::string& name, const DeviceCall& call, const AttentionInputs& in) {
  const AttentionResults exact = reference_attention(call.s, in, false);
  const AttentionResults rounded = reference_attention(call.s, in, true);
  compare(name, {"out", call.out, exact.out, rounded.out});
  compare(name, {"dq", call.dq, exact.dq, rounded.dq});
  compare(name, {"dk", call.dk, exact.dk, rounded.dk});
  compare(name, {"dv", call.dv, exact.dv, rounded.dv});
  const auto lse = call.lse.read<float>();
  const Distance found = distance({lse.begin(), lse.end()}, exact.lse);
  std::printf("  lse  most %.2e\n", found.most);
  CHECK_BELOW(found.most, 1e-4, name + ": log-sum-exps");
}

void check_repeats(const std::string& name, CudnnAttention& attention, DeviceCall& call) {
  const auto dq = call.dq.memory.read<uint16_t>();
  const auto dk = call.dk.memory.read<uint16_t>();
  const auto dv = call.dv.memory.read<uint16_t>();
  bool same = true;
  for (int run = 1; run < 6; ++run) {
    for (Rows* rows : {&call.dq, &call.dk, &call.dv}) rows->memory.poison();
    call.scratch.poison();
    CUDA_CHECK(cudaDeviceSynchronize());
    attention.backward(call.args);
    CUDA_CHECK(cudaDeviceSynchronize());
    same = same && dq == call.dq.memory.read<uint16_t>() && dk == call.dk.memory.read<uint16_t>() &&
           dv == call.dv.memory.read<uint16_t>();
  }
  CHECK(same, name + ": the backward differs when run again");
}

struct Case {
  const char* name;
  std::vector<int32_t> lengths;
  size_t num_heads, num_kv_heads, head_size, window;
  size_t scratch_bytes;  // 0: scratch_bytes() of the job
  size_t gap;            // elements after each row but dout's; out's half as many
};

AttentionSizes sizes_of(const Case& c) {
  AttentionSizes s = {{0}, c.num_heads, c.num_kv_heads, c.head_size, c.window};
  for (const int32_t length : c.lengths) s.starts.push_back(s.starts.back() + length);
  return s;
}

size_t scratch_of(const CudnnAttention& attention, const AttentionSizes& s) {
  int32_t longest = 0;
  for (size_t d = 0; d + 1 < s.starts.size(); ++d) {
    longest = std::max(longest, s.starts[d + 1] - s.starts[d]);
  }
  return attention.scratch_bytes(
      {s.n(), static_cast<size_t>(longest), s.num_heads, s.num_kv_heads, s.head_size, true});
}

void run_case(const Case& c, CudnnAttention& attention, bool repeats) {
  const AttentionSizes s = sizes_of(c);
  const size_t scratch = c.scratch_bytes != 0 ? c.scratch_bytes : scratch_of(attention, s);
  std::printf("%s: %zu tokens, %zu documents, %zu/%zu heads of %zu, window %zu, scratch %.1f MiB\n",
              c.name, s.n(), c.lengths.size(), s.num_heads, s.num_kv_heads, s.head_size, s.window,
              static_cast<double>(scratch) / (1 << 20));
  const AttentionInputs in = random_inputs(s);
  DeviceCall call(s, scratch, c.gap);
  call.fill(in);
  CUDA_CHECK(cudaDeviceSynchronize());
  const auto start = std::chrono::steady_clock::now();
  const bool served = attention.forward(call.args.forward) && attention.backward(call.args);
  CUDA_CHECK(cudaDeviceSynchronize());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("  first run, plans built: %.2f s\n", seconds.count());
  CHECK(served, std::string(c.name) + " is not served: " + attention.refusal());
  if (!served) return;
  check_numbers(c.name, call, in);
  if (repeats) check_repeats(c.name, attention, call);
  CHECK(call.guards_hold(), std::string(c.name) + " wrote beyond its rows");
}

const std::vector<int32_t> kOdd = {1, 37, 700, 2, 128, 333, 5, 64, 129, 1, 511, 17};

std::vector<Case> cases() {
  std::vector<int32_t> tiny;
  for (int32_t i = 0; i < 200; ++i) tiny.push_back(1 + i % 4);
  return {
      {"odd 32/8 d128", kOdd, 32, 8, 128, 0, 0, 0},
      {"odd 9/3 d64", kOdd, 9, 3, 64, 0, 0, 0},
      {"odd 32/8 d64 with gaps", kOdd, 32, 8, 64, 0, 0, 192},
      {"odd 14/2 d64 windowed", kOdd, 14, 2, 64, 100, 0, 0},
      {"odd 32/8 d128 windowed", kOdd, 32, 8, 128, 64, 0, 0},
      {"odd 4/4 d128, no groups", kOdd, 4, 4, 128, 0, 0, 0},
      {"odd 14/2 d128 in small scratch", kOdd, 14, 2, 128, 0, size_t{24} << 20, 0},
      {"one of 700", {700}, 14, 2, 64, 0, 0, 0},
      {"one of 1", {1}, 9, 3, 64, 0, 0, 0},
      {"empty ones between", {0, 50, 0, 0, 90, 0, 0}, 9, 3, 64, 0, 0, 0},
      {"200 tiny", tiny, 9, 3, 64, 0, 0, 0},
      {"dense 5 x 256 with gaps", {256, 256, 256, 256, 256}, 32, 8, 64, 0, 0, 64},
      {"dense 3 x 384 windowed", {384, 384, 384}, 14, 2, 128, 100, 0, 0},
      {"dense 5 x 256 in small scratch", {256, 256, 256, 256, 256}, 32, 8, 128, 0, 20 << 20, 0},
  };
}

template <typename Work>
double milliseconds(cudaStream_t stream, const Work& work) {
  constexpr int kWarm = 3, kRuns = 20;
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  for (int i = 0; i < kWarm; ++i) work();
  CUDA_CHECK(cudaEventRecord(begin, stream));
  for (int i = 0; i < kRuns; ++i) work();
  CUDA_CHECK(cudaEventRecord(end, stream));
  CUDA_CHECK(cudaEventSynchronize(end));
  float total = 0;
  CUDA_CHECK(cudaEventElapsedTime(&total, begin, end));
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  return total / kRuns;
}

// A fresh CudnnAttention for each row, so that largest_workspace() is the row's.
void print_times(const Case& c, const CudnnAttention::Options& options) {
  std::string why;
  const cudaStream_t stream = options.stream;
  const auto attention = CudnnAttention::open(options, &why);
  const AttentionSizes s = sizes_of(c);
  const size_t scratch = scratch_of(*attention, s);
  DeviceCall call(s, scratch, c.gap);
  call.fill(random_inputs(s));
  if (!attention->supports(call.args.forward) || !attention->supports(call.args)) {
    std::printf("%-26s not served: %s\n", c.name, attention->refusal().c_str());
    return;
  }
  const auto forward = milliseconds(stream, [&] { attention->forward(call.args.forward); });
  const auto backward = milliseconds(stream, [&] { attention->backward(call.args); });
  const auto mib = [](size_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  std::printf("%-26s %8.3f %9.3f %11.1f %9.1f\n", c.name, forward, backward,
              mib(attention->largest_workspace()), mib(scratch));
}

void print_all_times(const CudnnAttention::Options& options) {
  std::vector<int32_t> pack;
  for (int32_t i = 0; i < 24; ++i) pack.push_back(i % 2 == 0 ? 83 + 20 * i : 599 - 18 * i);
  std::printf("\n%-26s %8s %9s %11s %9s\n", options.is_free ? "free mode" : "deterministic",
              "forward", "backward", "workspace", "scratch");
  std::printf("%-26s %8s %9s %11s %9s\n", "32/8 heads", "ms", "ms", "MiB", "MiB");
  const std::pair<const char*, std::vector<int32_t>> packs[] = {
      {"4 x 2048", {2048, 2048, 2048, 2048}},
      {"16 x 512", std::vector<int32_t>(16, 512)},
      {"1 x 8192", {8192}},
      {"24 up to 600", pack},
      {"4 up to 2.6k", {2600, 1500, 2300, 1792}},
  };
  for (const size_t head_size : {size_t{128}, size_t{64}}) {
    for (const auto& [name, lengths] : packs) {
      const size_t gap = 40 * head_size;  // as rows of q, k and v together
      const std::string title = std::string(name) + ", d " + std::to_string(head_size);
      print_times({title.c_str(), lengths, 32, 8, head_size, 0, 0, gap}, options);
    }
  }
}

int run(const std::string& folder) {
  int cards = 0;
  if (cudaGetDeviceCount(&cards) != cudaSuccess || cards == 0) {
    std::printf("skipped: no card\n");
    return 0;
  }
  cuda::Stream stream;
  std::string why;
  const CudnnAttention::Options fixed = {folder, stream.get(), false};
  const CudnnAttention::Options free = {folder, stream.get(), true};
  const auto attention = CudnnAttention::open(fixed, &why);
  if (attention == nullptr) {
    std::printf("skipped: %s\n", why.c_str());
    return 0;
  }
  std::printf("cuDNN %s\n", attention->version().c_str());
  for (const Case& c : cases()) run_case(c, *attention, true);
  const auto in_free_mode = CudnnAttention::open(free, &why);
  std::printf("\nfree mode\n");
  for (const Case& c : cases()) run_case(c, *in_free_mode, false);
  for (const auto& options : {fixed, free}) print_all_times(options);
  return finish("cuda_attention_test");
}

}  // namespace
}  // namespace tunemesh

int main(int argc, char** argv) {
  try {
    return tunemesh::run(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::printf("FAILED %s\n", error.what());
    return 1;
  }
}
