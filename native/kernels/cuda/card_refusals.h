// Why a driver or a card can't be used, in one line that says what to do. Needs no CUDA.
#pragma once
#include <stddef.h>

#include <string>

namespace tunemesh::cuda {

// The oldest card with what the kernels need (bf16 products, 90 KB of shared memory): Ampere.
inline constexpr int kOldestMajor = 8;

// "13.0" of 13000.
std::string cuda_text(int version);

// "562.9 KiB" and so on.
std::string memory_text(size_t bytes);

// Empty where the driver serves; versions as CUDA gives them, 0: none is loaded.
std::string refused_driver(int driver, int runtime);

// Empty where the card serves.
std::string refused_card(const std::string& name, int major, int minor);

}  // namespace tunemesh::cuda
