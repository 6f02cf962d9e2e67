// RESP2 (https://redis.io/docs/latest/develop/reference/protocol-spec/): encodes requests, and
// finds the head of each reply. Touches no socket and copies no value: it stops at a bulk header
// and leaves the body to the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fastkv {

// Appends to `out`. A command is an array header and then one bulk string an argument.
void append_array_header(std::string& out, std::size_t arguments);
void append_bulk_header(std::string& out, std::size_t bytes);
void append_bulk(std::string& out, std::string_view argument);

// Length of "$<bytes>\r\n".
std::size_t bulk_header_size(std::size_t bytes) noexcept;

struct ReplyHead {
  enum class Type : std::uint8_t { simple, error, integer, bulk, array };
  Type type = Type::simple;
  std::int64_t value = 0;  // the integer; the length of a bulk or array, -1 for a nil
  std::string_view text;   // simple and error: the line without its type and CRLF
};

class ReplyParser {
 public:
  // The longest simple string or error that a peer may send.
  static constexpr std::size_t kMaxLine = std::size_t{60} << 10;

  enum class Found : std::uint8_t { head, incomplete, malformed };
  struct Step {
    Found found = Found::incomplete;
    ReplyHead head;
    std::size_t consumed = 0;   // bytes of the head; the caller drops them
    const char* why = nullptr;  // malformed: what was wrong
  };

  // `unread` starts where the last head (or the body the caller took after it) ended. After
  // `incomplete`, call again with the same bytes and more: they are not scanned twice.
  Step next(std::string_view unread) noexcept;

 private:
  std::size_t scanned_ = 0;
};

}  // namespace fastkv
