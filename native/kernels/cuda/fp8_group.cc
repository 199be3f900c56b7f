#include "kernels/cuda/fp8_group.h"

#include <algorithm>

#include "kernels/cuda/fp8.cuh"
#include "kernels/cuda/fp8_gemm.h"
#include "kernels/cuda/fp8_layout.h"
#include "kernels/cuda/guard.h"
#include "kernels/cuda/place_rows.cuh"

namespace tunemesh::cuda {
namespace {

// Of the weight's columns on their way to rows, at once.
constexpr size_t kTransposedElements = size_t{16} << 20;

struct Packed {
  Fp8Places places;
  char* bytes;
  Packed(const TmGroupShape& shape, size_t border, const TmElement* packed)
      : places(shape, border), bytes(reinterpret_cast<char*>(const_cast<TmElement*>(packed))) {}

  uint8_t* rows() const { return reinterpret_cast<uint8_t*>(bytes + places.rows); }
  uint8_t* columns() const { return reinterpret_cast<uint8_t*>(bytes + places.columns); }
  float* row_scales() const { return reinterpret_cast<float*>(bytes + places.row_scales); }
  float* column_scales() const { return reinterpret_cast<float*>(bytes + places.column_scales); }
  Bfloat16* lora_a() const { return reinterpret_cast<Bfloat16*>(bytes + places.lora_a); }
  Bfloat16* lora_b() const { return reinterpret_cast<Bfloat16*>(bytes + places.lora_b); }
  Bfloat16* bias() const { return reinterpret_cast<Bfloat16*>(bytes + places.bias); }
};

TmElement* as_elements(Bfloat16* data) { return reinterpret_cast<TmElement*>(data); }

void check_shape(const TmContext* context, const TmGroupShape& shape) {
  if (!context->has_fp8_base()) refuse("an fp8 group in a context that is not of TM_FP8");
  bool is_whole = shape.in % TM_FP8_MULTIPLE == 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    is_whole = is_whole && shape.out[part] % TM_FP8_MULTIPLE == 0;
  }
  if (is_whole) return;
  refuse("an fp8 group of ", shape.in, " inputs and ", Fp8Places(shape, 0).out,
         " outputs: each width must be a multiple of ", TM_FP8_MULTIPLE);
}

// The weight's columns as rows: transposed in parts, then quantised like rows.
void quantise_columns(TmContext* context, const Packed& packed, const Bfloat16* weight) {
  const Fp8Places& places = packed.places;
  const size_t at_once = std::min(places.in, std::max<size_t>(1, kTransposedElements / places.out));
  const DeviceBuffer memory(at_once * places.out * sizeof(Bfloat16));
  auto* const turned = static_cast<Bfloat16*>(memory.data());
  for (size_t first = 0; first < places.in; first += at_once) {
    const size_t count = std::min(at_once, places.in - first);
    transpose<Bfloat16>({weight + first, places.in, places.out, count, turned}, context->stream());
    quantise_rows<Bfloat16>({as_elements(turned), places.out, packed.columns() + first * places.out,
                             packed.column_scales() + first, count, places.out},
                            context->stream());
  }
  context->wait();  // before the memory is given back
}

// Rows as e4m3 numbers, if not there already.
void quantise(TmContext* context, const TmQuantised& to, TmQuantiseRows rows) {
  if (to.q == nullptr) refuse("an fp8 group has no place for e4m3 numbers");
  rows.q = to.q;
  rows.scales = to.scales;
  quantise_rows<Bfloat16>(rows, context->stream());
}

// c [n, m] = alpha b [n, k] op(w), or added to c; w transposed: [m, k], else [k, m].
struct BorderProduct {
  const Bfloat16* w;
  size_t w_stride;
  bool transposes_w;
  const void* b;
  size_t b_stride;
  void* c;
  size_t c_stride;
  size_t m, n, k;
  float alpha;
  bool accumulates;
  const void* bias = nullptr;
};
void multiply(TmContext* context, const BorderProduct& p) {
  Gemm::Product call = {};
  call.a = p.w;
  call.a_stride = p.w_stride;
  call.transposes_a = p.transposes_w;
  call.b = p.b;
  call.b_stride = p.b_stride;
  call.c = p.c;
  call.c_stride = p.c_stride;
  call.m = p.m;
  call.n = p.n;
  call.k = p.k;
  call.alpha = p.alpha;
  call.accumulates = p.accumulates;
  call.result = context->gemm().element();
  call.bias = p.bias;
  context->gemm().multiply(call, context->stream());
}

// Parts whose y lie side by side in the same rows: `width` outputs from `row` on.
struct Run {
  size_t first, next, row, width;
};
Run run_from(const TmGroupForward& args, size_t first, size_t row) {
  const TmGroupShape& shape = *args.shape;
  const auto* const y = elements<Bfloat16>(args.y[first]);
  Run run = {first, first + 1, row, shape.out[first]};
  while (run.next < shape.num_parts && elements<Bfloat16>(args.y[run.next]) == y + run.width &&
         args.y_stride[run.next] == args.y_stride[first]) {
    run.width += shape.out[run.next++];
  }
  return run;
}

void run_forward(TmContext* context, const TmGroupForward& args, const Packed& packed,
                 const Run& run) {
  const Fp8Places& places = packed.places;
  auto* const y = elements<Bfloat16>(args.y[run.first]);
  const size_t y_stride = args.y_stride[run.first];
  Fp8Gemm::Product base = {packed.rows() + run.row * places.in,
                           args.quantised.q,
                           packed.row_scales() + run.row,
                           args.quantised.scales,
                           y,
                           run.width,
                           args.n,
                           places.in,
                           y_stride,
                           args.residual,
                           args.residual_stride};
  bool is_residual_added = true;
  if (!context->fp8_gemm().multiply(base, context->stream())) {
    base.addend = nullptr;
    context->fp8_gemm().multiply(base, context->stream());
    is_residual_added = false;
  }
  const Bfloat16* const bias = args.shape->has_bias ? packed.bias() + run.row : nullptr;
  const bool has_border = places.border > 0;
  if (!is_residual_added || (bias != nullptr && !has_border)) {
    const auto* const residual = is_residual_added ? nullptr : elements<Bfloat16>(args.residual);
    add_to_rows<Bfloat16>({y, y_stride, residual, args.residual_stride, has_border ? nullptr : bias,
                           args.n, run.width},
                          context->stream());
  }
  if (!has_border) return;
  multiply(context, {packed.lora_b() + run.row * places.border, places.border, true,
                     elements<Bfloat16>(args.x) + places.in, args.x_stride, y, y_stride, run.width,
                     args.n, places.border, 1.0f, true, bias});
}

}  // namespace

size_t fp8_group_packed_elements(const TmGroupShape& shape, size_t border) {
  return Fp8Places(shape, border).packed_elements();
}

void pack_fp8_group_base(TmContext* context, const TmGroupPack& args, size_t border) {
  const TmGroupShape& shape = *args.shape;
  check_shape(context, shape);
  const Packed packed(shape, border, args.packed);
  const Fp8Places& places = packed.places;
  const DeviceBuffer memory(places.out * places.in * sizeof(Bfloat16));
  auto* const weight = static_cast<Bfloat16*>(memory.data());
  size_t row = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    const size_t out = shape.out[part];
    if (args.weight[part] == nullptr) {
      refuse("an fp8 group's base with ", part, " of its ", shape.num_parts,
             " parts; its columns' scales need all at once");
    }
    context->transfer().send(args.weight[part], out * places.in, weight + row * places.in,
                             context->stream());
    if (shape.has_bias && args.bias[part] != nullptr) {
      context->transfer().send(args.bias[part], out, packed.bias() + row, context->stream());
    }
    row += out;
  }
  quantise_rows<Bfloat16>(
      {as_elements(weight), places.in, packed.rows(), packed.row_scales(), places.out, places.in},
      context->stream());
  quantise_columns(context, packed, weight);
}

void pack_fp8_group_trained(TmContext* context, const TmGroupPack& args, size_t border) {
  const TmGroupShape& shape = *args.shape;
  check_shape(context, shape);
  const Packed packed(shape, border, args.packed);
  PlaceRows<Bfloat16> call;
  size_t row = 0, rank = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (args.weight[part] != nullptr) refuse("the base of an fp8 group is frozen");
    if (shape.is_adapted[part]) {
      call.add(
          {args.lora_a[part], packed.lora_a() + rank * shape.in, shape.in, shape.rank, shape.in});
      call.add({args.lora_b[part], packed.lora_b() + row * border + rank, border, shape.out[part],
                shape.rank});
      rank += shape.rank;
    }
    row += shape.out[part];
  }
  place_rows(call, context->stream());
}

void fp8_group_places(const TmGroupShape& shape, TmElement* packed, size_t border,
                      TmGroupPlaces& out) {
  const Packed parts(shape, border, packed);
  size_t row = 0, rank = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (shape.is_adapted[part]) {
      out.lora_a[part] = {as_elements(parts.lora_a() + rank * shape.in), shape.in};
      out.lora_b[part] = {as_elements(parts.lora_b() + row * border + rank), border};
      rank += shape.rank;
    }
    row += shape.out[part];
  }
}

void fp8_group_forward(TmContext* context, const TmGroupForward& args, size_t border) {
  const TmGroupShape& shape = *args.shape;
  check_shape(context, shape);
  const Packed packed(shape, border, args.packed);
  if (!args.is_quantised) {
    quantise(context, args.quantised, {args.x, args.x_stride, nullptr, nullptr, args.n, shape.in});
  }
  if (border > 0) {
    auto* const rows = elements<Bfloat16>(args.x);
    multiply(context, {packed.lora_a(), shape.in, true, rows, args.x_stride, rows + shape.in,
                       args.x_stride, border, args.n, shape.in, args.scale, false});
  }
  for (size_t first = 0, row = 0; first < shape.num_parts;) {
    const Run run = run_from(args, first, row);
    run_forward(context, args, packed, run);
    row += run.width;
    first = run.next;
  }
}

void fp8_group_backward(TmContext* context, const TmGroupBackward& args, size_t border) {
  const TmGroupShape& shape = *args.shape;
  check_shape(context, shape);
  const Packed packed(shape, border, args.packed);
  const Fp8Places& places = packed.places;
  auto* const dy = elements<Bfloat16>(args.dy);
  auto* const tail = dy + places.out;
  if (border > 0) {
    multiply(context, {packed.lora_b(), border, false, dy, args.dy_stride, tail, args.dy_stride,
                       border, args.n, places.out, args.scale, false});
  }
  if (args.dx == nullptr) return;
  if (!args.is_quantised) {
    quantise(context, args.quantised,
             {args.dy, args.dy_stride, nullptr, nullptr, args.n, places.out});
  }
  context->fp8_gemm().multiply(
      {packed.columns(), args.quantised.q, packed.column_scales(), args.quantised.scales, args.dx,
       places.in, args.n, places.out, args.dx_stride},
      context->stream());
  if (border == 0) return;
  multiply(context, {packed.lora_a(), places.in, false, tail, args.dy_stride, args.dx,
                     args.dx_stride, places.in, args.n, border, 1.0f, true});
}

}  // namespace tunemesh::cuda
