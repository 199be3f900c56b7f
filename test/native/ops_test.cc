// Every operation of the CPU backend but the matrix products: against the reference in double, the
// same bits on every instruction path and for any number of threads, outputs and the gaps between
// rows poisoned beforehand.
#include <algorithm>
#include <bit>

#include "adamw_checks.h"
#include "kernels/cpu/dispatch.h"
#include "op_cases.h"
#include "op_refusals.h"
#include "op_small_cases.h"

namespace tunemesh {
namespace {

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
  TmAttention a = {x.data(), x.data(),   x.data(), 16,      16, 16,     out.data(),
                   16,       lse.data(), starts,   1,       4,  1,      1,
                   16,       0,          0.25f,    nullptr, 0,  starts, 0};
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

std::vector<Device> open_devices() {
  std::vector<Device> devices;
  const TmBackend* backend = tm_cpu_backend();
  for (const char* path : {"avx512", "avx2", "generic"}) {
    for (int threads : {1, 2, 3}) {
      const TmContextOptions options = {sizeof options, threads, path, 0, TM_FP32, nullptr, 0};
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

int run(const std::string& vectors) {
  Tally tally;
  std::vector<Device> devices = open_devices();
  for (const OpCase& op : all_cases()) run_case(op, devices, tally);
  for (const OpCase& op : small_cases()) run_case(op, {devices[0]}, tally);
  adamw_vectors(devices, vectors, tally);
  compare_updates(devices, false, tally);
  compare_half_squares(devices, devices[0], tally);
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

// ops_test [FOLDER of adamw_vectors.json]; it is otherwise sought in test/native.
int main(int argc, char** argv) { return tunemesh::run(argc > 1 ? argv[1] : ""); }
