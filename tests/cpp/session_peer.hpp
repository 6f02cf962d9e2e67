// A session's peer without a socket: give it the bytes in any pieces, look where they land.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.hpp"
#include "session.hpp"

using namespace fastkv;

// A caller's memory for one value, in parts, poisoned.
struct Memory {
  explicit Memory(std::vector<std::size_t> sizes) {
    for (const std::size_t size : sizes) parts.emplace_back(size, '\xa5');
    for (std::string& part : parts) {
      segments.push_back({reinterpret_cast<std::byte*>(part.data()), part.size()});
    }
  }
  explicit Memory(std::size_t size) : Memory(std::vector<std::size_t>{size}) {}
  Memory(const Memory&) = delete;

  std::string text() const {
    std::string all;
    for (const std::string& part : parts) all += part;
    return all;
  }
  bool poisoned() const { return text().find_first_not_of('\xa5') == std::string::npos; }

  std::vector<std::string> parts;
  std::vector<Segment> segments;
};

inline int owner_a;
inline int owner_b;

inline Operation get(std::string_view key, const Memory& memory, void* owner = &owner_a,
                     std::uint32_t index = 0) {
  return {.command = Command::get, .ticket = {owner, index}, .key = key, .value = memory.segments};
}

inline Operation plain(Command command, std::string_view key, std::uint32_t index = 0) {
  return {.command = command, .ticket = {&owner_a, index}, .key = key};
}

// Everything the session wants to send, at most `most` bytes a write.
inline std::string sent(Session& session, std::size_t most = 1 << 20) {
  std::string out;
  while (session.has_unsent()) {
    std::size_t left = most;
    for (const iovec& part : session.prepare_write()) {
      const std::size_t taken = std::min(left, part.iov_len);
      out.append(static_cast<const char*>(part.iov_base), taken);
      left -= taken;
    }
    session.commit_write(most - left);
  }
  return out;
}

// Feeds what the peer says, at most `most` bytes a read.
inline Status feed(Session& session, std::string_view bytes, std::size_t most = 1 << 20) {
  while (!bytes.empty()) {
    std::size_t moved = 0;
    for (const iovec& part : session.prepare_read()) {
      const std::size_t taken = std::min({part.iov_len, bytes.size(), most - moved});
      std::memcpy(part.iov_base, bytes.data(), taken);
      bytes.remove_prefix(taken);
      moved += taken;
    }
    CHECK(moved > 0);
    if (Status status = session.commit_read(moved); !status.ok()) return status;
  }
  return {};
}

inline std::vector<Completed> completed(Session& session) {
  return std::exchange(session.completed(), {});
}

inline std::string bulk(std::string_view value) {
  return "$" + std::to_string(value.size()) + "\r\n" + std::string(value) + "\r\n";
}
