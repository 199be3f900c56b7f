// AdamW to the bit: against vectors that were made without native code, and of a whole model's
// tensors against the reference.
#pragma once
#include <stdio.h>

#include <bit>
#include <filesystem>
#include <string>
#include <vector>

#include "adamw_case.h"
#include "kernels/reference/reference.h"

namespace tunemesh {

using NumberRows = std::vector<std::vector<uint32_t>>;

// Every innermost list of numbers of a JSON file, in order; empty where it can't be opened.
inline NumberRows number_rows(const std::string& path) {
  NumberRows rows;
  FILE* file = fopen(path.c_str(), "r");
  if (file == nullptr) return rows;
  std::vector<uint32_t> row;
  uint32_t value = 0;
  bool in_number = false, in_text = false;
  for (int c; (c = fgetc(file)) != EOF;) {
    if (c == '"') in_text = !in_text;
    if (in_text) continue;
    if (c >= '0' && c <= '9') {
      value = (in_number ? value * 10 : 0) + uint32_t(c - '0');
      in_number = true;
      continue;
    }
    if (in_number) row.push_back(value);
    in_number = false;
    if (c == ']' && !row.empty()) rows.push_back(std::move(row));
    if (c == ']' || c == '[') row.clear();
  }
  fclose(file);
  return rows;
}

inline double number(uint32_t high, uint32_t low) {
  return std::bit_cast<double>(uint64_t{high} << 32 | low);
}

inline void read_scalars(const std::vector<uint32_t>& s, TmAdamW& call) {
  const auto number_at = [&](size_t index) { return std::bit_cast<float>(s[index]); };
  call.learning_rate = number_at(0);
  call.clip_factor = number_at(1);
  call.bias_correction1 = number_at(2);
  call.bias_correction2_sqrt = number_at(3);
  call.beta1 = number(s[4], s[5]);
  call.beta2 = number(s[6], s[7]);
  call.epsilon = number_at(8);
  call.weight_decay = number_at(9);
}

// On the device, or by the reference where it is null.
inline void run_adamw(const Device* device, const TmAdamW& call) {
  if (device == nullptr) return reference::adamw(call);
  require(device->backend->adamw(device->context, &call), *device);
}
inline std::string name_of(const Device* device) {
  return device == nullptr ? "reference" : device->name;
}

// One case of rows of p, m, v, gradient and what p, m, v become, as bits of float32.
inline bool check_floats(const Device* device, const std::vector<uint32_t>& scalars,
                         const NumberRows& rows) {
  Floats columns[7];
  for (const auto& row : rows) {
    for (size_t k = 0; k < 7; ++k) columns[k].push_back(std::bit_cast<float>(row[k]));
  }
  Outputs state = {columns[0], columns[1], columns[2]};
  VectorUpdate update(state, columns[3]);
  read_scalars(scalars, update.call);
  run_adamw(device, update.call);
  return same_bits(state, {columns[4], columns[5], columns[6]});
}

// The same of bf16 states, rounded stochastically; scalars go on with the seed's two words, the
// step and the tensor's first block. With `exponents` the moments are bytes: those of m's and of
// v's blocks, and both afterwards.
inline bool check_halves(const Device* device, const std::vector<uint32_t>& scalars,
                         const std::vector<uint32_t>& exponents, const NumberRows& rows) {
  std::vector<uint16_t> columns[7];
  std::vector<uint8_t> codes[7], parts[4];
  for (const auto& row : rows) {
    for (size_t k = 0; k < 7; ++k) columns[k].push_back(static_cast<uint16_t>(row[k]));
    for (size_t k = 0; k < 7; ++k) codes[k].push_back(static_cast<uint8_t>(row[k]));
  }
  for (size_t k = 0; k < exponents.size(); ++k) {
    parts[k * 4 / exponents.size()].push_back(static_cast<uint8_t>(exponents[k]));
  }
  TmTrainedTensor tensors[2] = {};  // the blocks before the tensor belong to an empty one
  tensors[0].columns = 1;
  TmTrainedTensor& tensor = tensors[1];
  tensor.p = columns[0].data();
  tensor.m = columns[1].data();
  tensor.v = columns[2].data();
  if (!exponents.empty()) {
    tensor.m = codes[1].data();
    tensor.v = codes[2].data();
    tensor.m_exponents = parts[0].data();
    tensor.v_exponents = parts[1].data();
  }
  tensor.n = tensor.columns = tensor.p_stride = rows.size();
  tensor.decays = tensor.is_half = tensor.is_half_gradient = 1;
  tensor.first_block = scalars[13];
  TmAdamW call = {};
  call.tensors = call.host_tensors = tensors;
  call.num_tensors = 2;
  call.num_blocks = tensor.first_block + (tensor.n + 255) / 256;
  call.half_gradient = columns[3].data();
  read_scalars(scalars, call);
  call.seed = uint64_t{scalars[10]} << 32 | scalars[11];
  call.step = scalars[12];
  run_adamw(device, call);
  if (columns[0] != columns[4]) return false;
  if (exponents.empty()) return columns[1] == columns[5] && columns[2] == columns[6];
  return codes[1] == codes[5] && codes[2] == codes[6] && parts[0] == parts[2] &&
         parts[1] == parts[3];
}

// The files lie in the checkout or bundle that this program was built in, unless `folder` says
// where.
inline void adamw_vectors(const std::vector<Device>& devices, const std::string& folder,
                          Tally& tally) {
  const std::filesystem::path program = std::filesystem::canonical("/proc/self/exe");
  const std::string where =
      folder.empty() ? (program.parent_path() / "../../test/native").string() : folder;
  const char* const names[] = {"adamw_vectors.json", "adamw_half_vectors.json",
                               "adamw_byte_vectors.json"};
  for (const char* const name : names) {
    const bool is_half = name != names[0], has_bytes = name == names[2];
    const NumberRows all = number_rows(where + "/" + name);
    tally.check(all.size() > 200, std::string(name) + ": fewer than 200 rows in " + where);
    for (size_t i = 0; i < all.size();) {
      const std::vector<uint32_t>& scalars = all[i++];
      const std::vector<uint32_t> exponents = has_bytes ? all[i++] : std::vector<uint32_t>();
      NumberRows rows;
      for (; i < all.size() && all[i].size() == 7; ++i) rows.push_back(all[i]);
      for (size_t device = 0; device <= devices.size(); ++device) {
        const Device* const on = device < devices.size() ? &devices[device] : nullptr;
        tally.check(
            is_half ? check_halves(on, scalars, exponents, rows) : check_floats(on, scalars, rows),
            std::string(name) + " on " + name_of(on));
      }
    }
  }
}

// Three steps in a row of tensors of every kind, against the reference.
inline void compare_updates(const std::vector<Device>& devices, bool rounds_copies, Tally& tally) {
  for (const float weight_decay : {0.0f, 0.01f}) {
    UpdateCase want(update_shapes());
    for (uint32_t step = 1; step <= 3; ++step) reference::adamw(want.call(step, weight_decay));
    if (rounds_copies) want.round_copies();
    for (const Device& device : devices) {
      UpdateCase got(update_shapes());
      for (uint32_t step = 1; step <= 3; ++step) run_adamw(&device, got.call(step, weight_decay));
      if (rounds_copies) got.round_copies();
      const auto found = got.bytes(), wanted = want.bytes();
      for (size_t i = 0; i < wanted.size(); ++i) {
        tally.check(found[i] == wanted[i],
                    "adamw: buffer " + std::to_string(i) + " on " + device.name);
      }
    }
  }
}

// A large matrix of bf16 states against the CPU: magnitudes as in training, and every size that a
// float has, so that a kernel with a way of its own for usual ones takes both.
inline void compare_large_update(const Device& device, const Device& cpu, Tally& tally) {
  for (const int kind : {0, 1, 2, 3}) {
    const bool is_half_gradient = kind % 2 == 0, has_bytes = kind > 1;
    const std::vector<TensorShape> shapes = {
        {2048, 512, 0, kNoCopy, true, is_half_gradient, has_bytes}};
    UpdateCase want(shapes, 5), got(shapes, 5);
    want.spread_magnitudes();
    got.spread_magnitudes();
    for (uint32_t step = 1; step <= 3; ++step) {
      run_adamw(&cpu, want.call(step, 0.01f));
      run_adamw(&device, got.call(step, 0.01f));
    }
    const auto found = got.bytes(), wanted = want.bytes();
    for (size_t i = 0; i < wanted.size(); ++i) {
      tally.check(found[i] == wanted[i],
                  "adamw, a large matrix: buffer " + std::to_string(i) + " on " + device.name);
    }
  }
}

}  // namespace tunemesh
