// A small strict JSON reader for file headers: RFC 8259, no duplicate keys,
// bounded depth.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace tunemesh {

class Json;
using JsonArray = std::vector<Json>;
using JsonObject = std::map<std::string, Json>;

class Json {
 public:
  using Value = std::variant<std::nullptr_t, bool, double, std::string, JsonArray, JsonObject>;

  Json() = default;
  explicit Json(Value value) : value_(std::move(value)) {}

  // Each throws EngineError with the reader's code when the value is of another
  // kind.
  const JsonObject &object(std::string_view what) const;
  const JsonArray &array(std::string_view what) const;
  const std::string &string(std::string_view what) const;
  double number(std::string_view what) const;
  // A non-negative whole number up to 2^53.
  uint64_t count(std::string_view what) const;

  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_bool(bool wanted) const {
    const bool *held = std::get_if<bool>(&value_);
    return held != nullptr && *held == wanted;
  }
  bool is_object() const { return std::holds_alternative<JsonObject>(value_); }
  const std::string &code() const { return code_; }

 private:
  friend class JsonParser;
  Value value_ = nullptr;
  std::string code_ = "SAFETENSORS_INVALID";
};

struct JsonText {
  std::string_view text;
  std::string where;  // for messages: the file
  std::string code;   // error code of the file's kind
};

Json parse_json(const JsonText &source);

// The text as a JSON string, with its quotes.
std::string json_quote(std::string_view text);

}  // namespace tunemesh
