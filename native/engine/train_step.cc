#include "engine/train_step.h"

#include <algorithm>
#include <string>
#include <utility>

#include "engine/activation_transfer.h"
#include "engine/layer_calls.h"
#include "engine/recorded_calls.h"

namespace tunemesh {
namespace {

// The trained rows of a batch, already on the device.
struct LossRows {
  size_t count = 0;
};

void clear(const Device& device, const std::vector<MemoryRange>& ranges);
void embedding_backward(const Pass& pass);
LossRows select_trained_rows(const Pass& pass, const TokenBatch& batch);
TmElement* loss_gradient(const Workspace& work);
void loss_chunks(const Pass& pass, LossRows rows, float grad_scale);
LossResult read_losses(const Pass& pass, LossRows rows);
void head_backward(const Pass& pass, size_t first_row, size_t num_rows);
void backward_layers(const Pass& pass, const GradientVector& gradient);
void tell_final(const GradientVector& gradient, size_t part);
BackwardDepth lowest_layer_depth(const DecoderWeights& weights);

}  // namespace

LossResult train_step(const StepModel& model, const TokenBatch& batch,
                      std::pair<GradientVector, double> gradient_and_divisor) {
  const auto& [gradient, divisor] = gradient_and_divisor;
  const Workspace& work = model.work;
  clear(model.device, gradient.added);

  Pass pass = begin_pass(model, batch, 0);
  pass.has_backward = true;
  forward_layers(pass);
  // The host goes on while the device computes: no call waits up to the losses.
  const LossRows rows = select_trained_rows(pass, batch);
  if (rows.count == 0) {
    clear(model.device, gradient.all);
    return {};
  }

  const size_t hidden_bytes = model.config.hidden_size * model.device.element_bytes();
  TM_RUN(model.device, fill_zero, loss_gradient(work), pass.n * hidden_bytes);
  loss_chunks(pass, rows, static_cast<float>(1.0 / divisor));
  if (loss_gradient(work) != work.dx) {
    const size_t dx_bytes = work.strides.dx * model.device.element_bytes();
    const TmCopyRows copy = {work.dx,      loss_gradient(work), dx_bytes,
                             hidden_bytes, hidden_bytes,        pass.n};
    TM_RUN(model.device, copy_rows, &copy);
  }
  tell_final(gradient, 0);
  backward_layers(pass, gradient);
  if (model.weights.embedding_grad != nullptr) embedding_backward(pass);
  const LossResult result = read_losses(pass, rows);
  tell_final(gradient, model.config.num_layers + 1);
  return result;
}

LossResult evaluate_step(const StepModel& model, const TokenBatch& batch) {
  const Pass pass = begin_pass(model, batch, 0);
  forward_layers(pass);
  const LossRows rows = select_trained_rows(pass, batch);
  loss_chunks(pass, rows, 0.0f);
  return read_losses(pass, rows);
}

std::vector<float> logits_step(const StepModel& model, const TokenBatch& batch) {
  const Pass pass = begin_pass(model, batch, 0);
  forward_layers(pass);
  const size_t vocabulary = model.config.vocab_size;
  const size_t hidden = model.config.hidden_size;
  std::vector<float> logits(pass.n * vocabulary);
  for (size_t first = 0; first < pass.n; first += model.work.spec.loss_rows) {
    const size_t count = std::min(model.work.spec.loss_rows, pass.n - first);
    std::vector<int32_t> rows(count);
    for (size_t i = 0; i < count; ++i) rows[i] = static_cast<int32_t>(first + i);
    TM_RUN(model.device, copy_in, model.work.loss_rows, rows.data(), count * sizeof(int32_t));
    TM_RUN(model.device, gather_rows, model.work.residual.back(), model.work.loss_rows, count,
           hidden, model.work.loss_x);
    head_forward(pass, count);
    TM_RUN(model.device, read_elements, logits.data() + first * vocabulary, model.work.logits,
           count * vocabulary);
  }
  return logits;
}

Pass begin_pass(const StepModel& model, const TokenBatch& batch, size_t cache_start) {
  const Workspace& work = model.work;
  std::vector<int32_t> positions(batch.num_tokens);
  for (size_t document = 0; document < batch.num_documents; ++document) {
    const int32_t start = batch.document_starts[document];
    for (int32_t i = start; i < batch.document_starts[document + 1]; ++i) {
      positions[i] = i - start + static_cast<int32_t>(cache_start);
    }
  }
  const size_t token_bytes = batch.num_tokens * sizeof(int32_t);
  TM_RUN(model.device, copy_in, work.tokens, batch.tokens, token_bytes);
  TM_RUN(model.device, copy_in, work.positions, positions.data(), token_bytes);
  // Padded with empty documents (TmAttention).
  std::vector<int32_t> starts(work.spec.tokens + 1, static_cast<int32_t>(batch.num_tokens));
  std::copy_n(batch.document_starts, batch.num_documents, starts.begin());
  TM_RUN(model.device, copy_in, work.document_starts, starts.data(),
         starts.size() * sizeof(int32_t));
  return {model.device,     model.config,        model.weights, work,
          batch.num_tokens, batch.num_documents, cache_start,   batch.document_starts};
}

void forward_layers(const Pass& pass) {
  const bool moves = pass.has_backward && !pass.work.transfers.empty();
  run_recorded(pass.device,
               {pass.work.recording_id, StepPart::kForward, moves ? 1u : 0u, pass.n, &pass},
               [&pass] {
                 TM_RUN(pass.device, embedding_forward, pass.work.tokens, pass.n,
                        &pass.weights.embedding, pass.work.residual[0]);
                 for (size_t layer = 0; layer < pass.config.num_layers; ++layer) {
                   if (pass.has_backward) await_place(pass, layer);
                   layer_forward(pass, layer);
                   if (pass.has_backward) send_layer(pass, layer);
                 }
               });
}

void head_forward(const Pass& pass, size_t num_rows) {
  const Workspace& work = pass.work;
  Pass rows = pass;
  rows.n = num_rows;
  norm_forward(rows, {work.loss_x, pass.weights.final_norm.gain, work.loss_normed, work.loss_rstd,
                      pass.config.hidden_size});
  linear_forward(pass.device,
                 {pass.weights.head, work.loss_normed, work.logits, nullptr, num_rows, 0, 0.0f});
}

void check_batch(const TokenBatch& batch, const BatchLimits& limits) {
  auto refuse = [](const std::string& what) {
    throw EngineError("DATA_INVALID", "batch: " + what);
  };
  if (batch.num_tokens == 0 || batch.num_tokens > limits.spec.tokens) {
    refuse(std::to_string(batch.num_tokens) + " tokens; 1 to " +
           std::to_string(limits.spec.tokens) + " are planned.");
  }
  if (batch.num_documents == 0 || batch.document_starts[0] != 0 ||
      batch.document_starts[batch.num_documents] != static_cast<int64_t>(batch.num_tokens)) {
    refuse("documentStarts must run from 0 to the number of tokens, " +
           std::to_string(batch.num_tokens) + ".");
  }
  for (size_t i = 0; i < batch.num_documents; ++i) {
    const int64_t length = int64_t{batch.document_starts[i + 1]} - batch.document_starts[i];
    if (length < 1 || static_cast<size_t>(length) > limits.spec.longest_document) {
      refuse("document " + std::to_string(i) + " has " + std::to_string(length) + " tokens; 1 to " +
             std::to_string(limits.spec.longest_document) + " are planned.");
    }
  }
  const auto vocabulary = static_cast<int64_t>(limits.config.vocab_size);
  for (size_t i = 0; i < batch.num_tokens; ++i) {
    const int32_t target = batch.targets == nullptr ? kUntrained : batch.targets[i];
    const bool target_fits = target == kUntrained || (target >= 0 && target < vocabulary);
    if (batch.tokens[i] < 0 || batch.tokens[i] >= vocabulary || !target_fits) {
      refuse("token " + std::to_string(batch.tokens[i]) + " or target " + std::to_string(target) +
             " at position " + std::to_string(i) + " is not in the vocabulary of " +
             std::to_string(vocabulary) + ".");
    }
  }
}

namespace {

void clear(const Device& device, const std::vector<MemoryRange>& ranges) {
  for (const MemoryRange& range : ranges) TM_RUN(device, fill_zero, range.at, range.bytes);
}

// Sums of a row of the table are floats either way, rounded once where they are kept as elements.
void embedding_backward(const Pass& pass) {
  const Workspace& work = pass.work;
  const size_t hidden = pass.config.hidden_size;
  if (pass.weights.has_element_grads) {
    TM_RUN(pass.device, scatter_rows_add, work.dx, work.tokens, pass.n, hidden,
           static_cast<TmElement*>(pass.weights.embedding_grad));
    return;
  }
  TM_RUN(pass.device, embedding_backward_add, work.tokens, pass.n, work.dx, hidden,
         pass.config.vocab_size, static_cast<float*>(pass.weights.embedding_grad));
}

LossRows select_trained_rows(const Pass& pass, const TokenBatch& batch) {
  std::vector<int32_t> rows;
  std::vector<int32_t> targets;
  for (size_t i = 0; i < batch.num_tokens; ++i) {
    if (batch.targets == nullptr || batch.targets[i] == kUntrained) continue;
    rows.push_back(static_cast<int32_t>(i));
    targets.push_back(batch.targets[i]);
  }
  const size_t num_bytes = rows.size() * sizeof(int32_t);
  TM_RUN(pass.device, copy_in, pass.work.loss_rows, rows.data(), num_bytes);
  TM_RUN(pass.device, copy_in, pass.work.loss_targets, targets.data(), num_bytes);
  return {rows.size()};
}

// Where the chunks' gradients gather, in rows of hidden_size: dx itself, or where its rows have
// room for a border a matrix that is free until the layers' backward.
TmElement* loss_gradient(const Workspace& work) {
  return work.has_dx_border() ? work.dnormed : work.dx;
}

// Logits exist for one chunk of trained rows at a time. With grad_scale 0 only the loss is taken.
// Never recorded: the host issues these few calls while the device is busy with the layers.
void loss_chunks(const Pass& pass, LossRows rows, float grad_scale) {
  const Workspace& work = pass.work;
  for (size_t first = 0; first < rows.count; first += work.spec.loss_rows) {
    const size_t count = std::min(work.spec.loss_rows, rows.count - first);
    TM_RUN(pass.device, gather_rows, work.residual.back(), work.loss_rows + first, count,
           pass.config.hidden_size, work.loss_x);
    head_forward(pass, count);
    TmCrossEntropy call = {};
    call.logits = work.logits;
    call.stride = pass.config.vocab_size;
    call.targets = work.loss_targets + first;
    call.row_losses = work.row_losses + first;
    call.rows = count;
    call.v = pass.config.vocab_size;
    call.grad_scale = grad_scale;
    call.dlogits = grad_scale != 0.0f ? 1 : 0;
    TM_RUN(pass.device, cross_entropy, &call);
    if (grad_scale != 0.0f) head_backward(pass, first, count);
  }
}

LossResult read_losses(const Pass& pass, LossRows rows) {
  LossResult result;
  result.num_target_tokens = rows.count;
  std::vector<double> row_losses(rows.count);
  TM_RUN(pass.device, copy_out, row_losses.data(), pass.work.row_losses,
         rows.count * sizeof(double));
  for (const double loss : row_losses) result.loss_sum += loss;
  return result;
}

// From work.logits, which now holds the logits' gradient, to work.dx at the chunk's rows.
void head_backward(const Pass& pass, size_t first_row, size_t num_rows) {
  const Workspace& work = pass.work;
  const size_t hidden = pass.config.hidden_size;
  const size_t vocabulary = pass.config.vocab_size;
  const LinearWeights& head = pass.weights.head;
  if (head.weight_grad != nullptr) {
    const TmLinearWeightGrad call = {work.logits,
                                     vocabulary,
                                     work.loss_normed,
                                     hidden,
                                     head.weight_grad,
                                     num_rows,
                                     vocabulary,
                                     hidden,
                                     first_row > 0 || head.adds_grads ? 1 : 0,
                                     1.0f,
                                     head.has_element_grad ? 1 : 0};
    TM_RUN(pass.device, linear_weight_grad, &call);
  }
  // d normed goes to loss_dx, d x of the chunk then over loss_normed, which is read no more.
  TmLinear through_head = {};
  through_head.x = work.loss_dx;
  through_head.x_stride = hidden;
  through_head.w = head.weight;
  through_head.y = work.logits;
  through_head.y_stride = vocabulary;
  through_head.n = num_rows;
  through_head.alpha = 1.0f;
  TM_RUN(pass.device, linear_backward_input, &through_head);
  TmRmsNormBackward norm = {};
  norm.dy = work.loss_dx;
  norm.x = work.loss_x;
  norm.gain = pass.weights.final_norm.gain;
  norm.rstd = work.loss_rstd;
  norm.dx = work.loss_normed;
  norm.dgain = pass.weights.final_norm.gain_grad;
  norm.n = num_rows;
  norm.c = norm.x_stride = norm.dy_stride = norm.dx_stride = hidden;
  TM_RUN(pass.device, rms_norm_backward, &norm);
  TM_RUN(pass.device, scatter_rows_add, work.loss_normed, work.loss_rows + first_row, num_rows,
         hidden, loss_gradient(work));
}

// In one part, or where somebody waits for each layer's gradient in a part for each: copies of
// offloaded layers, which outlast such a part, then lie between them.
void backward_layers(const Pass& pass, const GradientVector& gradient) {
  const size_t num_layers = pass.config.num_layers;
  const auto backward = [&pass](size_t layer) {
    layer_backward(pass, layer,
                   layer > 0 ? BackwardDepth::kInput : lowest_layer_depth(pass.weights));
  };
  const auto run = [&pass](uint64_t layer, const std::function<void()>& calls) {
    run_recorded(pass.device, {pass.work.recording_id, StepPart::kBackward, layer, pass.n, &pass},
                 calls);
  };
  if (!gradient.on_final_part) {
    return run(num_layers, [&] {
      for (size_t layer = num_layers; layer-- > 0;) {
        await_layer(pass, layer);
        backward(layer);
        fetch_layer_below(pass, layer);
      }
    });
  }
  for (size_t layer = num_layers; layer-- > 0;) {
    await_layer(pass, layer);
    run(layer, [&] { backward(layer); });
    fetch_layer_below(pass, layer);
    tell_final(gradient, num_layers - layer);
  }
}

void tell_final(const GradientVector& gradient, size_t part) {
  if (gradient.on_final_part) gradient.on_final_part(part);
}

// Adapters sit on the same modules of every layer, so the lowest trained tensor is in the first
// one.
BackwardDepth lowest_layer_depth(const DecoderWeights& weights) {
  if (weights.embedding_grad != nullptr) return BackwardDepth::kInput;
  const auto& linears = weights.layers[0].linears;
  for (const Linear which : {kQuery, kKey, kValue}) {
    if (linears[which].is_trained()) return BackwardDepth::kAttention;
  }
  return linears[kOutput].is_trained() ? BackwardDepth::kOutput : BackwardDepth::kMlp;
}

}  // namespace
}  // namespace tunemesh
