#include "kernels/cuda/card_refusals.h"

#include <stdio.h>

namespace tunemesh::cuda {

std::string cuda_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string memory_text(size_t bytes) {
  const char* const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  auto amount = static_cast<double>(bytes);
  size_t unit = 0;
  for (; amount >= 1024 && unit < 4; ++unit) amount /= 1024;
  char text[64];
  snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", amount, units[unit]);
  return text;
}

std::string refused_driver(int driver, int runtime) {
  const std::string need = "install NVIDIA's driver 580 or newer";
  if (driver == 0) return "no NVIDIA driver is loaded; for GPUs, " + need;
  if (driver / 1000 >= runtime / 1000) return "";
  return "the driver is for CUDA " + cuda_text(driver) + ", this program needs " +
         cuda_text(runtime) + ": " + need;
}

std::string refused_card(const std::string& name, int major, int minor) {
  if (major >= kOldestMajor) return "";
  return name + " is sm_" + std::to_string(major) + std::to_string(minor) +
         "; cards from sm_80 on are supported (Ampere: A100, RTX 30 and newer). Use the CPU, by "
         "--device cpu, or another card";
}

}  // namespace tunemesh::cuda
