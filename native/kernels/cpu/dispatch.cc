#include "kernels/cpu/dispatch.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace tunemesh {

namespace isa_generic {
void register_gemm(CpuKernels& kernels);
}
namespace isa_avx2 {
void register_gemm(CpuKernels& kernels);
}
namespace isa_avx512 {
void register_gemm(CpuKernels& kernels);
}

namespace {

CpuKernels table_of(InstructionPath path) {
  CpuKernels kernels{};
  switch (path) {
    case InstructionPath::kGeneric:
      isa_generic::register_gemm(kernels);
      break;
    case InstructionPath::kAvx2:
      isa_avx2::register_gemm(kernels);
      break;
    case InstructionPath::kAvx512:
      isa_avx512::register_gemm(kernels);
      break;
  }
#ifdef TM_HAS_OPS_TABLE
  register_ops(path, kernels);
#endif
  return kernels;
}

thread_local char error_line[512] = "";

}  // namespace

const CpuKernels& kernels_for(InstructionPath path) {
  static const CpuKernels tables[] = {table_of(InstructionPath::kGeneric),
                                      table_of(InstructionPath::kAvx2),
                                      table_of(InstructionPath::kAvx512)};
  return tables[static_cast<int>(path)];
}

bool cpu_supports(InstructionPath path) {
#if defined(__x86_64__)
  switch (path) {
    case InstructionPath::kGeneric:
      return true;
    case InstructionPath::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi2");
    case InstructionPath::kAvx512:
      return cpu_supports(InstructionPath::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
  }
#endif
  return path == InstructionPath::kGeneric;
}

const char* name_of(InstructionPath path) {
  static const char* const names[] = {"generic", "avx2", "avx512"};
  return names[static_cast<int>(path)];
}

TmStatus choose_path(const char* name, InstructionPath* path) {
  constexpr InstructionPath kFastestFirst[] = {InstructionPath::kAvx512, InstructionPath::kAvx2,
                                               InstructionPath::kGeneric};
  const bool is_auto = !name || strcmp(name, "auto") == 0;
  for (InstructionPath candidate : kFastestFirst) {
    if (!is_auto && strcmp(name, name_of(candidate)) != 0) continue;
    if (cpu_supports(candidate)) {
      *path = candidate;
      return TM_OK;
    }
    if (!is_auto) {
      return fail(TM_BAD_ARGUMENT,
                  "instruction path \"%s\" was asked for, but this CPU lacks it; use \"auto\"",
                  name);
    }
  }
  return fail(TM_BAD_ARGUMENT,
              "instruction path \"%s\" is unknown; use auto, generic, avx2 or avx512", name);
}

TmStatus fail(TmStatus status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error_line, sizeof error_line, format, args);
  va_end(args);
  return status;
}

const char* last_error() { return error_line; }

}  // namespace tunemesh
