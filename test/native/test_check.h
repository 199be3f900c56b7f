// Checks of the engine's C++ tests: a failure is printed and counted, the program goes on.
#pragma once
#include <cstdio>
#include <string>

#include "engine/error.h"

namespace tunemesh::test {

inline int num_checks = 0;
inline int num_failures = 0;

inline void record(bool passed, const std::string& what) {
  ++num_checks;
  if (passed) return;
  ++num_failures;
  std::printf("FAILED %s\n", what.c_str());
}

#define CHECK(condition, what) ::tunemesh::test::record((condition), (what))
#define CHECK_BELOW(value, limit, what)                                                            \
  do {                                                                                             \
    const double value_found = (value);                                                            \
    record(value_found <= (limit),                                                                 \
           std::string(what) + ": " + std::to_string(value_found / (limit)) + " times the limit"); \
  } while (false)
// The message must hold `part`: the file, tensor or value that a user needs.
#define CHECK_THROWS(expression, wanted_code, part)                                     \
  do {                                                                                  \
    std::string code = "nothing", message;                                              \
    try {                                                                               \
      (void)(expression);                                                               \
    } catch (const ::tunemesh::EngineError& error) {                                    \
      code = error.code();                                                              \
      message = error.what();                                                           \
    }                                                                                   \
    record(code == (wanted_code) && message.find(part) != std::string::npos,            \
           std::string(#expression) + " threw " + code + " \"" + message + "\", not " + \
               (wanted_code) + " with \"" + (part) + "\"");                             \
  } while (false)

inline int finish(const char* program) {
  std::printf("%s: %d passed, %d failed\n", program, num_checks - num_failures, num_failures);
  return num_failures == 0 ? 0 : 1;
}

}  // namespace tunemesh::test
