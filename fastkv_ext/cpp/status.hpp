// The vocabulary that every layer shares: what became of one key, what became of a batch or a
// connection. Knows nothing of RESP, sockets or threads.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fastkv {

// What happened to a batch, a connection or a call. Crosses every layer and, as a number, the
// border to Python (fastkv/errors.py gives each its exception).
enum class Code : std::uint8_t {
  ok,
  closed,           // the engine was closed before the work was done
  cancelled,        // the caller took the batch back
  timed_out,        // the batch missed its own deadline
  connect_failed,   // no connection could be made; the connector keeps the exception
  connection_lost,  // reset or end of stream, and no retry was left
  stalled,          // no byte moved for the socket time-out, and no retry was left
  protocol_error,   // the peer did not speak RESP2, or answered another question
  unknown_outcome,  // a conditional SET was lost after it had been sent: it cannot be repeated
  internal_error,   // a worker died; the detail says of what
};

// Made and copied without fail: there may be no memory to say in words what happened, but it has to
// be told, on threads that must not throw.
struct Status {
  Code code = Code::ok;
  std::string detail;

  Status() noexcept = default;
  Status(Code what, std::string_view words) noexcept : code(what) {
    try {
      detail = words;
    } catch (...) {
      detail.clear();
    }
  }
  Status(const Status& other) noexcept : Status(other.code, other.detail) {}
  Status& operator=(const Status& other) noexcept {
    if (this != &other) *this = Status(other);
    return *this;
  }
  Status(Status&&) noexcept = default;
  Status& operator=(Status&&) noexcept = default;
  ~Status() = default;

  bool ok() const noexcept { return code == Code::ok; }
};

// What the server said about one key.
enum class Outcome : std::uint8_t {
  unanswered,
  hit,            // the value is in its buffer, was stored, exists, or was deleted
  miss,           // no such key, or a SET's NX or XX was not met
  size_mismatch,  // the value has another length than its buffer
  refused,        // an error reply
  // Of a value that was read in ranges; never a batch's last word.
  torn,    // it changed meanwhile: read it again
  misfit,  // missing, of another length, or refused: read it whole, to know
  lost,    // a connection that read a part of it broke
};

}  // namespace fastkv
