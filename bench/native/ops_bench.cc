// Times what a LoRA training step of SmolLM2-135M spends outside of matrix products, beside the
// frozen base's products: hidden 576, 9/3 heads of 64, feed-forward 1536, vocabulary 49152, 30
// layers, 512 tokens.
//
//   ops_bench [--threads N] [--path auto|generic|avx2|avx512] [--documents N] [--rounds N]
//             [--only TEXT]
//
// One JSON object a line; bench/cpu-ops.ts prints the table.
//
// Times are CPU time of the whole process (other programs disturb it less than wall time), median
// and best of the rounds. GB/s counts each operand once; GFLOP/s of attention counts what the
// causal mask leaves.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace {

constexpr size_t kTokens = 512, kHidden = 576, kHeads = 9, kKvHeads = 3, kHeadSize = 64;
constexpr size_t kFeedForward = 1536, kVocabulary = 49152, kLayers = 30, kChunkRows = 128;
constexpr size_t kKv = kKvHeads * kHeadSize;
constexpr size_t kAdapter = 4884480;  // trained elements at rank 16 on all seven linears

struct Options {
  int threads = 1, rounds = 15;
  const char* path = "auto";
  size_t documents = 1;
  const char* only = "";  // operations whose name contains this
};

struct Operation {
  std::string name;
  double per_step;      // calls in a training step
  double bytes, flops;  // of one call
  bool is_product;
  std::function<TmStatus()> call;
};

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), backend_(tm_cpu_backend()) {
    const TmContextOptions context = {
        sizeof context, options.threads, options.path, 0, TM_FP32, nullptr, 0};
    if (backend_->create(&context, &context_) != TM_OK) {
      fprintf(stderr, "%s\n", backend_->last_error());
      exit(2);
    }
    for (size_t d = 0; d <= options.documents; ++d) {
      starts_.push_back(static_cast<int32_t>(kTokens * d / options.documents));
    }
  }
  ~Bench() { backend_->destroy(context_); }

  void run();

 private:
  float* floats(size_t n);
  void add_products();
  void add_elementwise();
  void add_attention();
  void add_loss_and_update();
  void add(Operation operation) { operations_.push_back(std::move(operation)); }

  Options options_;
  const TmBackend* backend_;
  TmContext* context_ = nullptr;
  std::vector<int32_t> starts_, tokens_;
  std::vector<double> losses_;
  std::vector<std::vector<float>> buffers_;
  std::vector<Operation> operations_;
};

// Small values of both signs; freed with the bench.
float* Bench::floats(size_t n) {
  std::vector<float> values(n + 16);
  uint32_t state = uint32_t(buffers_.size()) * 2654435761u + 1;
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = float(int32_t(state)) * 0x1p-31f;
  }
  buffers_.push_back(std::move(values));
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffers_.back().data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

void Bench::add_products() {
  struct Shape {
    const char* name;
    size_t in, out, rows;
    double per_step;
  };
  const Shape shapes[] = {{"q, o", kHidden, kHidden, kTokens, 2 * kLayers},
                          {"k, v", kHidden, kKv, kTokens, 2 * kLayers},
                          {"gate, up", kHidden, kFeedForward, kTokens, 2 * kLayers},
                          {"down", kFeedForward, kHidden, kTokens, kLayers},
                          {"head", kHidden, kVocabulary, kChunkRows, kTokens / kChunkRows}};
  for (const Shape& s : shapes) {
    float* rows = floats(s.in * s.out);
    float* packed = floats(backend_->packed_weight_elements(s.out, s.in));
    backend_->pack_weight(context_, rows, s.out, s.in, packed);
    const double flops = 2.0 * double(s.in) * double(s.out) * double(s.rows);
    TmLinear forward = {floats(s.rows * s.in),
                        s.in,
                        {nullptr, packed, s.out, s.in},
                        floats(s.rows * s.out),
                        s.out,
                        s.rows,
                        0,
                        1.0f};
    TmLinear backward = {floats(s.rows * s.in), s.in, forward.w, forward.y, s.out, s.rows, 0, 1.0f};
    add({std::string("product ") + s.name, s.per_step, 0, flops, true,
         [=, this] { return backend_->linear_forward(context_, &forward); }});
    add({std::string("product dX ") + s.name, s.per_step, 0, flops, true,
         [=, this] { return backend_->linear_backward_input(context_, &backward); }});
  }
}

void Bench::add_elementwise() {
  const size_t n = kTokens, c = kHidden, d = kFeedForward;
  const double hidden_bytes = 4.0 * n * c, wide_bytes = 4.0 * n * d;
  float *x = floats(n * c), *y = floats(n * c), *dx = floats(n * c), *gain = floats(c);
  float *rstd = floats(n), *dgain = floats(c);
  const TmRmsNorm norm = {x, gain, y, rstd, n, c, c, c, 1e-5f, 0, {}};
  TmRmsNormBackward norm_back = {y, x, gain, rstd, dx, nullptr, n, c, c, c, c, 1, 0, {}};
  add({"rms_norm forward", 2 * kLayers + 1, 2 * hidden_bytes, 0, false,
       [=, this] { return backend_->rms_norm_forward(context_, &norm); }});
  add({"rms_norm backward, added", 2 * kLayers + 1, 4 * hidden_bytes, 0, false,
       [=, this] { return backend_->rms_norm_backward(context_, &norm_back); }});
  norm_back.dgain = dgain;
  add({"rms_norm backward with gain", 0, 6 * hidden_bytes, 0, false,
       [=, this] { return backend_->rms_norm_backward(context_, &norm_back); }});
  float *gate = floats(n * d), *up = floats(n * d), *out = floats(n * d), *dout = floats(n * d);
  float *dgate = floats(n * d), *dup = floats(n * d);
  const TmSwiGlu swiglu = {gate, up, out, n, d, d, d, {}};
  const TmSwiGluBackward swiglu_back = {dout, gate, up, dgate, dup, out, n, d, d, d, {}};
  add({"swiglu forward", kLayers, 3 * wide_bytes, 0, false,
       [=, this] { return backend_->swiglu_forward(context_, &swiglu); }});
  add({"swiglu backward with out", kLayers, 6 * wide_bytes, 0, false,
       [=, this] { return backend_->swiglu_backward(context_, &swiglu_back); }});
  add({"add", 2 * kLayers, 3 * hidden_bytes, 0, false,
       [=, this] { return backend_->add(context_, y, x, n * c); }});
  float *cosine = floats(n * kHeadSize / 2), *sine = floats(n * kHeadSize / 2);
  tokens_.resize(n);
  for (size_t i = 0; i < n; ++i) tokens_[i] = int32_t(i);
  const TmRope rope = {x, c, tokens_.data(), cosine, sine, n, kHeads, kHeadSize, 0, {}, 0};
  const TmRope rope_k = {y, kKv, tokens_.data(), cosine, sine, n, kKvHeads, kHeadSize, 0, {}, 0};
  add({"rope q", 2 * kLayers, 2 * hidden_bytes, 0, false,
       [=, this] { return backend_->rope(context_, &rope); }});
  add({"rope k", 2 * kLayers, 2 * hidden_bytes / 3, 0, false,
       [=, this] { return backend_->rope(context_, &rope_k); }});
  float* table = floats(kTokens * c);
  add({"embedding forward", 1, 2 * hidden_bytes, 0, false, [=, this] {
         const TmWeight rows = {table, nullptr, kTokens, c};
         return backend_->embedding_forward(context_, tokens_.data(), n, &rows, y);
       }});
  add({"embedding backward", 0, 3 * hidden_bytes, 0, false, [=, this] {
         return backend_->embedding_backward_add(context_, tokens_.data(), n, y, c, kTokens, table);
       }});
}

void Bench::add_attention() {
  const size_t n = kTokens, wide = kHidden, narrow = kKv;
  double pairs = 0;
  size_t longest = 0;
  for (size_t d = 0; d + 1 < starts_.size(); ++d) {
    const size_t length = size_t(starts_[d + 1] - starts_[d]);
    longest = std::max(longest, length);
    pairs += 0.5 * double(length) * double(length + 1);
  }
  const TmAttentionJob job = {n, longest, kHeads, kKvHeads, kHeadSize, true};
  const size_t bytes = backend_->attention_scratch_bytes(context_, &job);
  TmAttentionBackward b{};
  b.forward = {floats(n * wide),
               floats(n * narrow),
               floats(n * narrow),
               wide,
               narrow,
               narrow,
               floats(n * wide),
               wide,
               floats(n * kHeads),
               starts_.data(),
               starts_.size() - 1,
               n,
               kHeads,
               kKvHeads,
               kHeadSize,
               0,
               0.125f,
               floats(bytes / 4),
               bytes,
               starts_.data(),
               0};
  b.dout = floats(n * wide);
  b.dq = floats(n * wide);
  b.dk = floats(n * narrow);
  b.dv = floats(n * narrow);
  b.dout_stride = b.dq_stride = wide;
  b.dk_stride = b.dv_stride = narrow;
  const double flops = 2 * pairs * kHeads * kHeadSize;
  add({"attention forward", kLayers, 0, 2 * flops, false,
       [=, this] { return backend_->attention_forward(context_, &b.forward); }});
  add({"attention backward", kLayers, 0, 5 * flops, false,
       [=, this] { return backend_->attention_backward(context_, &b); }});
}

void Bench::add_loss_and_update() {
  losses_.resize(kChunkRows);
  const double chunk_bytes = 4.0 * kChunkRows * kVocabulary;
  // The gradient of the last call is the logits of the next one: small numbers, the same work.
  TmCrossEntropy loss = {floats(kChunkRows * kVocabulary),
                         kVocabulary,
                         tokens_.data(),
                         losses_.data(),
                         kChunkRows,
                         kVocabulary,
                         1.0f / kTokens,
                         1};
  add({"cross_entropy with gradient", kTokens / kChunkRows, 2 * chunk_bytes, 0, false,
       [=, this] { return backend_->cross_entropy(context_, &loss); }});
  loss.dlogits = 0;
  add({"cross_entropy, loss only", 0, chunk_bytes, 0, false,
       [=, this] { return backend_->cross_entropy(context_, &loss); }});
  float *p = floats(kAdapter), *m = floats(kAdapter), *v = floats(kAdapter), *g = floats(kAdapter);
  for (size_t i = 0; i < kAdapter; ++i) v[i] = fabsf(v[i]);
  TmTrainedTensor adapter = {};
  adapter.p = p;
  adapter.m = m;
  adapter.v = v;
  adapter.n = adapter.columns = adapter.p_stride = kAdapter;
  adapter.decays = 1;
  add({"adamw, adapter", 1, 28.0 * kAdapter, 0, false, [=, this] {
         const TmAdamW call = {&adapter, &adapter, 1,    kAdapter / 256, g,      nullptr, 1e-4f,
                               1.0f,     0.5f,     0.5f, 0.9f,           0.999f, 1e-8f,   0.01f,
                               0,        1};
         return backend_->adamw(context_, &call);
       }});
}

void Bench::run() {
  add_products();
  add_elementwise();
  add_attention();
  add_loss_and_update();
  for (const Operation& op : operations_) {
    if (op.name.find(options_.only) == std::string::npos) continue;
    std::vector<double> ms;
    for (int round = -2; round < options_.rounds; ++round) {
      const double start = cpu_seconds();
      if (op.call() != TM_OK) fprintf(stderr, "%s: %s\n", op.name.c_str(), backend_->last_error());
      if (round >= 0) ms.push_back(1e3 * (cpu_seconds() - start));
    }
    std::sort(ms.begin(), ms.end());
    const double median = ms[ms.size() / 2], rate = 1e-6 / median;
    printf(
        "{\"operation\":\"%s\",\"is_product\":%s,\"path\":\"%s\",\"threads\":%d,"
        "\"documents\":%zu,\"median_ms\":%.4f,\"best_ms\":%.4f,\"gb_per_second\":%.2f,"
        "\"gflops\":%.2f,\"step_ms\":%.3f}\n",
        op.name.c_str(), op.is_product ? "true" : "false", backend_->instruction_path(context_),
        backend_->num_threads(context_), options_.documents, median, ms[0], op.bytes * rate,
        op.flops * rate, median * op.per_step);
    fflush(stdout);
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    if (name == "--threads") options.threads = atoi(value);
    if (name == "--rounds") options.rounds = std::max(1, atoi(value));
    if (name == "--documents") options.documents = size_t(std::clamp(atoi(value), 1, 512));
    if (name == "--path") options.path = value;
    if (name == "--only") options.only = value;
    ++i;
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  Bench(parse(argc, argv)).run();
  return 0;
}
