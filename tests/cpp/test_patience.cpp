// Nobody waits for ever: not behind a reply that was given up, not on a connection that takes what
// is written and says nothing, not for the end of loads that never end.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr double kNever = 0;  // no stall time-out

}  // namespace

TEST(what_stands_behind_a_reply_that_was_given_up_goes_elsewhere_if_none_comes) {
  for (const Command command : {Command::get, Command::exists, Command::set}) {
    std::atomic<bool> asked{false};
    Engine engine(1, 1, kWindow, std::make_shared<Stats>());
    Connector connector(
        engine,
        [&](int connection, const auto& words) -> std::optional<std::string> {
          asked = true;
          if (connection == 0) return std::nullopt;
          return answer(words);
        },
        SIZE_MAX, kNever);
    Call late(Command::get, 1);
    Call behind(command, 3);
    late.submit(engine, 0.3);
    while (!asked) std::this_thread::yield();
    behind.submit(engine);
    CHECK(late.wait() == Code::timed_out);
    // No attempt was used up: it has none to spare.
    CHECK(behind.wait() == Code::ok);
    Call later(command, 3);
    later.submit(engine);
    CHECK(later.wait() == Code::ok);
    CHECK(connector.asked() == 2);
  }
}

TEST(a_call_that_comes_after_one_was_given_up_waits_for_no_answer_to_that) {
  std::atomic<int> asked{0};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int connection, const auto& words) -> std::optional<std::string> {
        ++asked;
        if (connection == 0) return std::nullopt;
        return answer(words);
      },
      SIZE_MAX, kNever);
  Call given_up(Command::exists, 1);
  given_up.submit(engine);
  while (asked == 0) std::this_thread::yield();
  engine.cancel(given_up.id);
  CHECK(given_up.wait() == Code::cancelled);
  Call next(Command::exists, 1);
  next.submit(engine);
  CHECK(next.wait() == Code::ok);
}

TEST(what_must_not_be_repeated_suffers_from_nobody_who_gives_up) {
  for (const bool before : {true, false}) {
    std::atomic<int> asked{0};
    Engine engine(1, 1, kWindow, std::make_shared<Stats>());
    Connector connector(
        engine,
        [&](int, const auto& words) -> std::optional<std::string> {
          if (++asked == 1) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
          return answer(words);
        },
        SIZE_MAX, kNever);
    Call late(Command::exists, 1);
    Call once(Command::set, 1);
    once.batch->forbid_repeat();
    late.submit(engine, 0.3);
    while (asked == 0) std::this_thread::yield();
    if (before) once.submit(engine);
    CHECK(late.wait() == Code::timed_out);
    if (!before) once.submit(engine);
    CHECK(once.wait() == Code::ok);
  }
}

TEST(a_health_check_that_is_not_answered_keeps_nobody) {
  std::atomic<bool> silent{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int connection, const auto& words) -> std::optional<std::string> {
        if (connection == 0 && silent) return std::nullopt;
        return words[0] == "PING" ? "+PONG\r\n" : answer(words);
      },
      SIZE_MAX, kNever, 0.01);
  Call first(Command::exists, 1);
  first.submit(engine);
  CHECK(first.wait() == Code::ok);
  silent = true;
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // idle for more than that
  Call next(Command::exists, 1);
  next.submit(engine);
  CHECK(next.wait() == Code::ok);
}

TEST(a_server_that_is_late_for_everybody_is_waited_for) {
  std::atomic<bool> asked{false};
  std::atomic<bool> go{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int, const auto& words) -> std::optional<std::string> {
        asked = true;
        while (!go) std::this_thread::yield();
        return answer(words);
      },
      SIZE_MAX, kNever);
  Call call(Command::get, 3);
  call.submit(engine);
  while (!asked) std::this_thread::yield();
  Call last(Command::exists, 1);
  last.submit(engine, 1.5);
  CHECK(last.wait() == Code::timed_out);
  go = true;
  CHECK(call.wait() == Code::ok);
  CHECK(connector.asked() == 1);
}

TEST(bytes_that_are_taken_are_no_answer) {
  std::atomic<bool> silent{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int, const auto& words) -> std::optional<std::string> {
        if (silent) return std::nullopt;
        return answer(words);
      },
      SIZE_MAX, 0.3);
  Call first(Command::exists, 1);
  first.submit(engine);
  CHECK(first.wait() == Code::ok);
  silent = true;
  Call unanswered(Command::exists, 1);
  unanswered.submit(engine);
  // As long as there is something to write, the peer takes it.
  std::vector<std::unique_ptr<Call>> more;
  const auto give_up = Clock::now() + std::chrono::seconds(10);
  pollfd entry{unanswered.queue->fd(), POLLIN, 0};
  while (::poll(&entry, 1, 50) == 0) {
    CHECK(Clock::now() < give_up);
    more.push_back(std::make_unique<Call>(Command::exists, 1));
    more.back()->submit(engine);
  }
  CHECK(unanswered.wait() == Code::stalled);
  engine.close();
  for (const auto& call : more) call->wait();
}

TEST(a_long_store_that_is_being_taken_is_no_stall) {
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Call store(Command::set, 1, "k", std::size_t{8} << 20);
  store.submit(engine);
  std::optional<std::uint32_t> lane;
  while (!lane) {
    pollfd entry{engine.connect_event(), POLLIN, 0};
    ::poll(&entry, 1, -1);
    lane = engine.take_connect_request();
  }
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd peer(ends[1]);
  engine.adopt(*lane, UniqueFd(ends[0]), 1.0, 0.0);
  std::string chunk(std::size_t{64} << 10, ' ');
  std::size_t taken = 0;
  for (int slow = 40; taken < store.memory[0].size();) {
    if (slow-- > 0) std::this_thread::sleep_for(std::chrono::milliseconds(50));  // 2 s in all
    const ssize_t count = ::recv(peer.get(), chunk.data(), chunk.size(), 0);
    CHECK(count > 0);
    taken += static_cast<std::size_t>(count);
  }
  CHECK(::send(peer.get(), "+OK\r\n", 5, 0) == 5);
  CHECK(store.wait() == Code::ok);
}

TEST(loads_without_end_do_not_starve_a_store) {
  for (const std::size_t connections : {1u, 3u}) {
    Engine engine(1, connections, kWindow, std::make_shared<Stats>());
    // The server is the slow one: no connection is ever without a load.
    Connector connector(engine, [](int, const auto& words) {
      if (words[0] == "GET") std::this_thread::sleep_for(std::chrono::microseconds(200));
      return answer(words);
    });
    std::vector<std::unique_ptr<Call>> loads;
    for (int i = 0; i < 8; ++i) {
      loads.push_back(std::make_unique<Call>(Command::get, 200));
      loads.back()->submit(engine);
    }
    Call store(Command::set, 5);
    store.submit(engine);
    const auto give_up = Clock::now() + std::chrono::seconds(20);
    pollfd entry{store.queue->fd(), POLLIN, 0};
    for (std::size_t next = 0; ::poll(&entry, 1, 0) == 0; next = (next + 1) % loads.size()) {
      CHECK(Clock::now() < give_up);
      CHECK(loads[next]->wait() == Code::ok);
      loads[next] = std::make_unique<Call>(Command::get, 200);
      loads[next]->submit(engine);
    }
    CHECK(store.wait() == Code::ok);
    for (const auto& load : loads) CHECK(load->wait() == Code::ok);
  }
}

TEST(a_store_on_a_silent_connection_does_not_hold_the_others_back) {
  std::atomic<int> silent{-1};
  // One request a connection, or what is stuck might have taken others with it.
  Engine engine(1, 3, {1 << 20, 1, 0}, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int connection, const auto& words) -> std::optional<std::string> {
        int none = -1;
        if (words[0] == "SET" && words[1] == "stuck") {
          silent.compare_exchange_strong(none, connection);
        }
        if (silent == connection) return std::nullopt;
        return answer(words);
      },
      SIZE_MAX, kNever);
  Call load(Command::get, 1);
  load.submit(engine);
  CHECK(load.wait() == Code::ok);  // from here on stores go one at a time
  Call stuck(Command::set, 1, "stuck");
  stuck.submit(engine);
  while (silent < 0) std::this_thread::yield();
  Call store(Command::set, 20);
  store.submit(engine);
  CHECK(store.wait() == Code::ok);
  engine.close();
  CHECK(stuck.wait() == Code::closed);
}

TEST(who_comes_back_is_not_overtaken_by_those_who_give_up) {
  std::atomic<bool> stop{false};
  std::atomic<bool> asked{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int, const auto&) {
        asked = true;
        return std::nullopt;
      },
      SIZE_MAX, 2.0);
  std::thread impatient([&] {
    while (!stop) {
      Call call(Command::exists, 1);
      call.submit(engine, 0.3);
      call.wait();
    }
  });
  while (!asked) std::this_thread::yield();
  // Each connection is left after a second, for the sake of who gave up on it.
  Call patient(Command::exists, 1);
  patient.submit(engine);
  CHECK(patient.wait() == Code::stalled);
  stop = true;
  impatient.join();
}

TEST(stores_without_end_do_not_starve_a_load_on_their_only_connection) {
  for (const int milliseconds : {15, 300}) {
    std::atomic<int> stores{0};
    std::atomic<int> before{-1};
    Engine engine(1, 2, kWindow, std::make_shared<Stats>());
    Connector connector(engine, [&](int, const auto& words) {
      if (words[0] == "SET") {
        std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
        ++stores;
      } else {
        before = stores.load();
      }
      return answer(words);
    });
    Call many(Command::set, 20, "s", 600 << 10);
    many.submit(engine);
    while (stores < 2) std::this_thread::yield();
    Call load(Command::get, 1);
    load.submit(engine);
    CHECK(load.wait() == Code::ok);
    CHECK(before <= 2 + 3);  // those on their way, and one that went meanwhile
    engine.cancel(many.id);
    many.wait();
  }
}

int main(int count, char** names) {
  return check::run(count, names);
}
