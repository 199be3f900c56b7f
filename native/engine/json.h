// A small strict JSON reader for file headers: RFC 8259, no duplicate keys,
// bounded depth.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace tunemesh {

class Json;
using JsonArray = std::vector<Json>;
using JsonObject = std::map<std::string, Json>;

class Json {
 public:
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };

  // Each throws EngineError with the reader's code when the value is of another
  // kind.
  const JsonObject& object(std::string_view what) const;
  const JsonArray& array(std::string_view what) const;
  const std::string& string(std::string_view what) const;
  double number(std::string_view what) const;
  // A non-negative whole number up to 2^53.
  uint64_t count(std::string_view what) const;

  bool is_string() const { return kind_ == Kind::kString; }
  bool is_bool(bool wanted) const { return kind_ == Kind::kBool && bool_ == wanted; }
  bool is_object() const { return kind_ == Kind::kObject; }

 private:
  friend class JsonParser;
  void expect_kind(Kind wanted, std::string_view what) const;

  Kind kind_ = Kind::kNull;
  bool bool_ = false;
  double number_ = 0;
  std::string string_;
  JsonArray array_;
  JsonObject object_;
  std::string code_;
};

struct JsonText {
  std::string_view text;
  std::string where;  // for messages: the file
  std::string code;   // error code of the file's kind
};

Json parse_json(const JsonText& source);

// The text as a JSON string, with its quotes.
std::string json_quote(std::string_view text);

}  // namespace tunemesh
