// Rows of floats as elements: working copies of trained weights, made anew after each update.
//   out[i] = rows[i] rounded to nearest even
//
//   shapes  rows f32 [n], out Element [n], both on the device
//   launch  a chunk of 16 bytes a thread, block 256
//   floor   (4 + s) n bytes, s bytes an element
#pragma once
#include <cuda_runtime_api.h>
#include <stddef.h>

namespace tunemesh::cuda {

template <typename Element>
void pack_rows(const float* rows, size_t n, Element* out, cudaStream_t stream);

}  // namespace tunemesh::cuda
