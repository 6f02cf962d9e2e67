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

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kValueBytes = 3000;
constexpr std::size_t kLargeBytes = std::size_t{600} << 10;  // does not fit in a socket
// One connection for lookups and one for values, or one for all.
constexpr Window kWindow{1 << 20, 1024, 0};
constexpr double kNever = 0;  // no stall time-out

struct Call {
  Call(Command command, std::size_t keys, const std::string& name = "k",
       std::size_t bytes = kValueBytes)
      : batch(std::make_shared<Batch>(command)), memory(keys, std::string(bytes, 'v')) {
    for (std::string& value : memory) {
      batch->add_key(name);
      if (command != Command::get && command != Command::set) continue;
      batch->add_segment(value.data(), value.size());
      batch->end_value();
    }
  }
  void submit(Engine& engine, double seconds = 0) {
    id = next_id++;
    CHECK(engine.submit(batch, id, queue, retry(0), seconds).ok());
  }
  Code wait() {
    wait_for(*queue, 1);
    return batch->status().code;
  }

  std::shared_ptr<Batch> batch;
  std::shared_ptr<CompletionQueue> queue = std::make_shared<CompletionQueue>();
  std::vector<std::string> memory;
  std::uint64_t id = 0;
};

std::optional<std::string> answer(const std::vector<std::string>& words) {
  if (words[0] == "GET") return bulk(std::string(kValueBytes, 'w'));
  return words[0] == "SET" ? "+OK\r\n" : ":1\r\n";
}

// Eight callers that give up after 1.5 s each, not all at once, and ask again.
class Crowd {
 public:
  Crowd(Engine& engine, Command command, std::size_t bytes = kValueBytes) {
    for (int i = 0; i < 8; ++i) {
      threads_.emplace_back([this, &engine, command, bytes] {
        while (!stop_) {
          Call call(command, 1, "crowd", bytes);
          call.submit(engine, 1.5);
          call.wait();
        }
      });
      std::this_thread::sleep_for(std::chrono::milliseconds(180));
    }
  }
  ~Crowd() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

// Declared behind a Connector whose answers wait for it: ends before that, whatever a test throws.
struct AtEnd {
  std::atomic<bool>& over;
  ~AtEnd() { over = true; }
};

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

TEST(a_patient_call_ends_in_time_however_many_others_give_up) {
  Engine engine(2, 3, kWindow, std::make_shared<Stats>());
  Connector connector(engine, [](int, const auto&) { return std::nullopt; }, SIZE_MAX, 2.0);
  const Crowd crowd(engine, Command::get);
  for (int i = 0; i < 2; ++i) {
    const auto begin = Clock::now();
    Call patient(Command::get, 1);
    patient.submit(engine);
    CHECK(patient.wait() == Code::stalled);
    CHECK(Clock::now() - begin < std::chrono::seconds(5));
  }
}

TEST(a_slow_server_answers_a_patient_call_however_many_others_give_up) {
  for (const Command command : {Command::get, Command::set}) {
    std::atomic<bool> over{false};
    Engine engine(2, 3, kWindow, std::make_shared<Stats>());
    Connector connector(
        engine,
        [&](int, const auto& words) {
          if (!over) std::this_thread::sleep_for(std::chrono::milliseconds(1800));
          return answer(words);
        },
        SIZE_MAX, command == Command::get ? 2.0 : kNever);
    const AtEnd at_end{over};
    const Crowd crowd(engine, command, command == Command::get ? kValueBytes : kLargeBytes);
    std::vector<std::unique_ptr<Call>> patient;
    for (int i = 0; i < 4; ++i) {
      patient.push_back(std::make_unique<Call>(command, 1));
      patient.back()->submit(engine);
      std::this_thread::sleep_for(std::chrono::milliseconds(230));
    }
    for (const auto& call : patient) CHECK(call->wait() == Code::ok);
  }
}

// Lookups go first on each connection: the call is never the one that is answered next.
TEST(a_slow_server_answers_a_patient_call_behind_lookups_that_are_given_up) {
  std::atomic<bool> stop{false};
  std::atomic<bool> asked{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int, const auto& words) {
        asked = true;
        if (words[0] == "EXISTS") std::this_thread::sleep_for(std::chrono::milliseconds(1500));
        return answer(words);
      },
      SIZE_MAX, kNever);
  std::thread impatient([&] {
    while (!stop) {
      Call call(Command::exists, 1);
      call.submit(engine, 0.3);
      call.wait();
    }
  });
  while (!asked) std::this_thread::yield();
  Call patient(Command::get, 1);
  patient.submit(engine);
  pollfd entry{patient.queue->fd(), POLLIN, 0};
  const int answered = ::poll(&entry, 1, 10'000);
  stop = true;
  impatient.join();
  CHECK(answered == 1);
  CHECK(patient.wait() == Code::ok);
}

TEST(whoever_was_waited_for_and_answered_keeps_nobody_afterwards) {
  std::atomic<bool> asked{false};
  Engine engine(1, 1, kWindow, std::make_shared<Stats>());
  Connector connector(
      engine,
      [&](int connection, const auto& words) -> std::optional<std::string> {
        asked = true;
        if (words[1] == "long") std::this_thread::sleep_for(std::chrono::milliseconds(50));
        if (connection == 0 || (connection == 1 && words[1] == "never")) return std::nullopt;
        return answer(words);
      },
      SIZE_MAX, 2.0);
  Call first(Command::exists, 1);
  first.submit(engine, 0.3);
  while (!asked) std::this_thread::yield();
  const auto since = Clock::now();
  Call patient(Command::exists, 1);
  patient.submit(engine);
  // From here on the connection is never idle.
  std::deque<std::unique_ptr<Call>> busy;
  const auto keep_busy = [&] {
    busy.push_back(std::make_unique<Call>(Command::exists, 1, "long"));
    busy.back()->submit(engine);
  };
  for (int i = 0; i < 3; ++i) keep_busy();
  CHECK(patient.wait() == Code::ok);
  while (Clock::now() - since < std::chrono::milliseconds(2200)) {
    CHECK(busy.front()->wait() == Code::ok);
    busy.pop_front();
    keep_busy();
  }
  CHECK(connector.asked() == 2);
  Call late(Command::exists, 1, "never");
  late.submit(engine, 0.5);
  Call behind(Command::exists, 1);
  behind.submit(engine);
  CHECK(late.wait() == Code::timed_out);
  CHECK(behind.wait() == Code::ok);
  for (const auto& call : busy) CHECK(call->wait() == Code::ok);
}

// A SET that is given up when a part of it is out ends its connection at once.
TEST(a_patient_call_ends_in_time_however_many_stores_are_given_up) {
  for (const Command command : {Command::set, Command::get}) {
    std::atomic<bool> over{false};
    Engine engine(2, 3, kWindow, std::make_shared<Stats>());
    Connector connector(
        engine,
        [&](int, const auto&) {
          while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(10));
          return std::nullopt;  // and nothing more is read
        },
        SIZE_MAX, 2.0);
    const AtEnd at_end{over};
    const Crowd crowd(engine, Command::set, kLargeBytes);
    const auto begin = Clock::now();
    Call patient(command, 1, "k", command == Command::set ? kLargeBytes : kValueBytes);
    patient.submit(engine);
    CHECK(patient.wait() == Code::stalled);
    CHECK(Clock::now() - begin < std::chrono::seconds(7));
  }
}

// Where a connection takes longer to make than stores wait for their turn, one of them is always
// overdue.
TEST(stores_that_are_given_up_do_not_starve_a_load_on_their_connections) {
  for (const std::size_t connections : {2u, 3u}) {
    std::atomic<bool> over{false};
    Engine engine(1, connections, kWindow, std::make_shared<Stats>());
    Connector connector(
        engine,
        [&](int, const auto&) {
          while (!over) std::this_thread::sleep_for(std::chrono::milliseconds(10));
          return std::nullopt;
        },
        SIZE_MAX, 2.0);
    connector.dawdle(std::chrono::milliseconds(30));
    const AtEnd at_end{over};
    const Crowd crowd(engine, Command::set, kLargeBytes);
    const auto begin = Clock::now();
    Call patient(Command::get, 1);
    patient.submit(engine);
    CHECK(patient.wait() == Code::stalled);
    CHECK(Clock::now() - begin < std::chrono::seconds(10));
  }
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

int main() {
  return check::run_all();
}
