// What the programs that run on a card are told: the plugin, and less than everything, for runs
// under tools that make a kernel a hundred times slower (scripts/sanitize.mjs).
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

namespace tunemesh::test {

struct TestOptions {
  std::string plugin;
  bool is_small = false;        // --small: every kernel, at a few odd shapes
  bool allows_failures = true;  // --no-failures: leaves out calls that CUDA itself must refuse
  std::string only;             // --only WORD: cases whose name has it, and nothing else
  bool is_rest = false;         // --rest: all but the cases that have a name
  std::string torch_errors;     // --torch FILE: in place of the recorded torch_op_errors.json
  std::string precision;        // --precision fp32|bf16: that alone

  bool wants(const std::string& name) const {
    return !is_rest && name.find(only) != std::string::npos;
  }
  bool wants_precision(const char* name) const { return precision.empty() || precision == name; }
};

inline TestOptions options_of(int argc, char** argv) {
  TestOptions options;
  const auto here = std::filesystem::canonical("/proc/self/exe").parent_path();
  options.plugin = here.parent_path() / "native" / "tunemesh_cuda.so";
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 < argc) return argv[++i];
      std::fprintf(stderr, "%s needs a value\n", word.c_str());
      std::exit(2);
    };
    if (word == "--small") {
      options.is_small = true;
    } else if (word == "--no-failures") {
      options.allows_failures = false;
    } else if (word == "--rest") {
      options.is_rest = true;
    } else if (word == "--only") {
      options.only = value();
    } else if (word == "--torch") {
      options.torch_errors = value();
    } else if (word == "--precision") {
      options.precision = value();
    } else if (word.starts_with("--")) {
      std::fprintf(stderr, "unknown option %s\n", word.c_str());
      std::exit(2);
    } else {
      options.plugin = word;
    }
  }
  return options;
}

}  // namespace tunemesh::test
