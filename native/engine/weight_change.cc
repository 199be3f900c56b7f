#include "engine/weight_change.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "engine/safetensors.h"
#include "engine/stream_out.h"
#include "engine/trained_states.h"

namespace tunemesh {
namespace {

// row = scale * (B's row o times A), over the rank in order.
struct ProductRow {
  const float* b;
  const float* a;
  size_t rank;
  float scale;
};
void product_row(const ProductRow& product, std::vector<float>& row) {
  std::fill(row.begin(), row.end(), 0.0f);
  for (size_t k = 0; k < product.rank; ++k) {
    const float weight = product.scale * product.b[k];
    const float* a = product.a + k * row.size();
    for (size_t i = 0; i < row.size(); ++i) row[i] += weight * a[i];
  }
}

double sum_abs(const float* values, size_t count) {
  double lanes[8] = {};
  for (size_t i = 0; i < count; ++i) lanes[i % 8] += std::fabs(static_cast<double>(values[i]));
  double sum = 0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

}  // namespace

std::vector<WeightChange> full_weight_change(const Device& device, const WeightSource& source,
                                             const TrainedVector& trained) {
  std::vector<WeightChange> changes;
  std::vector<float> part;
  for (size_t index = 0; index < trained.layout->tensors.size(); ++index) {
    const TrainedTensor& tensor = trained.layout->tensors[index];
    // Quantised files are read in whole rows.
    const size_t row = tensor.shape.back();
    const size_t step = std::max(row, kStreamFloats / row * row);
    double sum = 0;
    for (size_t first = 0; first < tensor.num_elements; first += step) {
      const size_t count = std::min(step, tensor.num_elements - first);
      part.resize(count);
      source.read(tensor.name, first, count, part.data());
      const std::vector<float> now =
          state_values(device, {trained, index, StateKind::kWeight}, {first, count});
      for (size_t i = 0; i < count; ++i) part[i] = now[i] - part[i];
      sum += sum_abs(part.data(), count);
    }
    changes.push_back({tensor.name, sum / static_cast<double>(tensor.num_elements)});
  }
  return changes;
}

std::vector<WeightChange> adapter_weight_change(const Device& device, const AdapterChange& change) {
  std::vector<WeightChange> changes;
  std::optional<SafetensorsFile> start;
  if (!change.start_folder.empty()) {
    start.emplace(change.start_folder + "/adapter_model.safetensors", "ADAPTER_INVALID");
  }
  const size_t rank = change.lora.rank;
  const float scale = change.lora.scale();
  for (size_t layer = 0; layer < change.config.num_layers; ++layer) {
    for (const LinearShape& linear : linear_shapes(change.config)) {
      if (!change.lora.targets(linear.module)) continue;
      const std::string a_name = adapter_tensor_name(layer, linear, 'A');
      const std::string b_name = adapter_tensor_name(layer, linear, 'B');
      const CanonicalLayout& layout = *change.trained.layout;
      const auto now = [&](const std::string& name) {
        const auto index = static_cast<size_t>(layout.find(name) - layout.tensors.data());
        return state_values(device, {change.trained, index, StateKind::kWeight});
      };
      const std::vector<float> a = now(a_name);
      const std::vector<float> b = now(b_name);
      std::vector<float> a0(start ? rank * linear.in : 0);
      std::vector<float> b0(start ? linear.out * rank : 0);
      if (start) {
        start->read(a_name, 0, a0.size(), a0.data());
        start->read(b_name, 0, b0.size(), b0.data());
      }
      double sum = 0;
      std::vector<float> row(linear.in);
      std::vector<float> row0(linear.in);
      for (size_t o = 0; o < linear.out; ++o) {
        product_row({b.data() + o * rank, a.data(), rank, scale}, row);
        if (start) {
          product_row({b0.data() + o * rank, a0.data(), rank, scale}, row0);
          for (size_t i = 0; i < row.size(); ++i) row[i] -= row0[i];
        }
        sum += sum_abs(row.data(), row.size());
      }
      changes.push_back({layer_name(layer, linear.path),
                         sum / (static_cast<double>(linear.out) * static_cast<double>(linear.in))});
    }
  }
  return changes;
}

}  // namespace tunemesh
