#include "engine/json.h"

#include <cmath>
#include <cstdlib>

#include "engine/error.h"

namespace tunemesh {
namespace {
constexpr int kMaxDepth = 32;
}

class JsonParser {
 public:
  explicit JsonParser(const JsonText& source) : source_(source), text_(source.text) {}

  Json parse() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the end of the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw EngineError(source_.code, source_.where + ": JSON is not valid at byte " +
                                        std::to_string(at_) + ": " + what + ".");
  }

  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t')) {
      ++at_;
    }
  }

  char peek() {
    skip_space();
    if (at_ == text_.size()) fail("unexpected end");
    return text_[at_];
  }

  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("expected '") + wanted + "'");
    ++at_;
  }

  Json make(Json::Kind kind) const {
    Json json;
    json.kind_ = kind;
    json.code_ = source_.code;
    return json;
  }

  Json parse_value(int depth) {
    if (depth > kMaxDepth) fail("nested deeper than " + std::to_string(kMaxDepth));
    switch (peek()) {
      case '{':
        return parse_object(depth);
      case '[':
        return parse_array(depth);
      case '"':
        return parse_text();
      case 't':
      case 'f':
      case 'n':
        return parse_word();
      default:
        return parse_number();
    }
  }

  Json parse_text() {
    Json json = make(Json::Kind::kString);
    json.string_ = parse_string();
    return json;
  }

  Json parse_word() {
    for (const std::string_view word : {"true", "false", "null"}) {
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      Json json = make(word == "null" ? Json::Kind::kNull : Json::Kind::kBool);
      json.bool_ = word == "true";
      return json;
    }
    fail("unknown word");
  }

  Json parse_object(int depth) {
    expect('{');
    Json json = make(Json::Kind::kObject);
    JsonObject& members = json.object_;
    if (peek() == '}') {
      ++at_;
      return json;
    }
    while (true) {
      if (peek() != '"') fail("expected a key");
      std::string key = parse_string();
      expect(':');
      Json value = parse_value(depth + 1);
      if (!members.emplace(key, std::move(value)).second) fail("key \"" + key + "\" stands twice");
      if (peek() == '}') break;
      expect(',');
    }
    ++at_;
    return json;
  }

  Json parse_array(int depth) {
    expect('[');
    Json json = make(Json::Kind::kArray);
    JsonArray& items = json.array_;
    if (peek() == ']') {
      ++at_;
      return json;
    }
    while (true) {
      items.push_back(parse_value(depth + 1));
      if (peek() == ']') break;
      expect(',');
    }
    ++at_;
    return json;
  }

  Json parse_number() {
    const size_t start = at_;
    auto digits = [&] {
      const size_t first = at_;
      while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
      if (at_ == first) fail("expected a digit");
      return at_ - first;
    };
    if (text_[at_] == '-') ++at_;
    const size_t first = at_;
    if (digits() > 1 && text_[first] == '0') fail("a number must not start with 0");
    if (at_ < text_.size() && text_[at_] == '.') {
      ++at_;
      digits();
    }
    if (at_ < text_.size() && (text_[at_] == 'e' || text_[at_] == 'E')) {
      ++at_;
      if (at_ < text_.size() && (text_[at_] == '+' || text_[at_] == '-')) ++at_;
      digits();
    }
    Json json = make(Json::Kind::kNumber);
    json.number_ = std::strtod(std::string(text_.substr(start, at_ - start)).c_str(), nullptr);
    return json;
  }

  uint32_t parse_hex4() {
    if (at_ + 4 > text_.size()) fail("unexpected end in \\u");
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
      const char digit = text_[at_++];
      value <<= 4;
      if (digit >= '0' && digit <= '9') {
        value |= static_cast<uint32_t>(digit - '0');
      } else if (digit >= 'a' && digit <= 'f') {
        value |= static_cast<uint32_t>(digit - 'a' + 10);
      } else if (digit >= 'A' && digit <= 'F') {
        value |= static_cast<uint32_t>(digit - 'A' + 10);
      } else {
        fail("bad digit in \\u");
      }
    }
    return value;
  }

  void append_code_point(std::string& out) {
    uint32_t code = parse_hex4();
    if (code >= 0xD800 && code < 0xDC00) {
      if (text_.substr(at_, 2) != "\\u") fail("half a surrogate pair");
      at_ += 2;
      const uint32_t low = parse_hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
      fail("half a surrogate pair");
    }
    auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xC0 | code >> 6);
      tail(0);
    } else if (code < 0x10000) {
      out += static_cast<char>(0xE0 | code >> 12);
      tail(6);
      tail(0);
    } else {
      out += static_cast<char>(0xF0 | code >> 18);
      tail(12);
      tail(6);
      tail(0);
    }
  }

  std::string parse_string() {
    ++at_;
    std::string out;
    while (true) {
      if (at_ == text_.size()) fail("unexpected end in a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("control character in a string");
      if (c != '\\') {
        out += c;
        continue;
      }
      if (at_ == text_.size()) fail("unexpected end in a string");
      const char escape = text_[at_++];
      constexpr std::string_view kEscapes = "\"\\/bfnrt";
      constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
      if (escape == 'u') {
        append_code_point(out);
      } else if (const size_t which = kEscapes.find(escape); which != std::string_view::npos) {
        out += kMeanings[which];
      } else {
        fail("unknown escape");
      }
    }
  }

  const JsonText& source_;
  std::string_view text_;
  size_t at_ = 0;
};

void Json::expect_kind(Kind wanted, std::string_view what) const {
  if (kind_ != wanted) throw EngineError(code_, std::string(what) + " is of the wrong JSON type.");
}

const JsonObject& Json::object(std::string_view what) const {
  expect_kind(Kind::kObject, what);
  return object_;
}
const JsonArray& Json::array(std::string_view what) const {
  expect_kind(Kind::kArray, what);
  return array_;
}
const std::string& Json::string(std::string_view what) const {
  expect_kind(Kind::kString, what);
  return string_;
}
double Json::number(std::string_view what) const {
  expect_kind(Kind::kNumber, what);
  return number_;
}

uint64_t Json::count(std::string_view what) const {
  const double value = number(what);
  if (value < 0 || value > 0x1p53 || value != std::floor(value)) {
    throw EngineError(code_, std::string(what) + " is " + std::to_string(value) +
                                 ", not a whole number from 0 to 2^53.");
  }
  return static_cast<uint64_t>(value);
}

Json parse_json(const JsonText& source) { return JsonParser(source).parse(); }

std::string json_quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace tunemesh
