// The CPU's table with linear groups by plain loops, so that the engine's grouped layers are
// checked where there is no GPU. Its borders and packed rows are odd sizes on purpose. An fp8 base
// is held as the floats that its e4m3 numbers stand for, once by rows and once by columns.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/backend.h"
#include "kernels/e4m3.h"

namespace tunemesh::test {

// What is left of numbers that go through e4m3 with one scale; `step` floats apart.
inline void round_to_e4m3(float* values, size_t count, size_t step = 1) {
  float largest = 0;
  for (size_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(values[i * step]));
  const RowScale scale = row_scale(largest);
  for (size_t i = 0; i < count; ++i) {
    float& value = values[i * step];
    value = e4m3_to_float(e4m3_from_float(value * scale.inverse)) * scale.scale;
  }
}

class HostGroup {
 public:
  explicit HostGroup(const TmGroupShape& shape) : shape_(shape) {
    for (size_t part = 0; part < shape.num_parts; ++part) {
      out_ += shape.out[part];
      ranks_ += shape.is_adapted[part] ? shape.rank : 0;
    }
  }
  size_t out() const { return out_; }
  size_t border() const { return ranks_ == 0 ? 0 : ranks_ + 5; }
  size_t stride() const { return shape_.in + border() + 3; }
  size_t elements() const { return columns_at() + (shape_.is_fp8 ? out_ * shape_.in : 0); }
  size_t bias_at() const { return (out_ + border()) * stride(); }
  // fp8: W once more, [out, in] rounded by columns.
  size_t columns_at() const { return bias_at() + out_; }

  void pack(const TmGroupPack& args) const {
    float* const packed = reinterpret_cast<float*>(args.packed);
    size_t row = 0;
    size_t rank = 0;
    for (size_t part = 0; part < shape_.num_parts; ++part) {
      for (size_t o = 0; o < shape_.out[part]; ++o) {
        float* const to = packed + (row + o) * stride();
        if (args.weight[part]) copy(to, args.weight[part] + o * shape_.in, shape_.in);
        if (args.bias[part]) packed[bias_at() + row + o] = args.bias[part][o];
        if (!args.lora_b[part]) continue;
        copy(to + shape_.in + rank, args.lora_b[part] + o * shape_.rank, shape_.rank);
      }
      for (size_t k = 0; args.lora_a[part] && k < shape_.rank; ++k) {
        copy(packed + (out_ + rank + k) * stride(), args.lora_a[part] + k * shape_.in, shape_.in);
      }
      row += shape_.out[part];
      rank += shape_.is_adapted[part] ? shape_.rank : 0;
    }
    if (shape_.is_fp8 && args.weight[0] != nullptr) round_base(packed);
  }

  TmGroupPlaces places(TmElement* at) const {
    float* const packed = reinterpret_cast<float*>(at);
    const auto place = [&](size_t index) {
      return TmPlace{reinterpret_cast<TmElement*>(packed + index), stride()};
    };
    TmGroupPlaces places = {};
    size_t row = 0;
    size_t rank = 0;
    for (size_t part = 0; part < shape_.num_parts; ++part) {
      places.weight[part] = place(row * stride());
      if (shape_.has_bias) places.bias[part] = place(bias_at() + row);
      if (shape_.is_adapted[part]) {
        places.lora_a[part] = place((out_ + rank) * stride());
        places.lora_b[part] = place(row * stride() + shape_.in + rank);
      }
      row += shape_.out[part];
      rank += shape_.is_adapted[part] ? shape_.rank : 0;
    }
    return places;
  }

  void forward(const TmGroupForward& args) const {
    const float* const packed = reinterpret_cast<const float*>(args.packed);
    const float* const residual = reinterpret_cast<const float*>(args.residual);
    for (size_t i = 0; i < args.n; ++i) {
      float* const x = reinterpret_cast<float*>(args.x) + i * args.x_stride;
      for (size_t k = 0; k < border(); ++k) {
        const auto sum = static_cast<float>(dot(x, packed + (out_ + k) * stride(), shape_.in));
        x[shape_.in + k] = args.scale * sum;
      }
      const Quantised rows = {args.quantised, args.is_quantised != 0, i};
      const std::vector<float> rounded = rounded_row(x, shape_.in, rows);
      const float* const base = shape_.is_fp8 ? rounded.data() : x;
      size_t row = 0;
      for (size_t part = 0; part < shape_.num_parts; ++part) {
        float* const y = reinterpret_cast<float*>(args.y[part]) + i * args.y_stride[part];
        for (size_t o = 0; o < shape_.out[part]; ++o, ++row) {
          const float* const w = packed + row * stride();
          y[o] = static_cast<float>(dot(base, w, shape_.in) +
                                    dot(x + shape_.in, w + shape_.in, border()));
          if (shape_.has_bias) y[o] += packed[bias_at() + row];
          if (residual) y[o] += residual[i * args.residual_stride + o];
        }
      }
    }
  }

  void backward(const TmGroupBackward& args) const {
    const float* const packed = reinterpret_cast<const float*>(args.packed);
    for (size_t i = 0; i < args.n; ++i) {
      float* const dy = reinterpret_cast<float*>(args.dy) + i * args.dy_stride;
      for (size_t k = 0; k < border(); ++k) {
        const double sum = column_dot(dy, {packed + shape_.in + k, stride()}, out_);
        dy[out_ + k] = args.scale * static_cast<float>(sum);
      }
      if (args.dx == nullptr) continue;
      float* const dx = reinterpret_cast<float*>(args.dx) + i * args.dx_stride;
      const Quantised rows = {args.quantised, args.is_quantised != 0, i};
      const std::vector<float> rounded = rounded_row(dy, out_, rows);
      const float* const base = shape_.is_fp8 ? rounded.data() : dy;
      const float* const w = shape_.is_fp8 ? packed + columns_at() : packed;
      const size_t w_stride = shape_.is_fp8 ? shape_.in : stride();
      for (size_t j = 0; j < shape_.in; ++j) {
        dx[j] = static_cast<float>(
            column_dot(base, {w + j, w_stride}, out_) +
            column_dot(dy + out_, {packed + out_ * stride() + j, stride()}, border()));
      }
    }
  }

  // Sums in double, tokens ascending.
  void adapter_grads(const TmGroupAdapterGrads& args) const {
    const auto floats = [](const TmElement* rows) { return reinterpret_cast<const float*>(rows); };
    const auto sum = [&](const float* a, size_t a_stride, const float* b, size_t b_stride) {
      double total = 0;
      for (size_t i = 0; i < args.n; ++i) total += double{a[i * a_stride]} * b[i * b_stride];
      return static_cast<float>(total);
    };
    const auto store = [&](float& to, float total) {
      to = args.accumulate != 0 ? to + total : total;
    };
    const float* dy = floats(args.dy);
    const float* x_tail = floats(args.x_tail);
    const float* dy_tail = dy + out_;
    for (size_t part = 0; part < shape_.num_parts; dy += shape_.out[part++]) {
      if (!shape_.is_adapted[part]) continue;
      for (size_t k = 0; k < shape_.rank; ++k, ++x_tail, ++dy_tail) {
        for (size_t o = 0; o < shape_.out[part]; ++o) {
          store(args.lora_b[part][o * shape_.rank + k],
                sum(dy + o, args.dy_stride, x_tail, args.x_tail_stride));
        }
        for (size_t j = 0; j < shape_.in; ++j) {
          store(args.lora_a[part][k * shape_.in + j],
                sum(dy_tail, args.dy_stride, floats(args.x) + j, args.x_stride));
        }
      }
    }
  }

 private:
  static void copy(float* to, const float* from, size_t count) {
    std::memcpy(to, from, count * sizeof(float));
  }
  static double dot(const float* a, const float* b, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i) sum += double{a[i]} * double{b[i]};
    return sum;
  }
  struct Column {
    const float* first;
    size_t stride;
  };
  static double column_dot(const float* a, Column column, size_t count) {
    double sum = 0;
    for (size_t i = 0; i < count; ++i)
      sum += double{a[i]} * double{column.first[i * column.stride]};
    return sum;
  }
  void round_base(float* packed) const {
    float* const columns = packed + columns_at();
    for (size_t o = 0; o < out_; ++o) {
      copy(columns + o * shape_.in, packed + o * stride(), shape_.in);
      round_to_e4m3(packed + o * stride(), shape_.in);
    }
    for (size_t j = 0; j < shape_.in; ++j) round_to_e4m3(columns + j, out_, shape_.in);
  }
  struct Quantised {
    TmQuantised to;
    bool is_there;
    size_t row;
  };
  // What a row's e4m3 numbers stand for; nothing where the group is not fp8.
  std::vector<float> rounded_row(const float* row, size_t count, const Quantised& rows) const {
    std::vector<float> rounded(shape_.is_fp8 ? count : 0);
    if (rounded.empty()) return rounded;
    uint8_t* const q = rows.to.q + rows.row * count;
    float& scale = rows.to.scales[rows.row];
    if (!rows.is_there) {
      float largest = 0;
      for (size_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(row[i]));
      const RowScale of_row = row_scale(largest);
      scale = of_row.scale;
      for (size_t i = 0; i < count; ++i) q[i] = e4m3_from_float(row[i] * of_row.inverse);
    }
    for (size_t i = 0; i < count; ++i) rounded[i] = e4m3_to_float(q[i]) * scale;
    return rounded;
  }

  const TmGroupShape& shape_;
  size_t out_ = 0, ranks_ = 0;
};

inline void add_group_entries(TmBackend& host) {
  host.group_border = [](const TmGroupShape* shape) { return HostGroup(*shape).border(); };
  host.group_packed_elements = [](const TmGroupShape* shape) {
    return HostGroup(*shape).elements();
  };
  host.pack_group_trained = host.pack_group_base = [](TmContext*, const TmGroupPack* args) {
    HostGroup(*args->shape).pack(*args);
    return TM_OK;
  };
  host.group_forward = [](TmContext*, const TmGroupForward* args) {
    HostGroup(*args->shape).forward(*args);
    return TM_OK;
  };
  host.group_adapter_grads = [](TmContext*, const TmGroupAdapterGrads* args) {
    HostGroup(*args->shape).adapter_grads(*args);
    return TM_OK;
  };
  host.group_backward = [](TmContext*, const TmGroupBackward* args) {
    HostGroup(*args->shape).backward(*args);
    return TM_OK;
  };
  host.group_places = [](TmContext*, const TmGroupShape* shape, TmElement* packed,
                         TmGroupPlaces* out) {
    *out = HostGroup(*shape).places(packed);
    return TM_OK;
  };
  host.copy_rows = [](TmContext*, const TmCopyRows* args) {
    for (size_t i = 0; i < args->n; ++i) {
      std::memcpy(static_cast<char*>(args->to) + i * args->to_stride,
                  static_cast<const char*>(args->from) + i * args->from_stride, args->row_bytes);
    }
    return TM_OK;
  };
}

// Heads inside wider rows: token by token, which adds a gain's gradient in the same order.
inline TmElement* floats_on(const TmElement* first, size_t count) {
  return const_cast<TmElement*>(
      reinterpret_cast<const TmElement*>(reinterpret_cast<const float*>(first) + count));
}

inline void add_head_norms(TmBackend& host) {
  host.rms_norm_forward = [](TmContext* context, const TmRmsNorm* args) {
    const TmBackend* cpu = tm_cpu_backend();
    if (args->heads == 0) return cpu->rms_norm_forward(context, args);
    for (size_t token = 0; token < args->n / args->heads; ++token) {
      TmRmsNorm call = *args;
      call.n = args->heads;
      call.heads = 0;
      call.x = floats_on(args->x, token * args->x_stride);
      call.y = floats_on(args->y, token * args->y_stride);
      call.rstd = args->rstd + token * args->heads;
      call.x_stride = call.y_stride = args->c;
      const TmStatus status = cpu->rms_norm_forward(context, &call);
      if (status != TM_OK) return status;
    }
    return TM_OK;
  };
  host.rms_norm_backward = [](TmContext* context, const TmRmsNormBackward* args) {
    const TmBackend* cpu = tm_cpu_backend();
    if (args->heads == 0) return cpu->rms_norm_backward(context, args);
    for (size_t token = 0; token < args->n / args->heads; ++token) {
      TmRmsNormBackward call = *args;
      call.n = args->heads;
      call.heads = 0;
      call.x = floats_on(args->x, token * args->x_stride);
      call.dy = floats_on(args->dy, token * args->dy_stride);
      call.dx = floats_on(args->dx, token * args->dx_stride);
      call.rstd = args->rstd + token * args->heads;
      call.x_stride = call.dy_stride = call.dx_stride = args->c;
      const TmStatus status = cpu->rms_norm_backward(context, &call);
      if (status != TM_OK) return status;
    }
    return TM_OK;
  };
}

// Trained weights are packed too, so that full fine-tuning runs in groups.
inline const TmBackend* host_group_backend() {
  static const TmBackend backend = [] {
    TmBackend host = *tm_cpu_backend();
    add_group_entries(host);
    add_head_norms(host);
    host.create = [](const TmContextOptions* options, TmContext** out) {
      TmContextOptions of_cpu = *options;
      if (of_cpu.precision == TM_FP8) of_cpu.precision = TM_FP32;
      return tm_cpu_backend()->create(&of_cpu, out);
    };
    host.reads_rows = [](TmContext*) { return 0; };
    host.pack_trained_weight = host.pack_weight;
    return host;
  }();
  return &backend;
}

}  // namespace tunemesh::test
