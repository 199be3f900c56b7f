#include "kernels/cuda/element_transfer.h"

#include <algorithm>
#include <bit>

#include "kernels/parallel_parts.h"

namespace tunemesh::cuda {
namespace {

constexpr size_t kPieceElements = size_t{4} << 20;  // 8 MiB of bfloat16

// To nearest, ties to even; a NaN stays one.
void round_part(const float* from, size_t count, uint16_t* to) {
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(from[i]);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const uint32_t not_a_number = bits >> 16 | 0x40;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
  }
}

void widen_part(const uint16_t* from, size_t count, float* to) {
  for (size_t i = 0; i < count; ++i) to[i] = std::bit_cast<float>(uint32_t{from[i]} << 16);
}

}  // namespace

ElementTransfer::Piece::Piece() : memory(kPieceElements * sizeof(uint16_t)) {}

void ElementTransfer::send(const float* host, size_t count, void* elements, cudaStream_t stream) {
  auto* to = static_cast<uint16_t*>(elements);
  size_t turn = 0;
  for (size_t done = 0; done < count; done += kPieceElements) {
    Piece& piece = pieces_[turn++ % 2];
    const size_t part = std::min(kPieceElements, count - done);
    CUDA_CHECK(cudaEventSynchronize(piece.passed.get()));
    in_parallel_parts(part, 1, [&](size_t first, size_t size) {
      round_part(host + done + first, size, piece.data() + first);
    });
    CUDA_CHECK(cudaMemcpyAsync(to + done, piece.data(), part * sizeof(uint16_t),
                               cudaMemcpyHostToDevice, stream));
    CUDA_CHECK(cudaEventRecord(piece.passed.get(), stream));
  }
}

void ElementTransfer::fetch(float* host, size_t count, const void* elements, cudaStream_t stream) {
  const auto* from = static_cast<const uint16_t*>(elements);
  const auto request = [&](size_t piece_index) {
    const size_t first = piece_index * kPieceElements;
    if (first >= count) return;
    Piece& piece = pieces_[piece_index % 2];
    const size_t bytes = std::min(kPieceElements, count - first) * sizeof(uint16_t);
    CUDA_CHECK(cudaMemcpyAsync(piece.data(), from + first, bytes, cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaEventRecord(piece.passed.get(), stream));
  };
  request(0);
  for (size_t index = 0; index * kPieceElements < count; ++index) {
    request(index + 1);
    Piece& piece = pieces_[index % 2];
    const size_t start = index * kPieceElements;
    CUDA_CHECK(cudaEventSynchronize(piece.passed.get()));
    in_parallel_parts(std::min(kPieceElements, count - start), 1, [&](size_t first, size_t size) {
      widen_part(piece.data() + first, size, host + start + first);
    });
  }
}

}  // namespace tunemesh::cuda
