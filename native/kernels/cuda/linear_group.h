// Linear groups (kernels/backend.h): linears that read the same input as one product whose packed
// weight holds their adapters in its border; Element float or bfloat16 (s bytes).
//
//   packed   W B     rows [out + border] of group_stride() elements, then a bias of [out] elements.
//            A 0     border and stride are multiples of 64 elements: whole tiles of the products
//   forward  tail = scale x A^T, then y = [x | tail] [W B]^T + bias + residual: a product of
//            n in border, then one of n (in + border) out. Bias and residual are the product's own
//            additions; parts whose y lie apart are products of their own
//   backward tail = scale dy B, then dx = [dy | tail] [W; A]
//
//   needs    cuBLASLt's alignments; fastest where rows are multiples of 16 bytes
//   floor    forward s n (in + out) bytes beside the product (and s n out with a residual), s n in
//            again for the tail; backward the same with dy and dx
//   order    as gemm.h
//   source   LoRA: Hu et al. 2021
#pragma once
#include "kernels/backend.h"

namespace tunemesh::cuda {

// The table's entries; groups with an fp8 base go on to fp8_group.h.
void fill_groups(TmBackend& backend);

}  // namespace tunemesh::cuda
