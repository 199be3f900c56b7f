// The engine's `local` mode: one worker, whose step adds the gradients of its micro-batches where
// they are computed; nothing is exchanged.
#include <chrono>
#include <cmath>
#include <vector>

#include "engine/engine.h"

namespace tunemesh {

TrainingState& Engine::local_training(const char* what) const {
  TrainingState& state = training(what);
  if (state.spec().is_local) return state;
  throw EngineError("STATE_CONFLICT", std::string(what) + ": the job is not in local mode.");
}

MicroBatchResult Engine::local_micro_batch(const TokenBatch& batch, double loss_divisor) {
  TrainingState& state = local_training("localMicroBatch");
  if (!(loss_divisor > 0)) {
    throw EngineError("DATA_INVALID",
                      "lossDivisor is " + std::to_string(loss_divisor) + "; it must be above 0.");
  }
  check_batch(batch, {options_.config, state.work().spec});
  const bool adds = state.trained().adds_gradient;
  const size_t summed = adds ? state.num_summed() : 0;
  if (adds && summed == state.spec().local_micro_batches) {
    throw EngineError("STATE_CONFLICT", "localMicroBatch: the step has its " +
                                            std::to_string(summed) +
                                            " micro-batches; apply its update first.");
  }
  state.num_summed() = 0;  // should it fail
  const auto start = std::chrono::steady_clock::now();
  GradientVector gradient;
  if (summed == 0) gradient = {state.trained().added_ranges(), state.trained().gradient_ranges()};
  const LossResult loss = train_step({*device_, options_.config, weights_, state.work()}, batch,
                                     {gradient, loss_divisor});
  const std::chrono::duration<double, std::milli> elapsed =
      std::chrono::steady_clock::now() - start;
  state.num_summed() = summed + 1;
  return {loss.loss_sum, loss.num_target_tokens, elapsed.count(), {}};
}

double Engine::local_sum_squares() const {
  const TrainingState& state = local_training("localSumSquares");
  const std::span<double> sums = state.norm_sums();
  const TrainedVector& trained = state.trained();
  TmSumSquares call = {trained.gradient, state.layout().num_blocks, sums.data(),
                       trained.half.gradient};
  TM_RUN(*device_, sum_squares, &call);
  if (trained.has_half_gradient) {  // the vectors' floats after the matrices
    call = {trained.half.vector_gradient, trained.half.num_vector_floats / kBlockElements,
            sums.data() + norm_groups(call.num_blocks), nullptr};
    TM_RUN(*device_, sum_squares, &call);
  }
  std::vector<double> groups(sums.size());
  TM_RUN(*device_, copy_out, groups.data(), sums.data(), groups.size() * sizeof(double));
  double total = 0;
  for (const double group : groups) total += group;
  if (std::isfinite(total)) return total;
  throw EngineError("NON_FINITE_GRADIENT",
                    "the gradient's norm is not finite. Lower the learning rate or look at the "
                    "rows of this step.");
}

void Engine::apply_local_update(size_t step, const AdamWNumbers& numbers) {
  TrainingState& state = local_training("applyLocalUpdate");
  update_from({step, state.trained().gradient}, numbers);
  state.num_summed() = 0;
}

}  // namespace tunemesh
