// Nobody waits for ever among many who give up, and on a slow server nobody fails because of them.
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kLargeBytes = std::size_t{600} << 10;  // does not fit in a socket
constexpr double kNever = 0;                                 // no stall time-out

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
    // About 17 s, and 1.8 s more for each turn that one misses.
    for (const auto& call : patient) CHECK(call->wait(30'000) == Code::ok);
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

int main(int count, char** names) {
  return check::run(count, names);
}
