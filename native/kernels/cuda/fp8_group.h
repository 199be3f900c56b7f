// Linear groups with an fp8 base (kernels/backend.h, TmGroupShape's is_fp8), in contexts of TM_FP8:
// bfloat16 elements, e4m3 weights in both layouts.
//
//   packed   q(W) [out, in], q(W^T) [in, out], scales f32 [out] and [in], A [border, in],
//            B [out, border], bias [out]; each at a multiple of 256 bytes
//   forward  x's rows quantised, unless what made them has; y = q(x) q(W)^T (+ residual); tail =
//   scale x A^T;
//            y += tail B^T + bias
//   backward dy's rows quantised likewise; tail = scale dy B; dx = q(dy) q(W^T)^T; dx += tail A
//
//   launch   the adapters' additions are products with beta 1; where cuBLASLt has no fp8 product
//            that adds a residual, add_to_rows does (fp8.cuh)
//   floor    3 n in bytes to quantise x, n (in + 2 out) for the product, 4 n out for the adapters'
//            addition, 2 n in for the tail; backward the same with dy and dx
//   order    as fp8_gemm.h and gemm.h
#pragma once
#include "kernels/backend.h"
#include "kernels/cuda/context.h"

namespace tunemesh::cuda {

size_t fp8_group_packed_elements(const TmGroupShape& shape, size_t border);
void pack_fp8_group_base(TmContext* context, const TmGroupPack& args, size_t border);
void pack_fp8_group_trained(TmContext* context, const TmGroupPack& args, size_t border);
// Of the adapters alone: the base is frozen.
void fp8_group_places(const TmGroupShape& shape, TmElement* packed, size_t border,
                      TmGroupPlaces& out);
void fp8_group_forward(TmContext* context, const TmGroupForward& args, size_t border);
void fp8_group_backward(TmContext* context, const TmGroupBackward& args, size_t border);

}  // namespace tunemesh::cuda
