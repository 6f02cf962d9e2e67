// How much is asked for at once, by how far away the server is.
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kFar = 10;
constexpr std::size_t kNear = 3;

// One connection, and the server's end of it in the test's own hands.
class Link {
 public:
  explicit Link(Window window) : engine_(1, 1, window) {}

  void cut() { server_.reset(); }

  // A load of one value, answered after a while.
  void load_one(std::chrono::microseconds delay) {
    Call call(Command::get, 1);
    submit(call);
    CHECK(receive() == 1);
    std::this_thread::sleep_for(delay);
    reply(1);
    CHECK(call.wait() == Code::ok);
  }

  // How many values of a large load are asked for before one has come.
  std::size_t asked_at_once() {
    Call call(Command::get, 4 * kFar);
    submit(call);
    const std::size_t first = receive();
    for (std::size_t asked = first, answered = 0;; asked += receive()) {
      reply(asked - std::exchange(answered, asked));
      if (asked == 4 * kFar) break;
    }
    CHECK(call.wait() == Code::ok);
    return first;
  }

 private:
  void submit(Call& call) {
    call.submit(engine_);
    if (server_) return;
    std::optional<std::uint32_t> asked;
    while (!(asked = engine_.take_connect_request())) {  // it is also told what was lost
      pollfd entry{engine_.connect_event(), POLLIN, 0};
      CHECK(::poll(&entry, 1, 20'000) == 1);
    }
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    server_ = UniqueFd(ends[1]);
    engine_.adopt(*asked, UniqueFd(ends[0]), 20, 0);
  }

  // Requests that were written together.
  std::size_t receive() {
    char chunk[8192];
    pollfd entry{server_.get(), POLLIN, 0};
    CHECK(::poll(&entry, 1, 20'000) == 1);
    const ssize_t count = ::recv(server_.get(), chunk, sizeof chunk, 0);
    CHECK(count > 0);
    std::string in(chunk, static_cast<std::size_t>(count));
    std::size_t requests = 0;
    while (take_request(in)) ++requests;
    CHECK(in.empty());
    return requests;
  }

  void reply(std::size_t values) {
    std::string text;
    while (values-- > 0) text += bulk(std::string(kValueBytes, 'w'));
    CHECK(::send(server_.get(), text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()));
  }

  Engine engine_;
  UniqueFd server_;
};

}  // namespace

TEST(a_server_that_is_far_away_is_asked_for_a_whole_window) {
  Link link({kFar * kValueBytes, 64, 0, kNear * kValueBytes});
  for (int i = 0; i < 20; ++i) link.load_one(std::chrono::milliseconds(1));
  CHECK(link.asked_at_once() == kFar);
}

TEST(a_server_that_answers_at_once_is_asked_for_less) {
  Link link({kFar * kValueBytes, 64, 0, kNear * kValueBytes});
  // On a busy machine it is not at once each time.
  for (int tries = 0; link.asked_at_once() != kNear; ++tries) {
    CHECK(tries < 10'000);
    link.load_one(std::chrono::microseconds(0));
  }
  // Slow replies later on are the server's business, not the way's.
  link.load_one(std::chrono::milliseconds(1));
  CHECK(link.asked_at_once() == kNear);
}

TEST(another_connection_may_lead_farther) {
  Link link({kFar * kValueBytes, 64, 0, kNear * kValueBytes});
  while (link.asked_at_once() != kNear) link.load_one(std::chrono::microseconds(0));
  link.cut();
  link.load_one(std::chrono::milliseconds(1));
  CHECK(link.asked_at_once() == kFar);
}

int main(int count, char** names) {
  return check::run(count, names);
}
