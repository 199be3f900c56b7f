// The whole decoder once more in float64, slow and obvious, on the reference kernels: the oracle of
// the engine's gradients. Forward keeps everything; backward follows the same lines in reverse.
#pragma once
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "engine/canonical_layout.h"
#include "engine/rotary.h"
#include "engine/train_step.h"
#include "kernels/reference/reference.h"

namespace tunemesh::test {

using Values = std::vector<double>;

class ReferenceModel {
 public:
  ReferenceModel(ModelConfig config, LoraSpec lora) : config_(config), lora_(lora) {}

  std::map<std::string, Values> weights, grads;

  // Sum of the trained positions' losses over `divisor`.
  double loss(const TokenBatch& batch, double divisor) {
    forward(batch);
    return head(batch, divisor, false);
  }
  // The same, and the gradient of every weight and adapter.
  double backward(const TokenBatch& batch, double divisor) {
    for (const auto& [name, values] : weights) grads[name].assign(values.size(), 0.0);
    forward(batch);
    const double loss = head(batch, divisor, true);
    for (size_t layer = config_.num_layers; layer-- > 0;) layer_backward(layer);
    reference::embedding_backward_add<double>(
        {batch.tokens, n_, config_.hidden_size, grads[kEmbedding].data(), dx_.data()});
    return loss;
  }

 private:
  static constexpr const char* kEmbedding = "model.embed_tokens.weight";
  struct Kept {
    Values x, normed1, rstd1, q_raw, k_raw, q_rstd, k_rstd, q, k, v, attention, lse;
    Values x_mid, normed2, rstd2, gate, up, hidden;
    std::map<std::string, Values> u;
  };

  static reference::Rows<double> rows(Values& values, size_t stride) {
    return {values.data(), stride};
  }
  std::string head_name() const {
    return config_.tie_word_embeddings ? kEmbedding : "lm_head.weight";
  }

  void forward(const TokenBatch& batch) {
    batch_ = batch;
    n_ = batch.num_tokens;
    positions_.resize(n_);
    for (size_t d = 0; d < batch.num_documents; ++d) {
      for (int32_t i = batch.document_starts[d]; i < batch.document_starts[d + 1]; ++i) {
        positions_[i] = i - batch.document_starts[d];
      }
    }
    const RotaryTable table = rotary_table(config_, n_);
    cos_.assign(table.cos.begin(), table.cos.end());
    sin_.assign(table.sin.begin(), table.sin.end());
    x_.assign(n_ * config_.hidden_size, 0);
    reference::embedding_forward<double>(
        {batch.tokens, n_, config_.hidden_size, weights[kEmbedding].data(), x_.data()});
    kept_.assign(config_.num_layers, {});
    for (size_t layer = 0; layer < config_.num_layers; ++layer) layer_forward(layer);
  }

  void layer_forward(size_t layer) {
    Kept& s = kept_[layer];
    s.x = x_;
    norm(s.x, layer_name(layer, "input_layernorm.weight"), s.normed1, s.rstd1);
    linear(layer, kQuery, s.normed1, s.q_raw);
    linear(layer, kKey, s.normed1, s.k_raw);
    linear(layer, kValue, s.normed1, s.v);
    s.q = s.q_raw;
    s.k = s.k_raw;
    if (config_.qk_norm) {
      norm(s.q_raw, layer_name(layer, "self_attn.q_norm.weight"), s.q, s.q_rstd);
      norm(s.k_raw, layer_name(layer, "self_attn.k_norm.weight"), s.k, s.k_rstd);
    }
    rotate(s.q, config_.num_heads, false);
    rotate(s.k, config_.num_kv_heads, false);
    s.attention.assign(n_ * config_.query_width(), 0);
    s.lse.assign(n_ * config_.num_heads, 0);
    reference::attention_forward<double>(attention(s));
    linear(layer, kOutput, s.attention, s.x_mid);
    add(s.x_mid, s.x);
    norm(s.x_mid, layer_name(layer, "post_attention_layernorm.weight"), s.normed2, s.rstd2);
    linear(layer, kGate, s.normed2, s.gate);
    linear(layer, kUp, s.normed2, s.up);
    s.hidden.assign(s.gate.size(), 0);
    reference::swiglu_forward<double>(swiglu(s));
    linear(layer, kDown, s.hidden, x_);
    add(x_, s.x_mid);
  }

  double head(const TokenBatch& batch, double divisor, bool with_gradient) {
    const size_t hidden = config_.hidden_size;
    const size_t vocabulary = config_.vocab_size;
    Values normed, rstd;
    norm(x_, "model.norm.weight", normed, rstd);
    double sum = 0;
    Values dnormed(n_ * hidden, 0.0);
    const Values& w = weights[head_name()];
    for (size_t i = 0; i < n_; ++i) {
      if (batch.targets[i] == kUntrained) continue;
      Values logits(vocabulary);
      for (size_t t = 0; t < vocabulary; ++t) {
        for (size_t c = 0; c < hidden; ++c) logits[t] += normed[i * hidden + c] * w[t * hidden + c];
      }
      double row_loss = 0;
      reference::cross_entropy<double>({{logits.data(), vocabulary},
                                        batch.targets + i,
                                        &row_loss,
                                        1,
                                        vocabulary,
                                        1.0 / divisor,
                                        with_gradient});
      sum += row_loss;
      if (!with_gradient) continue;
      for (size_t t = 0; t < vocabulary; ++t) {
        for (size_t c = 0; c < hidden; ++c) {
          dnormed[i * hidden + c] += logits[t] * w[t * hidden + c];
          grads[head_name()][t * hidden + c] += logits[t] * normed[i * hidden + c];
        }
      }
    }
    if (with_gradient) {
      dx_.assign(n_ * hidden, 0.0);
      norm_backward({x_, "model.norm.weight", rstd}, dnormed, dx_);
    }
    return sum / divisor;
  }

  void layer_backward(size_t layer) {
    Kept& s = kept_[layer];
    Values dhidden(s.hidden.size()), dgate(s.gate.size()), dup(s.up.size());
    linear_backward(layer, kDown, {s.hidden, dx_}, dhidden);
    const size_t width = config_.intermediate_size;
    reference::swiglu_backward<double>(
        {swiglu(s), rows(dhidden, width), rows(dgate, width), rows(dup, width)});
    Values dnormed(s.normed2.size());
    linear_backward(layer, kGate, {s.normed2, dgate}, dnormed);
    linear_backward(layer, kUp, {s.normed2, dup}, dnormed);
    norm_backward({s.x_mid, layer_name(layer, "post_attention_layernorm.weight"), s.rstd2}, dnormed,
                  dx_);
    Values dattention(s.attention.size()), dq(s.q.size()), dk(s.k.size()), dv(s.v.size());
    linear_backward(layer, kOutput, {s.attention, dx_}, dattention);
    reference::attention_backward<double>(
        {attention(s), rows(dattention, config_.query_width()), rows(dq, config_.query_width()),
         rows(dk, config_.kv_width()), rows(dv, config_.kv_width())});
    rotate(dq, config_.num_heads, true);
    rotate(dk, config_.num_kv_heads, true);
    if (config_.qk_norm) {
      Values dq_raw(dq.size()), dk_raw(dk.size());
      norm_backward({s.q_raw, layer_name(layer, "self_attn.q_norm.weight"), s.q_rstd}, dq, dq_raw);
      norm_backward({s.k_raw, layer_name(layer, "self_attn.k_norm.weight"), s.k_rstd}, dk, dk_raw);
      dq = dq_raw;
      dk = dk_raw;
    }
    Values dnormed1(s.normed1.size());
    linear_backward(layer, kQuery, {s.normed1, dq}, dnormed1);
    linear_backward(layer, kKey, {s.normed1, dk}, dnormed1);
    linear_backward(layer, kValue, {s.normed1, dv}, dnormed1);
    norm_backward({s.x, layer_name(layer, "input_layernorm.weight"), s.rstd1}, dnormed1, dx_);
  }

  reference::Attention<double> attention(Kept& s) {
    const size_t kv = config_.kv_width();
    return {rows(s.q, config_.query_width()),
            rows(s.k, kv),
            rows(s.v, kv),
            rows(s.attention, config_.query_width()),
            s.lse.data(),
            batch_.document_starts,
            batch_.num_documents,
            config_.num_heads,
            config_.num_kv_heads,
            config_.head_size,
            config_.sliding_window,
            1.0 / std::sqrt(static_cast<double>(config_.head_size))};
  }
  reference::SwiGlu<double> swiglu(Kept& s) {
    const size_t width = config_.intermediate_size;
    return {rows(s.gate, width), rows(s.up, width), rows(s.hidden, width), n_, width};
  }
  static void add(Values& y, const Values& x) {
    for (size_t i = 0; i < y.size(); ++i) y[i] += x[i];
  }

  // Rows as wide as the gain: tokens, or heads for q/k norm.
  void norm(Values& x, const std::string& name, Values& y, Values& rstd) {
    const Values& gain = weights[name];
    const size_t width = gain.size();
    y.assign(x.size(), 0);
    rstd.assign(x.size() / width, 0);
    reference::rms_norm_forward<double>({rows(x, width), rows(y, width), gain.data(), rstd.data(),
                                         x.size() / width, width, config_.rms_norm_epsilon});
  }
  struct NormInput {
    Values& x;
    std::string name;
    Values& rstd;
  };
  void norm_backward(NormInput input, Values& dy, Values& dx_sum) {
    const Values& gain = weights[input.name];
    const size_t width = gain.size();
    reference::rms_norm_backward<double>(
        {rows(input.x, width), rows(dy, width), rows(dx_sum, width), gain.data(), input.rstd.data(),
         grads[input.name].data(), input.x.size() / width, width, true});
  }
  void rotate(Values& x, size_t heads, bool inverse) {
    reference::rope<double>({rows(x, heads * config_.head_size), positions_.data(), cos_.data(),
                             sin_.data(), n_, heads, config_.head_size, inverse});
  }

  void linear(size_t layer, Linear which, const Values& x, Values& y) {
    const LinearShape shape = linear_shapes(config_)[which];
    const std::string name = layer_name(layer, shape.path);
    const Values& w = weights.at(name + ".weight");
    const bool has_bias = weights.count(name + ".bias") != 0;
    y.assign(n_ * shape.out, 0);
    for (size_t i = 0; i < n_; ++i) {
      for (size_t o = 0; o < shape.out; ++o) {
        double sum = has_bias ? weights[name + ".bias"][o] : 0.0;
        for (size_t c = 0; c < shape.in; ++c) sum += x[i * shape.in + c] * w[o * shape.in + c];
        y[i * shape.out + o] = sum;
      }
    }
    if (!lora_.targets(shape.module)) return;
    const Values& a = weights.at(adapter_tensor_name(layer, shape, 'A'));
    const Values& b = weights.at(adapter_tensor_name(layer, shape, 'B'));
    Values& u = kept_[layer].u[name];
    u.assign(n_ * lora_.rank, 0);
    for (size_t i = 0; i < n_; ++i) {
      for (size_t k = 0; k < lora_.rank; ++k) {
        for (size_t c = 0; c < shape.in; ++c) {
          u[i * lora_.rank + k] += lora_scale() * x[i * shape.in + c] * a[k * shape.in + c];
        }
        for (size_t o = 0; o < shape.out; ++o) {
          y[i * shape.out + o] += u[i * lora_.rank + k] * b[o * lora_.rank + k];
        }
      }
    }
  }

  struct LinearGradient {
    const Values& x;
    const Values& dy;
  };
  void linear_backward(size_t layer, Linear which, LinearGradient from, Values& dx_sum) {
    const LinearShape shape = linear_shapes(config_)[which];
    const std::string name = layer_name(layer, shape.path);
    const Values& w = weights[name + ".weight"];
    Values& dw = grads[name + ".weight"];
    Values* bias = weights.count(name + ".bias") != 0 ? &grads[name + ".bias"] : nullptr;
    for (size_t i = 0; i < n_; ++i) {
      for (size_t o = 0; o < shape.out; ++o) {
        const double dy = from.dy[i * shape.out + o];
        if (bias != nullptr) (*bias)[o] += dy;
        for (size_t c = 0; c < shape.in; ++c) {
          dw[o * shape.in + c] += dy * from.x[i * shape.in + c];
          dx_sum[i * shape.in + c] += dy * w[o * shape.in + c];
        }
      }
    }
    if (!lora_.targets(shape.module)) return;
    const std::string a_name = adapter_tensor_name(layer, shape, 'A');
    const std::string b_name = adapter_tensor_name(layer, shape, 'B');
    const Values& u = kept_[layer].u[name];
    for (size_t i = 0; i < n_; ++i) {
      for (size_t k = 0; k < lora_.rank; ++k) {
        double du = 0;
        for (size_t o = 0; o < shape.out; ++o) {
          const double dy = from.dy[i * shape.out + o];
          grads[b_name][o * lora_.rank + k] += dy * u[i * lora_.rank + k];
          du += lora_scale() * dy * weights[b_name][o * lora_.rank + k];
        }
        for (size_t c = 0; c < shape.in; ++c) {
          grads[a_name][k * shape.in + c] += du * from.x[i * shape.in + c];
          dx_sum[i * shape.in + c] += du * weights[a_name][k * shape.in + c];
        }
      }
    }
  }
  double lora_scale() const { return lora_.alpha / static_cast<double>(lora_.rank); }

  ModelConfig config_;
  LoraSpec lora_;
  TokenBatch batch_;
  size_t n_ = 0;
  std::vector<int32_t> positions_;
  Values cos_, sin_, x_, dx_;
  std::vector<Kept> kept_;
};

}  // namespace tunemesh::test
