// A server at the other end of socket pairs, for tests of the whole engine.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "drain.hpp"
#include "engine.hpp"
#include "tcp_pair.hpp"

// What the server says to a request of connection number so-and-so; nothing: it never says
// anything again. With kHangUp at its end, it closes the connection afterwards.
inline constexpr std::string_view kHangUp = "(hangs up)";
using Answer =
    std::function<std::optional<std::string>(int connection, const std::vector<std::string>&)>;

inline std::string bulk(std::string_view text) {
  return "$" + std::to_string(text.size()) + "\r\n" + std::string(text) + "\r\n";
}

// Takes the words of the first request in `in`, if it is there to its end.
inline std::optional<std::vector<std::string>> take_request(std::string& in) {
  std::size_t at = 0;
  const auto number = [&]() -> std::optional<std::size_t> {
    const std::size_t end = in.find("\r\n", at);
    if (end == std::string::npos) return std::nullopt;
    const std::size_t found = std::stoul(in.substr(at + 1, end - at - 1));
    at = end + 2;
    return found;
  };
  const auto total = number();
  if (!total) return std::nullopt;
  std::vector<std::string> words;
  while (words.size() < *total) {
    const auto size = number();
    if (!size || in.size() < at + *size + 2) return std::nullopt;
    words.push_back(in.substr(at, *size));
    at += *size + 2;
  }
  in.erase(0, at);
  return words;
}

// Answers, and drops the connection after `lifetime` requests, in the middle of a reply.
inline void serve(fastkv::UniqueFd socket, int connection, const Answer& answer,
                  std::size_t lifetime) {
  std::string in;
  char chunk[8192];
  std::size_t requests = 0;
  bool silent = false;
  for (;;) {
    const ssize_t count = ::recv(socket.get(), chunk, sizeof chunk, 0);
    if (count <= 0) return;
    in.append(chunk, static_cast<std::size_t>(count));
    while (const auto words = take_request(in)) {
      if (silent) continue;
      const auto reply = answer(connection, *words);
      if (!reply) {
        silent = true;
        continue;
      }
      std::string_view rest = *reply;
      bool last = ++requests > lifetime;
      if (last) rest = rest.substr(0, rest.size() / 2);
      if (rest.ends_with(kHangUp)) {
        rest.remove_suffix(kHangUp.size());
        last = true;
      }
      while (!rest.empty()) {
        const ssize_t sent = ::send(socket.get(), rest.data(), rest.size(), MSG_NOSIGNAL);
        if (sent <= 0) return;
        rest.remove_prefix(static_cast<std::size_t>(sent));
      }
      if (last) return;
    }
  }
}

// Gives the engine a socket pair for each connection that it wants.
class Connector {
 public:
  Connector(fastkv::Engine& engine, Answer answer, std::size_t lifetime = SIZE_MAX,
            double stall_seconds = 5.0, double health_seconds = 0.0)
      : engine_(engine),
        answer_(std::move(answer)),
        lifetime_(lifetime),
        stall_seconds_(stall_seconds),
        health_seconds_(health_seconds) {
    thread_ = std::thread([this] { run(); });
  }
  ~Connector() {
    stop_ = true;
    engine_.wake_connector();
    thread_.join();
    engine_.close();  // ends the peers' connections
    for (std::thread& peer : peers_) peer.join();
  }

  // TCP on this machine from now on.
  void use_tcp() { use_tcp_ = true; }
  void refuse() { refuse_ = true; }
  // Takes its time for each, from now on.
  void dawdle(std::chrono::milliseconds pause) { pause_ = pause; }
  // Says neither yes nor no from now on.
  void ignore() { ignore_ = true; }
  // The lane that a connection was made for.
  std::uint32_t lane_of(int connection) {
    std::lock_guard lock(mutex_);
    return lanes_.at(static_cast<std::size_t>(connection));
  }
  int asked() const { return asked_; }

 private:
  void run() {
    int connections = 0;
    while (!stop_) {
      pollfd entry{engine_.connect_event(), POLLIN, 0};
      ::poll(&entry, 1, -1);
      while (const auto asked = engine_.take_connect_request()) {
        const std::uint32_t lane = *asked;
        if (ignore_) continue;
        ++asked_;
        if (refuse_) {
          engine_.connect_failed(lane, UINT64_MAX, "refused", 0.05);
          continue;
        }
        std::this_thread::sleep_for(pause_.load());
        fastkv::UniqueFd ours;
        fastkv::UniqueFd theirs;
        if (use_tcp_) {
          TcpPair pair;
          ours = std::move(pair.connected);
          theirs = std::move(pair.accepted);
        } else {
          int ends[2];
          CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
          ours = fastkv::UniqueFd(ends[0]);
          theirs = fastkv::UniqueFd(ends[1]);
        }
        {
          std::lock_guard lock(mutex_);
          lanes_.push_back(lane);
        }
        peers_.emplace_back(
            [this, number = connections++](fastkv::UniqueFd socket) {
              serve(std::move(socket), number, answer_, lifetime_);
            },
            std::move(theirs));
        engine_.adopt(lane, std::move(ours), stall_seconds_, health_seconds_);
      }
    }
  }

  fastkv::Engine& engine_;
  const Answer answer_;
  const std::size_t lifetime_;
  const double stall_seconds_;
  const double health_seconds_;
  std::atomic<bool> stop_{false};
  std::atomic<bool> use_tcp_{false};
  std::atomic<bool> refuse_{false};
  std::atomic<bool> ignore_{false};
  std::atomic<std::chrono::milliseconds> pause_{};
  std::atomic<int> asked_{0};
  std::mutex mutex_;
  std::vector<std::uint32_t> lanes_;  // by connection; guarded by mutex_
  std::thread thread_;
  std::vector<std::thread> peers_;
};

inline std::atomic<std::uint64_t> next_id{1};

inline std::shared_ptr<const fastkv::RetryPolicy> retry(std::int64_t retries,
                                                        double delay_seconds = 0) {
  auto policy = std::make_shared<fastkv::RetryPolicy>();
  policy->retries = retries;
  if (delay_seconds > 0) policy->delays.emplace_back(delay_seconds);
  return policy;
}

inline std::set<std::uint64_t> wait_for(fastkv::CompletionQueue& queue, std::size_t count,
                                        int milliseconds = 20'000) {
  std::set<std::uint64_t> done;
  while (done.size() < count) {
    pollfd entry{queue.fd(), POLLIN, 0};
    CHECK(::poll(&entry, 1, milliseconds) == 1);                                // else it hangs
    for (const std::uint64_t id : drain(queue)) CHECK(done.insert(id).second);  // exactly once
  }
  return done;
}
