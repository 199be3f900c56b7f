// The failure of an engine operation. `code` is one of proto/errors.ts; the
// bindings turn it into the TypeScript class of the same code.
#pragma once
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>

namespace tunemesh {

class EngineError : public std::runtime_error {
 public:
  // `subject` names what failed where a program needs it: the tensor of
  // NON_FINITE_GRADIENT.
  EngineError(std::string code, const std::string& message, std::string subject = "")
      : std::runtime_error(message), code_(std::move(code)), subject_(std::move(subject)) {}
  const std::string& code() const { return code_; }
  const std::string& subject() const { return subject_; }

 private:
  std::string code_;
  std::string subject_;
};

}  // namespace tunemesh
