#include "kernels/cuda/guard.h"

namespace tunemesh::cuda {
namespace {

thread_local std::string error_line;

}  // namespace

const char* last_failure() { return error_line.c_str(); }

TmStatus keep_line(TmStatus status, const char* line) {
  try {
    error_line = line;
  } catch (const std::bad_alloc&) {
    error_line.clear();
  }
  return status;
}

}  // namespace tunemesh::cuda
