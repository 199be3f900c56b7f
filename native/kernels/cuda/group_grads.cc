#include "kernels/cuda/group_grads.h"

#include "kernels/cuda/adapter_grads.cuh"
#include "kernels/cuda/guard.h"

namespace tunemesh::cuda {
namespace {

// visit(part, its first column of dy, its first rank)
template <typename Visit>
void for_each_adapter(const TmGroupShape& shape, Visit visit) {
  size_t column = 0, rank = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) {
    if (shape.is_adapted[part]) {
      visit(part, column, rank);
      rank += shape.rank;
    }
    column += shape.out[part];
  }
}

size_t out_width(const TmGroupShape& shape) {
  size_t out = 0;
  for (size_t part = 0; part < shape.num_parts; ++part) out += shape.out[part];
  return out;
}

// dA is one product for all parts: they share x.
AdapterProducts products_of(const TmGroupAdapterGrads& args) {
  const TmGroupShape& shape = *args.shape;
  const Bfloat16* const x = elements<Bfloat16>(args.x);
  const Bfloat16* const dy = elements<Bfloat16>(args.dy);
  const unsigned rank = static_cast<unsigned>(shape.rank);
  AdapterProducts products = {};
  products.n = args.n;
  products.accumulate = args.accumulate != 0;
  AdapterProduct of_a = {};
  for_each_adapter(shape, [&](size_t part, size_t column, size_t first_rank) {
    AdapterProduct& of_b = products.at[products.count++];
    of_b.wide = dy + column;
    of_b.narrow = elements<Bfloat16>(args.x_tail) + first_rank;
    of_b.wide_stride = args.dy_stride;
    of_b.narrow_stride = args.x_tail_stride;
    of_b.width = static_cast<unsigned>(shape.out[part]);
    of_b.ranks = rank;
    of_b.to[0] = args.lora_b[part];
    of_a.to[of_a.ranks / rank] = args.lora_a[part];
    of_a.ranks += rank;
  });
  of_a.wide = x;
  of_a.narrow = dy + out_width(shape);
  of_a.wide_stride = args.x_stride;
  of_a.narrow_stride = args.dy_stride;
  of_a.width = static_cast<unsigned>(shape.in);
  of_a.part_ranks = rank;
  products.at[products.count++] = of_a;
  return products;
}

template <typename Element>
void by_library(TmContext* context, const TmGroupAdapterGrads& args) {
  const TmGroupShape& shape = *args.shape;
  Gemm& gemm = context->gemm();
  const auto at = [](const TmElement* first, size_t count) {
    return reinterpret_cast<const TmElement*>(elements<Element>(first) + count);
  };
  for_each_adapter(shape, [&](size_t part, size_t column, size_t rank) {
    gemm.weight_grad(
        {at(args.dy, column), args.dy_stride, at(args.x_tail, rank), args.x_tail_stride,
         args.lora_b[part], args.n, shape.out[part], shape.rank, args.accumulate, 1.0f, 0},
        context->stream());
    gemm.weight_grad({at(args.dy, out_width(shape) + rank), args.dy_stride, args.x, args.x_stride,
                      args.lora_a[part], args.n, shape.rank, shape.in, args.accumulate, 1.0f, 0},
                     context->stream());
  });
}

TmStatus group_adapter_grads(TmContext* context, const TmGroupAdapterGrads* args) {
  return guarded(context, [&] {
    size_t adapted = 0;
    for_each_adapter(*args->shape, [&](size_t, size_t, size_t) { ++adapted; });
    if (adapted == 0 || args->shape->rank == 0) return;
    if (context->precision() != TM_BF16) return by_library<float>(context, *args);
    AdapterProducts products = products_of(*args);
    const Scratch scratch = context->scratch();
    products.partials = scratch.data;
    products.num_partials = scratch.num_floats;
    if (!adapter_grads_fit(products)) return by_library<Bfloat16>(context, *args);
    adapter_grads(products, context->stream());
  });
}

}  // namespace

void fill_group_grads(TmBackend& backend) { backend.group_adapter_grads = group_adapter_grads; }

}  // namespace tunemesh::cuda
