#include "resp.hpp"

#include <charconv>
#include <optional>

namespace fastkv {
namespace {

void append_header(std::string& out, char type, std::size_t number) {
  char digits[24];
  const auto end = std::to_chars(digits, digits + sizeof digits, number).ptr;
  out.push_back(type);
  out.append(digits, end);
  out.append("\r\n");
}

// As strict as hiredis: an optional minus, no plus, no leading zero, no blank, no overflow.
std::optional<std::int64_t> parse_integer(std::string_view digits) noexcept {
  const std::string_view magnitude = digits.substr(digits.starts_with('-') ? 1 : 0);
  if (magnitude.empty() || (magnitude[0] == '0' && digits.size() > 1)) return std::nullopt;
  std::int64_t number = 0;
  const char* const end = digits.data() + digits.size();
  const auto result = std::from_chars(digits.data(), end, number);
  if (result.ec != std::errc() || result.ptr != end) return std::nullopt;
  return number;
}

ReplyParser::Step malformed(const char* why) noexcept {
  return {.found = ReplyParser::Found::malformed, .why = why};
}

}  // namespace

void append_array_header(std::string& out, std::size_t arguments) {
  append_header(out, '*', arguments);
}

void append_bulk_header(std::string& out, std::size_t bytes) {
  append_header(out, '$', bytes);
}

void append_bulk(std::string& out, std::string_view argument) {
  append_bulk_header(out, argument.size());
  out.append(argument);
  out.append("\r\n");
}

std::size_t bulk_header_size(std::size_t bytes) noexcept {
  std::size_t digits = 1;
  while (bytes >= 10) {
    bytes /= 10;
    ++digits;
  }
  return 1 + digits + 2;
}

ReplyParser::Step ReplyParser::next(std::string_view unread) noexcept {
  using Type = ReplyHead::Type;
  if (unread.empty()) return {};
  ReplyHead head;
  switch (unread[0]) {
    case '+': head.type = Type::simple; break;
    case '-': head.type = Type::error; break;
    case ':': head.type = Type::integer; break;
    case '$': head.type = Type::bulk; break;
    case '*': head.type = Type::array; break;
    default: return malformed("unknown reply type");
  }
  // No number is longer than 20 digits and a sign; do not wait for kMaxLine to say so.
  const bool number = head.type != Type::simple && head.type != Type::error;
  const std::size_t limit = number ? 24 : kMaxLine;
  const std::size_t end = unread.find("\r\n", scanned_ == 0 ? 1 : scanned_);
  if (end == std::string_view::npos ? unread.size() > limit + 1 : end > limit) {
    return malformed("reply line too long");
  }
  if (end == std::string_view::npos) {
    // A CR may be the last byte: look at it again when the next one is here.
    scanned_ = unread.size() - (unread.back() == '\r' && unread.size() > 1 ? 1 : 0);
    return {};
  }
  scanned_ = 0;
  const std::string_view line = unread.substr(1, end - 1);
  if (!number) {
    if (head.type == Type::simple && line.find_first_of("\r\n") != std::string_view::npos) {
      return malformed("line break inside a simple string");
    }
    head.text = line;
  } else {
    const auto value = parse_integer(line);
    if (!value) return malformed("malformed number");
    if (head.type != Type::integer && *value < -1) return malformed("negative length");
    head.value = *value;
  }
  return {.found = Found::head, .head = head, .consumed = end + 2};
}

}  // namespace fastkv
