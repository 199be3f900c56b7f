// Every operation of the CPU backend but the matrix products: against the reference in double, the
// same bits on every instruction path and for any number of threads, outputs and the gaps between
// rows poisoned beforehand.
#include <algorithm>
#include <bit>

#include "kernels/cpu/dispatch.h"
#include "kernels/reference/reference.h"
#include "op_layer_cases.h"

namespace tunemesh {
namespace {

struct AttentionShape {
  std::vector<int32_t> starts;
  size_t heads, kv_heads, size, window, gap;
};

struct AttentionInputs {
  Matrix q, k, v, dout;
  float scale;
};

Outputs attention_kernel(const Device& d, const AttentionShape& s, const AttentionInputs& in) {
  const size_t n = size_t(s.starts.back());
  size_t longest = 0;
  for (size_t i = 1; i < s.starts.size(); ++i) {
    longest = std::max(longest, size_t(s.starts[i] - s.starts[i - 1]));
  }
  Matrix out = poisoned(in.dout), dq = poisoned(in.q), dk = poisoned(in.k), dv = poisoned(in.v);
  Floats lse(n * s.heads, kPoison);
  const size_t bytes =
      d.backend->attention_scratch_bytes(d.context, longest, s.heads, s.kv_heads, s.size);
  Floats scratch(bytes / sizeof(float), kPoison);
  TmAttentionBackward b{};
  b.forward = {in.q.values.data(),
               in.k.values.data(),
               in.v.values.data(),
               in.q.stride,
               in.k.stride,
               in.v.stride,
               out.values.data(),
               out.stride,
               lse.data(),
               s.starts.data(),
               s.starts.size() - 1,
               n,
               s.heads,
               s.kv_heads,
               s.size,
               s.window,
               in.scale,
               scratch.data(),
               bytes};
  require(d.backend->attention_forward(d.context, &b.forward), d);
  scratch.assign(scratch.size(), kPoison);
  b.dout = in.dout.values.data();
  b.dout_stride = in.dout.stride;
  b.dq = dq.values.data();
  b.dk = dk.values.data();
  b.dv = dv.values.data();
  b.dq_stride = dq.stride;
  b.dk_stride = dk.stride;
  b.dv_stride = dv.stride;
  require(d.backend->attention_backward(d.context, &b), d);
  return {out.values, lse, dq.values, dk.values, dv.values};
}

template <typename Real>
Exact attention_reference(const AttentionShape& s, const AttentionInputs& in) {
  auto q = as<Real>(in.q.values), k = as<Real>(in.k.values), v = as<Real>(in.v.values);
  auto dout = as<Real>(in.dout.values), out = as<Real>(poisoned(in.dout).values);
  auto dq = as<Real>(poisoned(in.q).values), dk = as<Real>(poisoned(in.k).values);
  auto dv = as<Real>(poisoned(in.v).values);
  std::vector<Real> lse(size_t(s.starts.back()) * s.heads);
  const reference::Attention<Real> forward = {{q.data(), in.q.stride},
                                              {k.data(), in.k.stride},
                                              {v.data(), in.v.stride},
                                              {out.data(), in.dout.stride},
                                              lse.data(),
                                              s.starts.data(),
                                              s.starts.size() - 1,
                                              s.heads,
                                              s.kv_heads,
                                              s.size,
                                              s.window,
                                              in.scale};
  reference::attention_forward<Real>(forward);
  reference::attention_backward<Real>({forward,
                                       {dout.data(), in.dout.stride},
                                       {dq.data(), in.q.stride},
                                       {dk.data(), in.k.stride},
                                       {dv.data(), in.v.stride}});
  return {exact(out), exact(lse), exact(dq), exact(dk), exact(dv)};
}

OpCase attention_case(Random random, const AttentionShape& s) {
  const size_t n = size_t(s.starts.back());
  const size_t wide = s.heads * s.size, narrow = s.kv_heads * s.size;
  const AttentionInputs in = {
      random_matrix(random, n, wide, s.gap), random_matrix(random, n, narrow, 2 * s.gap),
      random_matrix(random, n, narrow, s.gap), random_matrix(random, n, wide, 3 * s.gap),
      1.0f / sqrtf(float(s.size))};
  return make_case(
      named("attention", {n, s.starts.size() - 1, s.heads, s.kv_heads, s.size, s.window}),
      [=](const Device& d) { return attention_kernel(d, s, in); },
      [=](auto real) { return attention_reference<decltype(real)>(s, in); });
}

struct DecodeShape {
  size_t first, end, heads, kv_heads, size, gap;
};

OpCase decode_case(Random random, const DecodeShape& s) {
  const size_t narrow = s.kv_heads * s.size;
  const Floats q = random.normals(s.heads * s.size, 1);
  const Matrix k = random_matrix(random, s.end, narrow, s.gap);
  const Matrix v = random_matrix(random, s.end, narrow, 2 * s.gap);
  const float scale = 1.0f / sqrtf(float(s.size));
  const auto kernel = [=](const Device& d) {
    const size_t stride = (s.end - s.first + 15) / 16 * 16;
    Floats out(q.size(), kPoison), scores(s.heads * stride, kPoison);
    const TmDecodeAttention call = {
        q.data(), k.values.data(), v.values.data(), k.stride, v.stride, out.data(),    s.first,
        s.end,    s.heads,         s.kv_heads,      s.size,   scale,    scores.data(), stride};
    require(d.backend->decode_attention(d.context, &call), d);
    return Outputs{out};
  };
  const auto reference = [=](auto real) {
    using Real = decltype(real);
    auto exact_q = as<Real>(q), exact_k = as<Real>(k.values), exact_v = as<Real>(v.values);
    std::vector<Real> out(q.size());
    reference::decode_attention<Real>({exact_q.data(),
                                       {exact_k.data(), k.stride},
                                       {exact_v.data(), v.stride},
                                       out.data(),
                                       s.first,
                                       s.end,
                                       s.heads,
                                       s.kv_heads,
                                       s.size,
                                       scale});
    return Exact{exact(out)};
  };
  return make_case(named("decode attention", {s.first, s.end, s.heads, s.kv_heads, s.size}), kernel,
                   reference);
}

void adamw_vectors(const std::vector<Device>& devices, const char* path, Tally& tally) {
  FILE* file = fopen(path, "r");
  tally.check(file != nullptr, std::string("adamw vectors: cannot open ") + path);
  if (!file) return;
  std::vector<std::vector<uint32_t>>
      rows;  // every innermost list of numbers: scalars, then elements
  std::vector<uint32_t> row;
  uint32_t value = 0;
  bool in_number = false, in_text = false;
  for (int c; (c = fgetc(file)) != EOF;) {
    if (c == '"') in_text = !in_text;
    if (in_text) continue;
    if (c >= '0' && c <= '9') {
      value = (in_number ? value * 10 : 0) + uint32_t(c - '0');
      in_number = true;
      continue;
    }
    if (in_number) row.push_back(value);
    in_number = false;
    if (c == ']' && !row.empty()) rows.push_back(std::move(row));
    if (c == ']' || c == '[') row.clear();
  }
  fclose(file);
  auto number = [](uint32_t bits) { return std::bit_cast<float>(bits); };
  auto wide_number = [](uint32_t high, uint32_t low) {
    return std::bit_cast<double>(uint64_t{high} << 32 | low);
  };
  size_t num_elements = 0;
  for (size_t i = 0; i < rows.size();) {
    const std::vector<uint32_t> s = rows[i++];
    Floats columns[7];
    for (; i < rows.size() && rows[i].size() == 7; ++i) {
      for (size_t k = 0; k < 7; ++k) columns[k].push_back(number(rows[i][k]));
    }
    const size_t n = columns[0].size();
    num_elements += n;
    for (size_t device = 0; device <= devices.size(); ++device) {
      Floats p = columns[0], m = columns[1], v = columns[2];
      TmAdamW args{};
      args.p = p.data();
      args.m = m.data();
      args.v = v.data();
      args.gradient = columns[3].data();
      args.n = n;
      args.learning_rate = number(s[0]);
      args.clip_factor = number(s[1]);
      args.bias_correction1 = number(s[2]);
      args.bias_correction2_sqrt = number(s[3]);
      args.beta1 = wide_number(s[4], s[5]);
      args.beta2 = wide_number(s[6], s[7]);
      args.epsilon = number(s[8]);
      args.weight_decay = number(s[9]);
      const bool is_reference = device == devices.size();
      if (is_reference) reference::adamw(args);
      if (!is_reference)
        require(devices[device].backend->adamw(devices[device].context, &args), devices[device]);
      tally.check(
          same_bits({p, m, v}, {columns[4], columns[5], columns[6]}),
          "adamw vectors on " + (is_reference ? std::string("reference") : devices[device].name));
    }
  }
  tally.check(num_elements >= 200, "adamw vectors: fewer than 200 elements read");
}

// Largest error in units of the last place of the double result rounded to float.
void exp_scan(const Device& d, Tally& tally, uint32_t step) {
  const auto& ops = kernels_for(d.context->path).ops;
  double worst = 0;
  Floats x, y(4096);
  auto flush = [&] {
    ops.exp_nonpositive(x.data(), y.data(), x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      const double want = ::exp(double(x[i]));
      const float nearest = float(want);
      const double ulp = double(nextafterf(nearest, INFINITY)) - double(nearest);
      worst = fmax(worst, fabs(double(y[i]) - want) / ulp);
    }
    x.clear();
  };
  const uint32_t lowest = std::bit_cast<uint32_t>(-87.0f);
  for (uint64_t bits = 0x80000000u; bits <= lowest; bits += step) {
    x.push_back(std::bit_cast<float>(uint32_t(bits)));
    if (x.size() == y.size()) flush();
  }
  flush();
  char line[128];
  snprintf(line, sizeof line, "exp on %s: %.3f ulp", d.name.c_str(), worst);
  tally.check(worst < 1.02, line);
  if (getenv("OPS_VERBOSE")) printf("%s\n", line);
  const Floats edge = {0.0f,   -0.0f,     -87.0f, nextafterf(-87.0f, -INFINITY),
                       -1e30f, -INFINITY, kPoison};
  Floats result(edge.size());
  ops.exp_nonpositive(edge.data(), result.data(), edge.size());
  tally.check(result[0] == 1 && result[1] == 1 && result[2] > 1.6e-38f && result[3] == 0 &&
                  result[4] == 0 && result[5] == 0 && isnan(result[6]),
              "exp edges on " + d.name);
}

void log_scan(const Device& d, Tally& tally) {
  const auto& ops = kernels_for(d.context->path).ops;
  Random random(5);
  std::vector<double> x, y;
  for (int i = 0; i < 200000; ++i) {
    x.push_back(::exp(1400 * (random.uniform() - 0.5)));
    x.push_back(1 + 1e-3 * (random.uniform() - 0.5));
    x.push_back(1 + 70000 * random.uniform());
  }
  y.resize(x.size());
  ops.log_positive(x.data(), y.data(), x.size());
  long double worst = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double want = ::logl(static_cast<long double>(x[i]));
    const double nearest = fabs(double(want));
    worst = std::max(worst, fabsl(y[i] - want) / (nextafter(nearest, INFINITY) - nearest));
  }
  char line[128];
  snprintf(line, sizeof line, "log on %s: %.3Lf ulp", d.name.c_str(), worst);
  tally.check(worst < 1.5L, line);
  if (getenv("OPS_VERBOSE")) printf("%s\n", line);
  const double edge[] = {1.0, 0.0, -1.0, INFINITY, NAN};
  double result[5];
  ops.log_positive(edge, result, 5);
  tally.check(result[0] == 0 && isnan(result[1]) && isnan(result[2]) && isinf(result[3]) &&
                  isnan(result[4]),
              "log edges on " + d.name);
}

// A NaN must reach the loss, and wrong arguments must be refused with a line that says why.
void refusals(const Device& d, Tally& tally) {
  Floats logits(40, 1.0f);
  logits[7] = kPoison;
  double losses[2] = {};
  int32_t targets[2] = {3, 4};
  TmCrossEntropy loss = {logits.data(), 20, targets, losses, 2, 20, 1.0f, 1};
  tally.check(
      d.backend->cross_entropy(d.context, &loss) == TM_OK && isnan(losses[0]) && !isnan(losses[1]),
      "cross entropy: a NaN logit gives a NaN loss in its row alone, on " + d.name);
  targets[1] = 20;
  tally.check(d.backend->cross_entropy(d.context, &loss) == TM_BAD_ARGUMENT &&
                  strstr(d.backend->last_error(), "index 20 at position 1"),
              "cross entropy: a target beyond the vocabulary is refused on " + d.name);
  Floats x(64 * 4, 0.5f), out(64 * 4), lse(16);
  const int32_t starts[] = {0, 4};
  TmAttention a = {x.data(), x.data(),   x.data(), 16,      16, 16, out.data(),
                   16,       lse.data(), starts,   1,       4,  1,  1,
                   16,       0,          0.25f,    nullptr, 0};
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT &&
                  strstr(d.backend->last_error(), "scratch"),
              "attention: short scratch is refused on " + d.name);
  a.n = 5;
  tally.check(d.backend->attention_forward(d.context, &a) == TM_BAD_ARGUMENT &&
                  strstr(d.backend->last_error(), "expected [0, 5)"),
              "attention: documents that do not end at n are refused on " + d.name);
  TmDecodeAttention decode = {x.data(), x.data(), x.data(), 16, 16,    out.data(), 2,
                              2,        1,        1,        16, 0.25f, lse.data(), 16};
  tally.check(d.backend->decode_attention(d.context, &decode) == TM_BAD_ARGUMENT &&
                  strstr(d.backend->last_error(), "rows [2, 2) hold no key"),
              "decode attention: no keys are refused on " + d.name);
  decode.end = 4;
  decode.score_stride = 15;
  tally.check(d.backend->decode_attention(d.context, &decode) == TM_BAD_ARGUMENT &&
                  strstr(d.backend->last_error(), "score_stride is 15"),
              "decode attention: a ragged score_stride is refused on " + d.name);
}

std::vector<OpCase> all_cases() {
  uint64_t seed = 1;
  auto random = [&] { return Random(seed++); };
  std::vector<OpCase> cases = {
      embedding_case(random(), 41, 33, 19),   embedding_case(random(), 130, 576, 300),
      norm_case(random(), 33, 64, 0, false),  norm_case(random(), 129, 577, 5, true),
      norm_case(random(), 7, 16, 0, true),    norm_case(random(), 300, 576, 0, false),
      norm_case(random(), 5, 1031, 1, false), bias_case(random(), 77, 49, 3),
      bias_case(random(), 33, 300, 0),        rope_case(random(), 3, 16, 0),
      rope_case(random(), 4, 24, 8),          rope_case(random(), 9, 64, 5),
      rope_case(random(), 2, 128, 1),         swiglu_case(random(), 31, 177, 1),
      swiglu_case(random(), 5, 1536, 10),     swiglu_case(random(), 3, 333, 60),
      loss_case(random(), 5, 320, 1),         loss_case(random(), 3, 4111, 3),
      loss_case(random(), 2, 49152, 10),      loss_case(random(), 3, 17, 30),
  };
  const AttentionShape shapes[] = {
      {{0, 37, 38, 120, 233}, 6, 2, 16, 0, 0}, {{0, 37, 38, 120, 233}, 6, 2, 64, 0, 5},
      {{0, 130, 131, 200}, 4, 4, 32, 8, 3},    {{0, 65, 100, 259}, 4, 1, 32, 50, 0},
      {{0, 64, 192}, 2, 1, 128, 0, 1},         {{0, 5, 9, 14, 100}, 4, 2, 24, 7, 2},
      {{0, 1, 2, 40}, 2, 1, 16, 1, 0},         {{0, 300}, 3, 1, 64, 100, 0},
      {{0, 3, 3, 50}, 2, 2, 8, 0, 0},          {{0, 97, 161, 340}, 3, 3, 17, 65, 0},
  };
  for (const AttentionShape& shape : shapes) cases.push_back(attention_case(random(), shape));
  const DecodeShape decodes[] = {{0, 1, 4, 2, 16, 0},    {0, 2, 9, 3, 64, 1},
                                 {3, 40, 6, 2, 24, 5},   {100, 613, 9, 3, 64, 0},
                                 {0, 300, 3, 1, 128, 2}, {7, 32, 2, 2, 17, 0}};
  for (const DecodeShape& shape : decodes) cases.push_back(decode_case(random(), shape));
  return cases;
}

std::vector<Device> open_devices() {
  std::vector<Device> devices;
  const TmBackend* backend = tm_cpu_backend();
  for (const char* path : {"avx512", "avx2", "generic"}) {
    for (int threads : {1, 2, 3}) {
      const TmContextOptions options = {sizeof options, threads, path, 0};
      TmContext* context = nullptr;
      if (backend->create(&options, &context) != TM_OK) {
        printf("skipped: %s\n", backend->last_error());
        break;
      }
      std::string name = path;
      name.append(", ").append(std::to_string(threads)).append(" threads");
      devices.push_back({backend, context, name});
    }
  }
  return devices;
}

int run(const char* vectors) {
  Tally tally;
  std::vector<Device> devices = open_devices();
  for (const OpCase& op : all_cases()) run_case(op, devices, tally);
  adamw_vectors(devices, vectors, tally);
  const uint32_t step = getenv("OPS_FULL_SCAN") ? 1 : 997;
  for (const Device& device : devices) {
    refusals(device, tally);
    if (device.context->pool.num_threads() != 1) continue;
    exp_scan(device, tally, step);
    log_scan(device, tally);
  }
  for (const Device& device : devices) device.backend->destroy(device.context);
  return tally.finish();
}

}  // namespace
}  // namespace tunemesh

// ops_test [adamw_vectors.json]; the file is otherwise sought beside this source.
int main(int argc, char** argv) {
  const std::string here = __FILE__;
  const std::string beside = here.substr(0, here.rfind('/') + 1) + "adamw_vectors.json";
  return tunemesh::run(argc > 1 ? argv[1] : beside.c_str());
}
