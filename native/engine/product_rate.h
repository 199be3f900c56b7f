// How fast this device multiplies matrices of a model's shapes: a short measurement before any
// weight is loaded, for the estimate of a job's time.
#pragma once
#include "engine/device.h"
#include "engine/model_config.h"

namespace tunemesh {

struct ProductRate {
  double flops_per_second = 0;  // 2 a multiply-add
  double measured_seconds = 0;
};

// Forward products of one layer and of the head, on zeros. Extents beyond 2,048 and rows beyond
// 256 are cut to that, so that it takes half a second at most on two cores.
ProductRate measure_products(const Device& device, const ModelConfig& config, size_t num_tokens);

}  // namespace tunemesh
