// The codec against a second one that is written the plain way: any bytes give the same heads and
// the same end, however they are cut.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "resp.hpp"

using namespace fastkv;
using Found = ReplyParser::Found;
using Type = ReplyHead::Type;

namespace {

struct Head {
  Type type = Type::simple;
  std::int64_t value = 0;
  std::string text;
  bool operator==(const Head&) const = default;
};

struct Parsed {
  std::vector<Head> heads;
  bool malformed = false;
  bool operator==(const Parsed&) const = default;
};

// The heads in `bytes`, which come `step` at a time. Values are skipped, as the session does it.
Parsed parse(std::string_view bytes, std::size_t step) {
  Parsed parsed;
  ReplyParser parser;
  std::size_t at = 0;
  for (std::size_t have = std::min(step, bytes.size());;) {
    const auto unread = bytes.substr(at, have - std::min(at, have));
    const auto found = parser.next(unread);
    if (found.found == Found::malformed) {
      CHECK(found.why != nullptr);
      parsed.malformed = true;
      return parsed;
    }
    if (found.found == Found::incomplete) {
      if (have == bytes.size()) return parsed;
      have = std::min(have + step, bytes.size());
      continue;
    }
    const ReplyHead& head = found.head;
    CHECK(found.consumed >= 3 && found.consumed <= unread.size());
    if (!head.text.empty()) {
      CHECK(head.text.data() == unread.data() + 1 && head.text.size() + 3 == found.consumed);
    }
    parsed.heads.push_back({head.type, head.value, std::string(head.text)});
    at += found.consumed;
    if (head.type != Type::bulk || head.value < 0) continue;
    const auto body = static_cast<std::uint64_t>(head.value) + 2;
    if (body > bytes.size() - at) return parsed;
    at += body;
    have = std::max(have, at);
  }
}

bool is_number(std::string_view text) {
  if (text.starts_with('-')) {
    text.remove_prefix(1);
    if (text == "0") return false;
  }
  if (text.empty() || (text[0] == '0' && text.size() > 1)) return false;
  return text.find_first_not_of("0123456789") == std::string_view::npos;
}

Parsed expected(std::string_view bytes) {
  Parsed parsed;
  const auto malformed = [&] {
    parsed.malformed = true;
    return parsed;
  };
  while (!bytes.empty()) {
    const std::size_t type = std::string_view("+-:$*").find(bytes[0]);
    if (type == std::string_view::npos) return malformed();
    const bool number = type >= 2;
    const std::size_t longest = number ? 23 : ReplyParser::kMaxLine - 1;
    const std::size_t end = bytes.substr(1).find("\r\n");
    if (end == std::string_view::npos) {
      parsed.malformed = bytes.size() - 1 > longest + 1;  // one: the CR may be there
      return parsed;
    }
    if (end > longest) return malformed();
    const std::string line(bytes.substr(1, end));
    Head head{static_cast<Type>(std::array{Type::simple, Type::error, Type::integer, Type::bulk,
                                           Type::array}[type]),
              0, line};
    if (number) {
      if (!is_number(line)) return malformed();
      errno = 0;
      head.value = std::strtoll(line.c_str(), nullptr, 10);
      if (errno == ERANGE || (head.type != Type::integer && head.value < -1)) return malformed();
      head.text.clear();
    } else if (type == 0 && line.find_first_of("\r\n") != std::string::npos) {
      return malformed();
    }
    parsed.heads.push_back(head);
    bytes.remove_prefix(1 + end + 2);
    if (head.type == Type::bulk && head.value >= 0) {
      const auto body = static_cast<std::uint64_t>(head.value) + 2;
      if (body > bytes.size()) return parsed;
      bytes.remove_prefix(body);
    }
  }
  return parsed;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const Parsed want = expected(bytes);
  for (const std::size_t step : {size, size / 3 + 1, std::size_t{1}}) {
    CHECK(parse(bytes, step) == want);
  }
  std::string out;
  append_bulk(out, bytes);
  CHECK(out.size() == bulk_header_size(size) + size + 2);
  const Parsed back = parse(out, 5);
  CHECK(!back.malformed && back.heads.size() == 1);
  CHECK(back.heads[0] == (Head{Type::bulk, static_cast<std::int64_t>(size), {}}));
  return 0;
}
