#include "kernels/cuda/linear_group.h"

#include <algorithm>

#include "kernels/cuda/fp8.cuh"
#include "kernels/cuda/fp8_group.h"
#include "kernels/cuda/guard.h"
#include "kernels/cuda/place_rows.cuh"

namespace tunemesh::cuda {
namespace {

constexpr size_t kBorderMultiple = 64;
constexpr size_t kStagedElements = size_t{16} << 20;

size_t rounded_up(size_t value) {
  return (value + kBorderMultiple - 1) / kBorderMultiple * kBorderMultiple;
}

size_t out_width(const TmGroupShape& shape) {
  size_t out = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) out += shape.out[part];
  return out;
}

size_t group_border(const TmGroupShape* shape) {
  size_t ranks = 0;
  for (size_t part = 0; part < shape->num_parts; ++part) {
    if (shape->is_adapted[part]) ranks += shape->rank;
  }
  return rounded_up(ranks);
}

// Where things lie in a packed group.
struct PackedPlaces {
  size_t in, out, border, stride;
  explicit PackedPlaces(const TmGroupShape& shape)
      : in(shape.in),
        out(out_width(shape)),
        border(group_border(&shape)),
        stride(rounded_up(in + border)) {}
  size_t row(size_t index) const { return index * stride; }
  size_t adapter_row(size_t rank_index) const { return row(out + rank_index); }
  size_t bias() const { return row(out + border); }
};

size_t group_packed_elements(const TmGroupShape* shape) {
  if (shape->is_fp8) return fp8_group_packed_elements(*shape, group_border(shape));
  return PackedPlaces(*shape).bias() + (shape->has_bias ? rounded_up(out_width(*shape)) : 0);
}

// visit(part, first row of W, first rank)
template <typename Visit>
void for_each_part(const TmGroupShape& shape, Visit visit) {
  size_t row = 0, rank = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    visit(part, row, rank);
    row += shape.out[part];
    if (shape.is_adapted[part]) rank += shape.rank;
  }
}

template <typename Element>
void pack_trained(const TmGroupPack& args, cudaStream_t stream) {
  const TmGroupShape& shape = *args.shape;
  const PackedPlaces places(shape);
  Element* const packed = elements<Element>(args.packed);
  PlaceRows<Element> call;
  for_each_part(shape, [&](size_t part, size_t row, size_t rank) {
    Element* const w = packed + places.row(row);
    const size_t out = shape.out[part];
    call.add({args.weight[part], w, places.stride, out, shape.in});
    if (shape.has_bias) call.add({args.bias[part], packed + places.bias() + row, out, 1, out});
    if (!shape.is_adapted[part]) return;
    call.add({args.lora_a[part], packed + places.adapter_row(rank), places.stride, shape.rank,
              shape.in});
    call.add({args.lora_b[part], w + shape.in + rank, places.stride, out, shape.rank});
  });
  place_rows(call, stream);
}

// Host rows, as elements, to the packed rows, through contiguous rows on the device.
struct HostRows {
  const float* from;  // [rows, columns]
  size_t rows, columns;
  char* to;
  size_t to_stride;  // elements
};

void send_rows(TmContext* context, const HostRows& args) {
  if (args.from == nullptr || args.rows * args.columns == 0) return;
  const size_t element = context->precision() == TM_BF16 ? 2 : 4;
  const size_t most = std::min(args.rows, std::max(size_t{1}, kStagedElements / args.columns));
  const DeviceBuffer staged(most * args.columns * element);
  for (size_t first = 0; first < args.rows; first += most) {
    const size_t rows = std::min(most, args.rows - first), count = rows * args.columns;
    const float* from = args.from + first * args.columns;
    if (element == 2) {
      context->transfer().send(from, count, staged.data(), context->stream());
    } else {
      CUDA_CHECK(cudaMemcpyAsync(staged.data(), from, count * element, cudaMemcpyHostToDevice,
                                 context->stream()));
    }
    TmCopyRows copy = {};
    copy.to = args.to + first * args.to_stride * element;
    copy.from = staged.data();
    copy.to_stride = args.to_stride * element;
    copy.from_stride = copy.row_bytes = args.columns * element;
    copy.n = rows;
    copy_rows(copy, context->stream());
  }
  context->wait();  // before the rows in between are given back
}

TmStatus pack_group_base(TmContext* context, const TmGroupPack* args) {
  return guarded(context, [&] {
    const TmGroupShape& shape = *args->shape;
    if (shape.is_fp8) return pack_fp8_group_base(context, *args, group_border(&shape));
    const PackedPlaces places(shape);
    const size_t element = context->precision() == TM_BF16 ? 2 : 4;
    char* const packed = reinterpret_cast<char*>(args->packed);
    const auto at = [&](size_t index) { return packed + index * element; };
    for_each_part(shape, [&](size_t part, size_t row, size_t rank) {
      const size_t out = shape.out[part], w = places.row(row);
      send_rows(context, {args->weight[part], out, shape.in, at(w), places.stride});
      if (shape.has_bias) {
        send_rows(context, {args->bias[part], 1, out, at(places.bias() + row), out});
      }
      if (!shape.is_adapted[part]) return;
      send_rows(context, {args->lora_a[part], shape.rank, shape.in, at(places.adapter_row(rank)),
                          places.stride});
      send_rows(context,
                {args->lora_b[part], out, shape.rank, at(w + shape.in + rank), places.stride});
    });
  });
}

TmStatus pack_group_trained(TmContext* context, const TmGroupPack* args) {
  const TmGroupShape& shape = *args->shape;
  return with_element(context, [&](auto element) {
    if (shape.is_fp8) return pack_fp8_group_trained(context, *args, group_border(&shape));
    pack_trained<decltype(element)>(*args, context->stream());
  });
}

void check_strides(const char* operation, const char* operand, size_t stride, size_t width) {
  if (stride >= width) return;
  refuse(operation, ": rows of ", operand, " are ", stride, " elements apart; a group needs ",
         width);
}

// A group's products in the element type.
template <typename Element>
struct GroupProducts {
  TmContext* context;
  const TmGroupShape& shape;
  const Element* packed;
  PackedPlaces places;

  GroupProducts(TmContext* of, const TmGroupShape& of_shape, const TmElement* weight)
      : context(of), shape(of_shape), packed(elements<Element>(weight)), places(of_shape) {}

  // c [n, m] = alpha a [n, k] op(w), row-major; w transposed: [m, k], else [k, m].
  Gemm::Product product(const Element* w, bool transposes_w) const {
    Gemm::Product product = {};
    product.a = w;
    product.a_stride = places.stride;
    product.transposes_a = transposes_w;
    product.alpha = 1.0f;
    product.result = context->gemm().element();
    return product;
  }
  void run(const Gemm::Product& product) const {
    context->gemm().multiply(product, context->stream());
  }

  void forward(const TmGroupForward& args) const {
    Element* const x = elements<Element>(args.x);
    Gemm::Product tail = product(packed + places.adapter_row(0), true);
    tail.b = x;
    tail.c = x + places.in;
    tail.b_stride = tail.c_stride = args.x_stride;
    tail.m = places.border;
    tail.n = args.n;
    tail.k = places.in;
    tail.alpha = args.scale;
    run(tail);
    size_t row = 0;
    for (size_t first = 0; first < shape.num_parts;) {
      size_t width = shape.out[first], next = first + 1;
      while (next < shape.num_parts && are_beside(args, first, next, width)) {
        width += shape.out[next++];
      }
      Gemm::Product call = product(packed + places.row(row), true);
      call.b = x;
      call.b_stride = args.x_stride;
      call.c = args.y[first];
      call.c_stride = args.y_stride[first];
      call.m = width;
      call.n = args.n;
      call.k = places.in + places.border;
      call.addend = args.residual;
      call.addend_stride = args.residual_stride;
      if (shape.has_bias) call.bias = packed + places.bias() + row;
      run(call);
      row += width;
      first = next;
    }
  }

  // Does part `next` follow the `width` elements from part `first` on in the same rows?
  static bool are_beside(const TmGroupForward& args, size_t first, size_t next, size_t width) {
    const Element* const y = elements<Element>(args.y[first]);
    return elements<Element>(args.y[next]) == y + width &&
           args.y_stride[next] == args.y_stride[first];
  }

  void backward(const TmGroupBackward& args) const {
    Element* const dy = elements<Element>(args.dy);
    Gemm::Product tail = product(packed + places.in, false);
    tail.b = dy;
    tail.c = dy + places.out;
    tail.b_stride = tail.c_stride = args.dy_stride;
    tail.m = places.border;
    tail.n = args.n;
    tail.k = places.out;
    tail.alpha = args.scale;
    run(tail);
    if (args.dx == nullptr) return;
    Gemm::Product call = product(packed, false);
    call.b = dy;
    call.b_stride = args.dy_stride;
    call.c = args.dx;
    call.c_stride = args.dx_stride;
    call.m = places.in;
    call.n = args.n;
    call.k = places.out + places.border;
    run(call);
  }
};

TmStatus group_forward(TmContext* context, const TmGroupForward* args) {
  return with_element(context, [&](auto element) {
    const TmGroupShape& shape = *args->shape;
    const PackedPlaces places(shape);
    check_strides("group_forward", "x", args->x_stride, places.in + places.border);
    for (size_t part = 0; part < shape.num_parts; ++part) {
      check_strides("group_forward", "y", args->y_stride[part], shape.out[part]);
    }
    if (args->residual != nullptr && shape.num_parts != 1) {
      refuse("group_forward: a residual with ", shape.num_parts, " parts; it goes with one");
    }
    if (shape.is_fp8) return fp8_group_forward(context, *args, places.border);
    GroupProducts<decltype(element)>(context, shape, args->packed).forward(*args);
  });
}

TmStatus group_backward(TmContext* context, const TmGroupBackward* args) {
  return with_element(context, [&](auto element) {
    const TmGroupShape& shape = *args->shape;
    const PackedPlaces places(shape);
    check_strides("group_backward", "dy", args->dy_stride, places.out + places.border);
    if (args->dx != nullptr) check_strides("group_backward", "dx", args->dx_stride, places.in);
    if (shape.is_fp8) return fp8_group_backward(context, *args, places.border);
    GroupProducts<decltype(element)>(context, shape, args->packed).backward(*args);
  });
}

TmStatus group_places(TmContext* context, const TmGroupShape* shape, TmElement* packed,
                      TmGroupPlaces* out) {
  return with_element(context, [&](auto element) {
    using Element = decltype(element);
    *out = {};
    const PackedPlaces places(*shape);
    if (shape->is_fp8) return fp8_group_places(*shape, packed, places.border, *out);
    const auto at = [&](size_t index) {
      return reinterpret_cast<TmElement*>(elements<Element>(packed) + index);
    };
    for_each_part(*shape, [&](size_t part, size_t row, size_t rank) {
      const size_t w = places.row(row);
      out->weight[part] = {at(w), places.stride};
      if (shape->has_bias) out->bias[part] = {at(places.bias() + row), shape->out[part]};
      if (!shape->is_adapted[part]) return;
      out->lora_a[part] = {at(places.adapter_row(rank)), places.stride};
      out->lora_b[part] = {at(w + shape->in + rank), places.stride};
    });
  });
}

TmStatus quantise(TmContext* context, const TmQuantiseRows* args) {
  return with_element(
      context, [&](auto element) { quantise_rows<decltype(element)>(*args, context->stream()); });
}

TmStatus copy_within(TmContext* context, const TmCopyRows* args) {
  return guarded(context, [&] { copy_rows(*args, context->stream()); });
}

}  // namespace

void fill_groups(TmBackend& backend) {
  backend.group_border = group_border;
  backend.group_packed_elements = group_packed_elements;
  backend.pack_group_base = pack_group_base;
  backend.pack_group_trained = pack_group_trained;
  backend.group_forward = group_forward;
  backend.group_backward = group_backward;
  backend.copy_rows = copy_within;
  backend.group_places = group_places;
  backend.quantise_rows = quantise;
}

}  // namespace tunemesh::cuda
