// A backend's table whose norms, SwiGLU and rotation quantise nothing: each product of an fp8 group
// then quantises its rows in a pass of its own. The same bits, for comparison.
#pragma once
#include "kernels/backend.h"

namespace tunemesh::bench {

inline const TmBackend* fused_backend = nullptr;  // one a process

template <auto Member>
struct SeparateOp;
template <class Args, TmStatus (*TmBackend::*Member)(TmContext*, const Args*)>
struct SeparateOp<Member> {
  static TmStatus call(TmContext* context, const Args* args) {
    Args copy = *args;
    if constexpr (requires { copy.is_quantised; }) {
      copy.is_quantised = 0;
    } else {
      copy.quantised = {};
    }
    return (fused_backend->*Member)(context, &copy);
  }
};

// Lives as long as the process.
inline const TmBackend* separately_quantising(const TmBackend* inner) {
  static TmBackend table;
  fused_backend = inner;
  table = *inner;
  table.rms_norm_forward = SeparateOp<&TmBackend::rms_norm_forward>::call;
  table.rms_norm_backward = SeparateOp<&TmBackend::rms_norm_backward>::call;
  table.rope = SeparateOp<&TmBackend::rope>::call;
  table.swiglu_forward = SeparateOp<&TmBackend::swiglu_forward>::call;
  table.swiglu_backward = SeparateOp<&TmBackend::swiglu_backward>::call;
  table.group_forward = SeparateOp<&TmBackend::group_forward>::call;
  table.group_backward = SeparateOp<&TmBackend::group_backward>::call;
  return &table;
}

}  // namespace tunemesh::bench
