#include "engine/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/train_step.h"
#include "kernels/philox.h"

namespace tunemesh {
namespace {

void check_options(const GenerateModel& model, const GenerateOptions& options) {
  auto refuse = [](const std::string& what) { throw EngineError("DATA_INVALID", what); };
  const size_t limit = model.config.max_position_embeddings;
  if (options.prompt.empty() || options.prompt.size() >= limit) {
    refuse("the prompt has " + std::to_string(options.prompt.size()) + " tokens; 1 to " +
           std::to_string(limit - 1) + " fit this model.");
  }
  for (const int32_t id : options.prompt) {
    if (id < 0 || static_cast<size_t>(id) >= model.config.vocab_size) {
      refuse("the prompt's token " + std::to_string(id) + " is not in the vocabulary of " +
             std::to_string(model.config.vocab_size) + ".");
    }
  }
  if (options.max_new_tokens == 0) refuse("maxNewTokens is 0; ask for at least one token.");
  if (!(options.temperature >= 0) || !(options.top_p > 0 && options.top_p <= 1)) {
    refuse("temperature must be 0 or more and topP above 0 and at most 1.");
  }
}

// Runs tokens through the model from cache row `start`; the logits of the last one. Everything is
// copied in before the layers, so that the device runs through to the logits without waiting for
// the host.
std::vector<float> next_logits(const StepModel& model, const std::vector<int32_t>& tokens,
                               size_t start) {
  const int32_t count = static_cast<int32_t>(tokens.size());
  const int32_t bounds[2] = {0, count};
  const TokenBatch batch = {tokens.data(), nullptr, tokens.size(), bounds, 1};
  const Pass pass = begin_pass(model, batch, start);
  const int32_t last = count - 1;
  TM_RUN(model.device, copy_in, model.work.loss_rows, &last, sizeof last);
  forward_layers(pass);
  TM_RUN(model.device, gather_rows, model.work.residual.back(), model.work.loss_rows, 1,
         model.config.hidden_size, model.work.loss_x);
  head_forward(pass, 1);
  std::vector<float> logits(model.config.vocab_size);
  TM_RUN(model.device, read_elements, logits.data(), model.work.logits, logits.size());
  return logits;
}

// exp(x) for x <= 0: libm's differs between machines, and the same seed must give the same text.
// x = n ln2 + r with ln2 in two parts; exp(r) by its power series.
double exp_nonpositive(double x) {
  if (!(x > -700)) return 0;
  const double n = std::nearbyint(x * 1.4426950408889634074);
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double series = 1;
  for (int k = 14; k >= 1; --k) series = 1 + series * (r / k);
  return std::ldexp(series, static_cast<int>(n));
}

}  // namespace

GenerateResult generate(const GenerateModel& model, const GenerateOptions& options,
                        const GenerateHooks& hooks) {
  check_options(model, options);
  const size_t room = model.config.max_position_embeddings - options.prompt.size();
  const size_t max_new_tokens = std::min(options.max_new_tokens, room);
  const size_t cache_tokens = options.prompt.size() + max_new_tokens;
  Workspace work;
  work.spec = {options.prompt.size(), cache_tokens,        1, model.weights.lora_rank, false,
               cache_tokens,          model.weights.groups};
  Arena arena(model.device);
  work.reserve(model.config, model.device, arena);
  arena.allocate();
  work.reserve(model.config, model.device, arena);
  arena.seal();
  work.fill_rotary(model.config, model.device);

  const StepModel step = {model.device, model.config, model.weights, work};
  GenerateResult result = {{}, "length"};
  std::vector<int32_t> tokens = options.prompt;
  size_t start = 0;
  while (result.ids.size() < max_new_tokens) {
    if (hooks.is_aborted->load()) return {std::move(result.ids), "aborted"};
    const std::vector<float> logits = next_logits(step, tokens, start);
    start += tokens.size();
    const int32_t next = sample_token(logits, options, result.ids.size());
    const auto& stops = options.stop_ids;
    if (std::find(stops.begin(), stops.end(), next) != stops.end()) {
      return {std::move(result.ids), "stop"};
    }
    result.ids.push_back(next);
    hooks.on_token(next);
    tokens = {next};
  }
  return result;
}

int32_t sample_token(const std::vector<float>& logits, const GenerateOptions& options,
                     size_t token_index) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  if (options.temperature == 0) return static_cast<int32_t>(largest - logits.begin());
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = exp_nonpositive((static_cast<double>(logits[i]) - *largest) / options.temperature);
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return weights[a] > weights[b]; });
  // The smallest set of likeliest tokens whose mass reaches top_p.
  double kept = 0;
  size_t num_kept = 0;
  while (num_kept < order.size() && (num_kept == 0 || kept < options.top_p * total)) {
    kept += weights[order[num_kept++]];
  }
  double drawn = philox_uniform(options.seed, PhiloxStream::kSampling, token_index) * kept;
  for (size_t i = 0; i < num_kept; ++i) {
    drawn -= weights[order[i]];
    if (drawn < 0) return order[i];
  }
  return order[num_kept - 1];
}

}  // namespace tunemesh
