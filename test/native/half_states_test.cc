// Full fine-tuning with bf16 weights and moments under stochastic rounding: updates equal the
// reference to the bit, whether products read the half weights where they lie (half_backend.h) or a
// decoded copy; files, digests and resume.
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "engine/tensor_files.h"
#include "half_case.h"
#include "kernels/reference/reference.h"
#include "own_path.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

std::vector<char> file_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::vector<char> state_bytes(const Engine& engine, size_t step) {
  const std::string path = own_path("half_states_test.safetensors");
  engine.write_state(path, step);
  std::vector<char> bytes = file_bytes(path);
  std::remove(path.c_str());
  return bytes;
}

// The states of one engine as the reference keeps them.
struct Mirror {
  struct Tensor {
    std::vector<uint16_t> p, m, v;
    std::vector<float> p32, m32, v32;
    std::vector<uint8_t> m8, v8, m_exponents, v_exponents;
  };
  std::vector<Tensor> tensors;
  bool has_bytes;

  explicit Mirror(const Engine& engine, bool has_byte_moments) : has_bytes(has_byte_moments) {
    for (const TensorValues& weight : engine.weights()) {
      Tensor tensor;
      const size_t n = weight.values.size();
      for (const float value : weight.values) tensor.p.push_back(narrowed(value));
      tensor.p32 = weight.values;
      tensor.m.resize(n);
      tensor.v.resize(n);
      tensor.m32.resize(n);
      tensor.v32.resize(n);
      tensor.m8.resize(n);
      tensor.v8.resize(n);
      tensor.m_exponents.resize((n + 255) / 256);
      tensor.v_exponents.resize((n + 255) / 256);
      tensors.push_back(std::move(tensor));
    }
  }
  void update(const CanonicalLayout& layout, TmAdamW call) {
    std::vector<TmTrainedTensor> entries;
    for (size_t i = 0; i < tensors.size(); ++i) {
      Tensor& tensor = tensors[i];
      TmTrainedTensor entry = {};
      entry.is_half = layout.tensors[i].shape.size() > 1 ? 1 : 0;
      entry.decays = entry.is_half;
      entry.p = entry.is_half ? static_cast<void*>(tensor.p.data()) : tensor.p32.data();
      entry.m = entry.is_half ? static_cast<void*>(tensor.m.data()) : tensor.m32.data();
      entry.v = entry.is_half ? static_cast<void*>(tensor.v.data()) : tensor.v32.data();
      if (has_bytes && entry.is_half) {
        entry.m = tensor.m8.data();
        entry.v = tensor.v8.data();
        entry.m_exponents = tensor.m_exponents.data();
        entry.v_exponents = tensor.v_exponents.data();
      }
      entry.n = entry.columns = entry.p_stride = tensor.p.size();
      entry.first_block = layout.tensors[i].first_block;
      entry.gradient_offset = layout.tensors[i].offset();
      entries.push_back(entry);
    }
    call.host_tensors = entries.data();
    call.num_tensors = entries.size();
    reference::adamw(call);
  }
  std::vector<float> weight(size_t i, bool is_half) const {
    if (!is_half) return tensors[i].p32;
    std::vector<float> values;
    for (const uint16_t bits : tensors[i].p) values.push_back(widened(bits));
    return values;
  }
};

TmAdamW reference_call(const TrainSpec& spec, const AdamWNumbers& numbers, size_t step) {
  TmAdamW call = {};
  call.learning_rate = numbers.learning_rate;
  call.clip_factor = numbers.clip_factor;
  call.bias_correction1 = numbers.bias_correction1;
  call.bias_correction2_sqrt = numbers.bias_correction2_sqrt;
  call.beta1 = spec.beta1;
  call.beta2 = spec.beta2;
  call.epsilon = spec.epsilon;
  call.weight_decay = spec.weight_decay;
  call.seed = spec.seed;
  call.step = static_cast<uint32_t>(step);
  return call;
}

TrainSpec spec_for(const Case& made, bool has_bytes) {
  TrainSpec spec = half_spec(made);
  spec.has_byte_moments = has_bytes;
  return spec;
}

void test_updates(uint64_t seed, bool has_bytes) {
  const Case made = random_case(seed);
  const TrainSpec spec = spec_for(made, has_bytes);
  const std::string what = "seed " + std::to_string(seed) + (has_bytes ? ", bytes" : "");
  const auto decoded = engine_of(made);
  const auto grouped = engine_of(made, {2, "auto", host_group_backend()});
  const auto in_place = half_engine(made, true), single = half_engine(made, false);
  const std::vector<Engine*> others = {grouped.get(), in_place.get(), single.get()};
  std::vector<Engine*> all = others;
  all.push_back(decoded.get());
  for (Engine* engine : all) {
    const MemoryPlan planned = engine->plan(spec);
    CHECK(planned.total_bytes == engine->prepare(spec).total_bytes, what + ": plan");
  }
  Mirror mirror(*decoded, has_bytes);
  for (size_t step = 1; step <= 3; ++step) {
    publish(*decoded, made, step);
    const float* const gradient = decoded->exchange()->published(step);
    const AdamWNumbers numbers = numbers_of(step, 1e-3f);
    TmAdamW call = reference_call(spec, numbers, step);
    call.gradient = gradient;
    mirror.update(decoded->layout(), call);
    for (Engine* other : others) {
      std::memcpy(other->exchange()->published(step), gradient,
                  decoded->layout().num_floats() * sizeof(float));
    }
    for (Engine* engine : all) engine->apply_update(step, numbers);
  }
  const auto weights = decoded->weights();
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool is_half = decoded->layout().tensors[i].shape.size() > 1;
    CHECK(weights[i].values == mirror.weight(i, is_half),
          what + ": " + weights[i].name + " is not the reference's");
  }
  const std::vector<char> state = state_bytes(*decoded, 3);
  const std::string digest = decoded->weights_digest();
  const double loss = decoded->evaluate(made.batch()).loss_sum;
  for (Engine* other : others) {
    const bool is_rounded = other->device().element_bytes() == 2;
    const std::string which = what + (is_rounded ? ", bf16 elements" : ", decoded groups");
    CHECK(state == state_bytes(*other, 3), which + ": other states");
    CHECK(digest == other->weights_digest(), which + ": another digest");
    // The products read the same weights; bf16 activations differ by their rounding.
    CHECK_BELOW(std::fabs(other->evaluate(made.batch()).loss_sum - loss) / loss,
                is_rounded ? 1e-2 : 1e-6, which + ": products read old weights");
  }
}

double squares_of(const std::vector<TensorValues>& tensors) {
  double squares = 0;
  for (const TensorValues& tensor : tensors) {
    for (const float value : tensor.values) squares += double{value} * double{value};
  }
  return squares;
}

// Local mode on elements of bf16: gradients are bf16 too, and updates those of the reference.
void test_local(uint64_t seed, bool has_groups, bool has_bytes) {
  const Case made = random_case(seed);
  const auto divisor = static_cast<double>(made.num_targets());
  const std::string what = "local, seed " + std::to_string(seed) + (has_groups ? ", groups" : "");
  TrainSpec spec = spec_for(made, has_bytes);
  const auto meshed = half_engine(made, has_groups);
  meshed->prepare(spec);
  const auto wanted = meshed->gradients(made.batch(), divisor);
  spec.is_local = true;
  const auto engine = half_engine(made, has_groups);
  const MemoryPlan planned = engine->plan(spec);
  CHECK(planned.total_bytes == engine->prepare(spec).total_bytes, what + ": plan");
  Mirror mirror(*engine, has_bytes);
  for (size_t step = 1; step <= 2; ++step) {  // the second finds an old gradient to clear
    const auto found = engine->gradients(made.batch(), divisor);
    engine->local_micro_batch(made.batch(), divisor);
    const double squares = squares_of(found);
    CHECK_BELOW(std::fabs(engine->local_sum_squares() - squares) / squares, 1e-12, what + ": norm");
    std::vector<float> canonical(engine->layout().num_floats());
    for (size_t i = 0; i < found.size(); ++i) {
      const std::vector<float>& values = found[i].values;
      std::copy(values.begin(), values.end(),
                canonical.begin() + static_cast<long>(engine->layout().tensors[i].offset()));
      double error = 0, norm = 1e-30;
      for (size_t k = 0; step == 1 && k < values.size(); ++k) {
        error += std::pow(double{values[k]} - double{wanted[i].values[k]}, 2);
        norm += std::pow(double{wanted[i].values[k]}, 2);
      }
      // Each rounded once, the head's and the table's once a chunk of the loss.
      CHECK_BELOW(std::sqrt(error / norm), 0x1p-7, what + ": gradient of " + found[i].name);
    }
    const AdamWNumbers numbers = numbers_of(step, 1e-3f);
    TmAdamW call = reference_call(spec, numbers, step);
    call.gradient = canonical.data();
    mirror.update(engine->layout(), call);
    engine->apply_local_update(step, numbers);
    const auto weights = engine->weights();
    for (size_t i = 0; i < weights.size(); ++i) {
      const bool is_half = engine->layout().tensors[i].shape.size() > 1;
      CHECK(weights[i].values == mirror.weight(i, is_half), what + ": " + weights[i].name);
    }
  }
  // A batch that trains nothing leaves no gradient.
  Case untrained = made;
  for (int32_t& target : untrained.targets) target = kUntrained;
  CHECK(squares_of(engine->gradients(untrained.batch(), 1)) == 0, what + ": an old gradient");
}

void test_resume(bool has_bytes) {
  const Case made = random_case(3);
  const TrainSpec spec = spec_for(made, has_bytes);
  const std::string path = own_path("half_states_test.resume.safetensors");
  const auto whole = engine_of(made), resumed = engine_of(made);
  const auto in_place = half_engine(made, true);
  for (Engine* engine : {whole.get(), resumed.get(), in_place.get()}) engine->prepare(spec);
  publish(*whole, made, 1);
  whole->apply_update(1, numbers_of(1, 1e-3f));
  whole->write_state(path, 1);
  CHECK(resumed->read_state(path) == 1, "the state's step");
  in_place->read_state(path);
  CHECK(state_bytes(*in_place, 1) == file_bytes(path), "a state read and written again");
  for (Engine* engine : {whole.get(), resumed.get()}) {
    publish(*engine, made, 2);
    engine->apply_update(2, numbers_of(2, 1e-3f));
  }
  CHECK(state_bytes(*whole, 2) == state_bytes(*resumed, 2), "a resumed run has other bits");

  TrainSpec master = spec;
  master.has_half_states = false;
  const auto floats = engine_of(made);
  floats->prepare(master);
  CHECK_THROWS(floats->read_state(path), "BLOB_CORRUPT", "fp32_master");
  const auto other = engine_of(made);
  other->prepare(spec_for(made, !has_bytes));
  CHECK_THROWS(other->read_state(path), "BLOB_CORRUPT", has_bytes ? "of dtype U8" : "state of U8");
  std::remove(path.c_str());
  if (has_bytes) {
    CHECK(resumed->plan(spec).total_bytes < other->plan(half_spec(made)).total_bytes,
          "memory of moments of bytes");
  }
  // 2 + 2 + 2 bytes of states and the decoded copy, instead of 4 + 4 + 4.
  CHECK(resumed->plan(spec).total_bytes < floats->plan(master).total_bytes, "states' memory");
}

void test_export() {
  const Case made = random_case(6);
  const auto engine = engine_of(made);
  engine->prepare(half_spec(made));
  const std::string folder = own_path("half_states_test.folder");
  std::filesystem::create_directory(folder);
  engine->write_adapter(folder, "base");
  {
    const SafetensorsFile file(folder + "/model.safetensors");
    const auto weights = engine->weights();
    for (const TensorValues& weight : weights) {
      const SafetensorsFile::Tensor& found = file.tensor(weight.name);
      CHECK(found.dtype == (found.shape.size() > 1 ? "BF16" : "F32"), weight.name + ": dtype");
      std::vector<float> values(weight.values.size());
      file.read(weight.name, 0, values.size(), values.data());
      CHECK(values == weight.values, weight.name + " in the written model");
    }
  }
  std::filesystem::remove_all(folder);
  for (const WeightChange& change : engine->weight_change()) {
    // Nothing was trained: what is left is the rounding of the base to bf16.
    CHECK_BELOW(change.mean_abs_change, 1e-3, change.name + ": change");
  }
}

}  // namespace
}  // namespace tunemesh::test

int main() {
  using namespace tunemesh::test;
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    for (const bool has_bytes : {false, true}) {
      test_updates(seed, has_bytes);
      for (const bool has_groups : {false, true}) test_local(seed, has_groups, has_bytes);
    }
  }
  for (const bool has_bytes : {false, true}) test_resume(has_bytes);
  test_export();
  return finish("half_states_test");
}
