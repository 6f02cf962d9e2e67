// No wake-up is lost: work that somebody who sleeps could do does not wait for somebody who cannot.
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "drain.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kValueBytes = 3000;

struct Call {
  Call(Command command, std::size_t keys, const std::string& name = "k")
      : batch(std::make_shared<Batch>(command)), memory(keys, std::string(kValueBytes, 'v')) {
    for (std::string& value : memory) {
      batch->add_key(name);
      if (command != Command::get && command != Command::set) continue;
      batch->add_segment(value.data(), value.size());
      batch->end_value();
    }
  }
  std::shared_ptr<Batch> batch;
  std::vector<std::string> memory;
};

std::optional<std::string> answer(const std::vector<std::string>& words) {
  if (words[0] == "GET") return bulk(std::string(kValueBytes, 'w'));
  return words[0] == "SET" ? "+OK\r\n" : ":1\r\n";
}

void run(Engine& engine, Call& call, double seconds = 0) {
  auto queue = std::make_shared<CompletionQueue>();
  engine.submit(call.batch, next_id++, queue, retry(-1), seconds);
  wait_for(*queue, 1);
}

// A lane for lookups, and a lane for values with each of two workers: 2 is the first worker's, as
// the lookups' is, 1 the second's. A window of less than a value: one value at a time.
class TwoWorkers {
 public:
  explicit TwoWorkers(Answer special) : engine_(2, 3, {1000, 64, 0}) {
    connector_.emplace(engine_, [this, special](int connection, const auto& words) {
      const auto said = special(connection, words);
      return said ? said : answer(words);
    });
    Call lookup(Command::exists, 1);
    run(engine_, lookup);
    // Until both lanes of values have connected, too.
    while (connector_->asked() < 3) {
      Call warm(Command::get, 20);
      run(engine_, warm);
    }
    connector_->ignore();
  }

  Engine& engine() { return engine_; }
  std::uint32_t lane_of(int connection) { return connector_->lane_of(connection); }

 private:
  Engine engine_;
  std::optional<Connector> connector_;
};

}  // namespace

TEST(a_worker_that_is_woken_and_cannot_work_wakes_the_next) {
  std::atomic<bool> ended{false};
  TwoWorkers* two = nullptr;
  TwoWorkers made([&](int connection, const auto& words) -> std::optional<std::string> {
    if (words[1] != "end" || two->lane_of(connection) != 2) return std::nullopt;
    ended = true;
    return *answer(words) + std::string(kHangUp);
  });
  two = &made;
  while (!ended) {
    Call end(Command::get, 8, "end");
    run(made.engine(), end);
  }
  for (int i = 0; i < 20; ++i) {
    Call call(Command::get, 1);
    run(made.engine(), call);
  }
}

TEST(a_worker_that_is_woken_for_two_things_and_can_do_one_wakes_the_next) {
  std::atomic<bool> stuck{false};
  std::atomic<bool> open{false};
  TwoWorkers* two = nullptr;
  TwoWorkers made([&](int connection, const auto& words) -> std::optional<std::string> {
    if (words[1] == "stuck" && two->lane_of(connection) == 2) {
      stuck = true;
      while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return std::nullopt;
  });
  two = &made;
  std::vector<std::unique_ptr<Call>> filling;
  auto filled = std::make_shared<CompletionQueue>();
  while (!stuck) {
    filling.push_back(std::make_unique<Call>(Command::get, 8, "stuck"));
    made.engine().submit(filling.back()->batch, next_id++, filled, retry(0), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until both sleep
    Call load(Command::get, 1);
    Call lookup(Command::exists, 1);
    auto queue = std::make_shared<CompletionQueue>();
    const auto start = Clock::now();
    made.engine().submit(load.batch, next_id++, queue, retry(0), 0);
    made.engine().submit(lookup.batch, next_id++, queue, retry(0), 0);
    wait_for(*queue, 2);
    CHECK(Clock::now() - start < std::chrono::seconds(2));  // long before the other has stalled
  }
  open = true;
  wait_for(*filled, filling.size());
}

TEST(what_comes_back_from_a_lost_connection_wakes_who_can_take_it) {
  for (const std::uint32_t lane : {1u, 2u}) {
    std::atomic<bool> ended{false};
    TwoWorkers* two = nullptr;
    TwoWorkers made([&](int connection, const auto& words) -> std::optional<std::string> {
      if (words[1] != "end" || two->lane_of(connection) != lane || ended.exchange(true)) {
        return std::nullopt;
      }
      std::this_thread::sleep_for(
          std::chrono::milliseconds(20));  // the other worker sleeps by then
      return std::string(kHangUp);
    });
    two = &made;
    while (!ended) {
      Call end(Command::get, 1 + lane, "end");
      run(made.engine(), end);
      CHECK(end.batch->status().ok());
    }
  }
}

TEST(a_store_that_was_held_back_goes_when_the_one_before_it_has_ended) {
  for (int round = 0; round < 10; ++round) {
    std::atomic<bool> ended{false};
    TwoWorkers made([&](int, const auto& words) -> std::optional<std::string> {
      if (words[0] != "SET" || ended.exchange(true)) return std::nullopt;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      return "+OK\r\n" + std::string(kHangUp);
    });
    Call urgent(Command::get, 1);
    run(made.engine(), urgent);
    Call stores(Command::set, 2);
    run(made.engine(), stores);
    CHECK(stores.batch->status().ok());
  }
}

TEST(a_deadline_wakes_the_worker_that_watches_it) {
  // The first worker, which serves no value here, has the clock.
  Engine engine(2, 2, {1000, 64, 0});
  Connector connector(engine, [](int, const auto&) { return std::nullopt; });
  for (int i = 0; i < 3; ++i) {  // at first it may not sleep yet
    Call call(Command::get, 1);
    run(engine, call, 0.05);
    CHECK(call.batch->status().code == Code::timed_out);
  }
}

TEST(work_that_comes_while_a_worker_falls_asleep_is_seen) {
  // The one lane for lookups is looked at first: the others give us time.
  Engine engine(1, 100, {1000, 64, 0});
  Connector connector(engine, [](int, const auto& words) { return answer(words); });
  auto queue = std::make_shared<CompletionQueue>();
  for (int i = 0; i < 30'000; ++i) {
    // Not by the descriptor: the worker is to be met between its last look and its sleep.
    Call call(Command::exists, 1);
    engine.submit(call.batch, next_id++, queue, retry(0), 0);
    const auto begin = Clock::now();
    while (drain(*queue).empty()) CHECK(Clock::now() - begin < std::chrono::seconds(20));
  }
}

TEST(nobody_is_woken_for_a_store_that_is_held_back) {
  // The second worker is ourselves: what we pull is on its way, and we see who wakes us.
  Schedule schedule(2, {kLookups, kValues, kValues}, 0, std::make_shared<Stats>());
  const auto queue = std::make_shared<CompletionQueue>();
  const auto submit = [&](const Call& call) {
    CHECK(schedule.submit(call.batch, next_id++, queue, retry(0), {}).ok());
  };
  const auto pull = [&](Clock::time_point now) {
    return schedule.pull(kValues, schedule.generation(), 1, kValueBytes, now);
  };
  Call load(Command::get, 1);
  Call stores(Command::set, 2);
  submit(load);
  submit(stores);
  const auto later = Clock::now() + std::chrono::hours(1);  // it is held back for so long
  CHECK(pull(later).batch == stores.batch.get());
  CHECK(pull(later).batch == load.batch.get());
  CHECK(pull(later).retry_at > later && schedule.has_work(kValues));

  Worker first(0, schedule, {1 << 20, 64, 0});
  std::vector<std::thread> peers;
  for (const std::uint32_t lane : {0u, 2u}) {
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    peers.emplace_back([fd = ends[1]] {
      serve(UniqueFd(fd), 0, [](int, const auto& words) { return answer(words); }, SIZE_MAX);
    });
    schedule.connected(lane);
    std::lock_guard lock(schedule.fork_mutex());
    schedule.inbox(0).post(Adopt{lane, std::make_unique<SocketStream>(UniqueFd(ends[0]))});
  }
  Inbox& second = schedule.inbox(1);
  second.asleep = true;
  first.start();
  for (int i = 0; i < 3; ++i) {  // each wakes the first worker, which sees the store, too
    Call lookup(Command::exists, 1);
    submit(lookup);
    wait_for(*queue, 1);
  }
  const bool woken = !second.asleep;
  schedule.close({Code::closed, {}});
  schedule.inbox(0).stop();
  first.join();
  schedule.finish(*load.batch, 1);
  schedule.finish(*stores.batch, 1);
  wait_for(*queue, 2);
  for (std::thread& peer : peers) peer.join();
  CHECK(!woken);
}

int main(int count, char** names) {
  return check::run(count, names);
}
