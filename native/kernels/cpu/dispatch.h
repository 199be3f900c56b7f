// What the CPU backend's families share: the context, the choice of an instruction path, and the
// table of kernels of each path.
//
// A family `rmsnorm` has rmsnorm_isa.cc, compiled for each path in namespace tunemesh::TM_ISA, with
//     void register_rmsnorm(CpuKernels& kernels)
// that sets the family's pointers. The matrix products' entries are here; those of all other
// families stand in ops_table.h as `struct OpsKernels`, beside the declarations of
//     void register_ops(InstructionPath path, CpuKernels& kernels)   calls each family's register
//     void fill_ops(TmBackend& backend)                              the C entries of backend.h
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <string>

#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#if __has_include("kernels/cpu/ops_table.h")
#include "kernels/cpu/ops_table.h"
#define TM_HAS_OPS_TABLE 1
#endif

namespace tunemesh {

enum class InstructionPath { kGeneric, kAvx2, kAvx512 };

struct GemmTask;
struct GemmTile;

struct CpuKernels {
  // Computes one tile of a product in this path's blocking (gemm.h).
  void (*gemm_tile)(const GemmTask& task, const GemmTile& tile);
  // Transposes rows [k_begin, k_end) of one panel of a weight (gemm.h).
  void (*pack_panel)(const float* rows, size_t num_rows, size_t in, float* panel);
  size_t gemm_row_group;  // rows of one micro-kernel: what a tile's height is a multiple of
#ifdef TM_HAS_OPS_TABLE
  OpsKernels ops;
#endif
};

// The kernels of a path. The CPU must have the path's instructions (cpu_supports).
const CpuKernels& kernels_for(InstructionPath path);
bool cpu_supports(InstructionPath path);
const char* name_of(InstructionPath path);

// Reads "auto" (or null), "generic", "avx2", "avx512". TM_BAD_ARGUMENT where the name is unknown or
// the CPU lacks the path.
TmStatus choose_path(const char* name, InstructionPath* path);

// Stores the line that last_error() gives to the calling thread; returns `status`.
TmStatus fail(TmStatus status, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* last_error();

}  // namespace tunemesh

// One device and its threads. Calls come from one thread at a time.
struct TmContext {
  TmContext(tunemesh::InstructionPath chosen, int threads)
      : pool(threads), path(chosen), kernels(tunemesh::kernels_for(chosen)) {}

  tunemesh::ThreadPool pool;
  tunemesh::InstructionPath path;
  const tunemesh::CpuKernels& kernels;
  std::string description;
  float* gemm_scratch = nullptr;  // kGemmScratchFloats for each thread
};
