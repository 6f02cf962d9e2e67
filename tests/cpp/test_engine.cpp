// The whole engine against peers at the other end of socket pairs: many callers, lost
// connections, cancelled batches, close. No Python, so that thread sanitizers see everything.
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kValueBytes = 3000;

std::string value_of(std::string_view key) {
  std::string value;
  while (value.size() < kValueBytes) value += std::string(key) + ".";
  value.resize(kValueBytes);
  return value;
}

// Keys that start with "k" exist.
std::optional<std::string> answer(int, const std::vector<std::string>& words) {
  if (words[0] == "GET") return words[1][0] == 'k' ? bulk(value_of(words[1])) : "$-1\r\n";
  if (words[0] == "SET") return words[2] == value_of(words[1]) ? "+OK\r\n" : "-ERR wrong bytes\r\n";
  return words[1][0] == 'k' ? ":1\r\n" : ":0\r\n";
}

struct Call {
  std::shared_ptr<Batch> batch;
  std::vector<std::string> memory;
};

Call make_call(Command command, std::size_t keys) {
  Call call{std::make_shared<Batch>(command), {}};
  call.memory.resize(keys);
  for (std::size_t i = 0; i < keys; ++i) {
    const std::string key = (i % 5 == 4 ? "x" : "k") + std::to_string(i);
    call.batch->add_key(key);
    if (command != Command::get && command != Command::set) continue;
    call.memory[i] = command == Command::set ? value_of(key) : std::string(kValueBytes, '\xa5');
    call.batch->add_segment(call.memory[i].data(), kValueBytes);
    call.batch->end_value();
  }
  return call;
}

void check_outcomes(const Call& call) {
  CHECK(call.batch->status().ok());
  CHECK(call.batch->all_answered_plainly());
  for (std::size_t i = 0; i < call.memory.size(); ++i) {
    const bool exists = i % 5 != 4;
    const bool hit = exists || call.batch->command() == Command::set;
    CHECK(call.batch->outcome(i) == (hit ? Outcome::hit : Outcome::miss));
    if (call.batch->command() == Command::get && exists) {
      CHECK(call.memory[i] == value_of("k" + std::to_string(i)));
    }
  }
}

constexpr Window kWindow{64 * 1024, 64, 0};
constexpr Command kCommands[] = {Command::get, Command::set, Command::exists, Command::unlink};

}  // namespace

TEST(many_callers_get_right_answers_exactly_once) {
  Engine engine(3, 5, kWindow);
  Connector connector(engine, answer, 1'000'000);
  std::vector<std::thread> callers;
  std::atomic<int> failed{0};
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      try {
        for (int round = 0; round < 40; ++round) {
          auto queue = std::make_shared<CompletionQueue>();
          std::vector<Call> calls;
          for (int i = 0; i < 3; ++i) {
            calls.push_back(make_call(kCommands[(c + round + i) % 4],
                                      1 + static_cast<std::size_t>(round * 7 + i) % 150));
            engine.submit(calls.back().batch, next_id++, queue, retry(0), 0);
          }
          wait_for(*queue, calls.size());
          for (const Call& call : calls) check_outcomes(call);
        }
      } catch (const std::exception& error) {
        std::printf("%s\n", error.what());
        ++failed;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(failed == 0);
  CHECK(engine.batches() == 0);
}

TEST(what_was_in_flight_on_a_lost_connection_is_sent_again) {
  Engine engine(2, 4, kWindow);
  Connector connector(engine, answer, 37);
  for (int round = 0; round < 30; ++round) {
    auto queue = std::make_shared<CompletionQueue>();
    Call call = make_call(kCommands[round % 4], 200);
    engine.submit(call.batch, next_id++, queue, retry(-1), 0);
    wait_for(*queue, 1);
    check_outcomes(call);
  }
}

TEST(a_batch_without_retries_fails_when_its_connection_is_lost_and_the_next_works) {
  Engine engine(1, 2, kWindow);
  Connector connector(engine, answer, 50);
  int lost = 0;
  int right = 0;
  for (int round = 0; round < 30; ++round) {
    auto queue = std::make_shared<CompletionQueue>();
    Call call = make_call(Command::get, 20);
    engine.submit(call.batch, next_id++, queue, retry(0), 0);
    wait_for(*queue, 1);
    if (call.batch->status().ok()) {
      check_outcomes(call);
      ++right;
    } else {
      CHECK(call.batch->status().code == Code::connection_lost);
      ++lost;
    }
  }
  CHECK(lost >= 5 && right >= 5);
}

TEST(memory_of_a_batch_that_has_completed_is_not_written) {
  Engine engine(2, 4, kWindow);
  Connector connector(engine, answer, 500);
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    auto queue = std::make_shared<CompletionQueue>();
    Call victim = make_call(Command::get, 100);
    Call other = make_call(Command::get, 50);
    const std::uint64_t id = next_id++;
    // A cancelled batch, or one that misses its deadline.
    const bool cancel = round % 2 == 0;
    engine.submit(victim.batch, id, queue, retry(-1), cancel ? 0 : 1e-4);
    engine.submit(other.batch, next_id++, queue, retry(-1), 0);
    const auto until = Clock::now() + std::chrono::microseconds(random() % 300);
    while (Clock::now() < until) {
    }
    if (cancel) engine.cancel(id);
    wait_for(*queue, 2);
    check_outcomes(other);
    const Code code = victim.batch->status().code;
    CHECK(code == Code::ok || code == (cancel ? Code::cancelled : Code::timed_out));
    if (code == Code::ok) continue;
    for (std::string& part : victim.memory) part.assign(kValueBytes, '\x5a');
    auto again = std::make_shared<CompletionQueue>();
    Call next = make_call(Command::exists, 200);
    engine.submit(next.batch, next_id++, again, retry(-1), 0);
    wait_for(*again, 1);
    for (const std::string& part : victim.memory) {
      CHECK(part.find_first_not_of('\x5a') == std::string::npos);
    }
  }
}

TEST(close_completes_what_is_pending_and_refuses_what_comes_later) {
  for (int round = 0; round < 30; ++round) {
    auto queue = std::make_shared<CompletionQueue>();
    std::vector<Call> calls;
    {
      Engine engine(2, 3, kWindow);
      Connector connector(engine, answer, 1'000'000);
      for (int i = 0; i < 8; ++i) {
        calls.push_back(make_call(kCommands[i % 4], 100));
        engine.submit(calls.back().batch, next_id++, queue, retry(0), 0);
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
      std::thread also([&] { engine.close(); });
      engine.close();
      also.join();
      CHECK(engine.batches() == 0);
      Call late = make_call(Command::exists, 1);
      CHECK(engine.submit(late.batch, next_id++, queue, retry(0), 0).code == Code::closed);
    }
    wait_for(*queue, calls.size());
    for (const Call& call : calls) {
      const Code code = call.batch->status().code;
      CHECK(code == Code::ok || code == Code::closed);
      if (code == Code::ok) check_outcomes(call);
    }
  }
}

TEST(a_batch_that_no_connection_can_serve_fails_when_connecting_has_failed) {
  Engine engine(2, 4, kWindow);
  auto queue = std::make_shared<CompletionQueue>();
  for (int round = 0; round < 20; ++round) {
    Call call = make_call(kCommands[round % 4], 10);
    engine.submit(call.batch, next_id++, queue, retry(5), 0);
    std::thread connector([&] {
      while (engine.batches() > 0) {
        pollfd entry{engine.connect_event(), POLLIN, 0};
        ::poll(&entry, 1, 1000);
        while (const auto asked = engine.take_connect_request()) {
          const std::uint32_t lane = *asked;
          engine.connect_failed(lane, UINT64_MAX, "refused", 0);
        }
      }
    });
    wait_for(*queue, 1);
    engine.wake_connector();
    connector.join();
    CHECK(call.batch->status().code == Code::connect_failed);
  }
}

TEST(a_store_that_fills_the_sockets_buffers_arrives_whole) {
  constexpr std::size_t kHuge = 20'000'000;
  std::string value(kHuge, '\0');
  std::mt19937 random(9);
  for (char& c : value) c = static_cast<char>(random());
  const auto compare = [&](int, const std::vector<std::string>& words) {
    return words[2] == value ? "+OK\r\n" : "-ERR wrong bytes\r\n";
  };
  Engine engine(1, 1, kWindow);
  Connector connector(engine, compare);
  const auto batch = std::make_shared<Batch>(Command::set);
  batch->add_key("k");
  batch->add_segment(value.data(), 7);
  batch->add_segment(value.data() + 7, kHuge - 7);
  batch->end_value();
  auto queue = std::make_shared<CompletionQueue>();
  engine.submit(batch, next_id++, queue, retry(0), 0);
  wait_for(*queue, 1);
  CHECK(batch->status().ok() && batch->outcome(0) == Outcome::hit);
}

TEST(a_lookup_stands_behind_no_value) {
  const auto no_values = [](int connection, const std::vector<std::string>& words) {
    return words[0] == "EXISTS" ? answer(connection, words) : std::nullopt;
  };
  for (const Command command : {Command::get, Command::set, Command::unlink}) {
    Engine engine(2, 4, kWindow);
    Connector connector(engine, no_values);
    auto stuck = std::make_shared<CompletionQueue>();
    Call values = make_call(command, 500);
    engine.submit(values.batch, next_id++, stuck, retry(0), 0);
    for (int i = 0; i < 20; ++i) {
      auto queue = std::make_shared<CompletionQueue>();
      Call lookup = make_call(Command::exists, 100);
      engine.submit(lookup.batch, next_id++, queue, retry(0), 0);
      wait_for(*queue, 1);
      check_outcomes(lookup);
    }
    CHECK(engine.batches() == 1);
  }
}

TEST(a_retrieve_does_not_stand_behind_a_store_and_then_stores_go_one_at_a_time) {
  std::atomic<int> stores{0};
  std::atomic<bool> open{false};
  const auto slow = [&](int connection, const std::vector<std::string>& words) {
    if (words[0] == "SET") {
      ++stores;
      while (!open) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return answer(connection, words);
  };
  // Three lanes for values, and a window of less than a value.
  Engine engine(2, 4, {1000, 64, 0});
  Connector connector(engine, slow);
  auto queue = std::make_shared<CompletionQueue>();
  Call first = make_call(Command::get, 1);
  engine.submit(first.batch, next_id++, queue, retry(0), 0);
  wait_for(*queue, 1);
  Call store = make_call(Command::set, 20);
  engine.submit(store.batch, next_id++, queue, retry(0), 0);
  for (int i = 0; i < 20; ++i) {
    auto other = std::make_shared<CompletionQueue>();
    Call get = make_call(Command::get, 10);
    engine.submit(get.batch, next_id++, other, retry(0), 0);
    wait_for(*other, 1);
    check_outcomes(get);
  }
  CHECK(stores == 1);
  open = true;
  wait_for(*queue, 1);
  check_outcomes(store);
  CHECK(stores == 20);
}

TEST(a_retrieve_that_comes_while_every_lane_stores_waits_for_what_is_on_its_way_only) {
  std::atomic<int> stores{0};
  std::atomic<int> stores_before{-1};
  std::atomic<bool> open{false};
  const auto slow = [&](int connection, const std::vector<std::string>& words) {
    if (words[0] == "GET") stores_before = stores.load();
    if (words[0] == "SET") {
      ++stores;
      do {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      } while (!open);
    }
    return answer(connection, words);
  };
  // Two lanes for values, and a window of less than a value: two stores at once on each.
  Engine engine(1, 3, {1000, 64, 0});
  Connector connector(engine, slow);
  auto queue = std::make_shared<CompletionQueue>();
  Call store = make_call(Command::set, 100);
  engine.submit(store.batch, next_id++, queue, retry(0), 0);
  while (stores < 2) std::this_thread::yield();
  Call get = make_call(Command::get, 1);
  engine.submit(get.batch, next_id++, queue, retry(0), 0);
  open = true;
  wait_for(*queue, 2);
  check_outcomes(get);
  check_outcomes(store);
  CHECK(stores == 100 && stores_before >= 2 && stores_before <= 6);
}

// For ThreadSanitizer.
TEST(a_connector_that_is_late_touches_no_descriptor_that_was_given_back) {
  for (int round = 0; round < 50; ++round) {
    Engine engine(1, 2, kWindow);
    std::atomic<bool> started{false};
    std::thread connector([&] {
      for (int i = 0; i < 200; ++i) {
        while (const auto asked = engine.take_connect_request()) {
          const std::uint32_t lane = *asked;
          engine.connect_failed(lane, UINT64_MAX, "refused", 0);
        }
        engine.wake_connector();
        started = true;
      }
    });
    while (!started) std::this_thread::yield();
    engine.close();
    engine.close_fds();
    connector.join();
    CHECK(!engine.take_connect_request());
  }
}

TEST(a_peer_that_closes_each_connection_at_once_uses_up_the_attempts) {
  Engine engine(1, 1, kWindow);
  auto queue = std::make_shared<CompletionQueue>();
  Call call = make_call(Command::exists, 1);
  engine.submit(call.batch, next_id++, queue, retry(2), 0);
  int asked = 0;
  while (queue->next() == std::nullopt) {
    pollfd entries[] = {{engine.connect_event(), POLLIN, 0}, {queue->fd(), POLLIN, 0}};
    CHECK(::poll(entries, 2, 20'000) > 0);
    while (const auto lane = engine.take_connect_request()) {
      CHECK(++asked <= 4);  // the first is free: it may have been a chance
      int ends[2];
      CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
      ::close(ends[1]);
      engine.adopt(*lane, UniqueFd(ends[0]), 5.0, 0.0);
    }
  }
  CHECK(call.batch->status().code == Code::connection_lost);
}

TEST(when_close_returns_every_batch_has_ended_though_others_cancel) {
  for (int round = 0; round < 300; ++round) {
    Engine engine(1, 1, kWindow);
    auto queue = std::make_shared<CompletionQueue>();
    std::vector<Call> calls;
    std::vector<std::uint64_t> ids;
    for (int i = 0; i < 64; ++i) {
      calls.push_back(make_call(Command::exists, 1));
      ids.push_back(next_id++);
      engine.submit(calls.back().batch, ids.back(), queue, retry(0), 0);
    }
    std::atomic<std::size_t> next{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] {
        for (std::size_t at; (at = next++) < ids.size();) engine.cancel(ids[at]);
      });
    }
    while (next < 8 + static_cast<std::size_t>(round) % 40) {
    }
    engine.close();
    const std::size_t left = ids.size() - drain(*queue).size();
    for (std::thread& thread : threads) thread.join();
    CHECK(left == 0);
  }
}

TEST(what_was_lost_is_sent_again_in_its_order) {
  std::mutex mutex;
  std::vector<std::string> again;
  std::atomic<bool> all{false};
  Engine engine(1, 1, kWindow);
  Connector connector(engine, [&](int connection, const std::vector<std::string>& words) {
    if (connection == 0) {
      while (!all) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return std::string(kHangUp);
    }
    std::lock_guard lock(mutex);
    again.push_back(words[1]);
    return std::string(":1\r\n");
  });
  auto queue = std::make_shared<CompletionQueue>();
  std::vector<std::string> names = {"a", "b", "c", "d"};
  for (const std::string& name : names) {
    auto batch = std::make_shared<Batch>(Command::exists);
    batch->add_key(name);
    batch->add_key(name + name);
    engine.submit(batch, next_id++, queue, retry(5), 0);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // until all are on their way
  all = true;
  wait_for(*queue, names.size());
  CHECK(again == std::vector<std::string>({"a", "aa", "b", "bb", "c", "cc", "d", "dd"}));
}

TEST(a_fork_that_takes_its_time_stops_no_call) {
  Engine engine(1, 1, kWindow);
  Connector connector(engine, answer);
  auto queue = std::make_shared<CompletionQueue>();
  Call first = make_call(Command::exists, 1);
  engine.submit(first.batch, next_id++, queue, retry(0), 0);
  wait_for(*queue, 1);
  engine.before_fork();
  Call call = make_call(Command::exists, 1);
  engine.submit(call.batch, next_id++, queue, retry(0), 0);
  wait_for(*queue, 1);
  engine.after_fork_in_parent();
  CHECK(call.batch->status().ok());
}

TEST(a_child_keeps_no_socket_that_a_worker_is_taking) {
  Engine engine(1, 1, kWindow);
  for (int round = 0; round < 300; ++round) {
    auto queue = std::make_shared<CompletionQueue>();
    Call call = make_call(Command::exists, 1);
    engine.submit(call.batch, next_id++, queue, retry(0), 0);
    std::optional<std::uint32_t> lane;
    while (!lane) {
      pollfd entry{engine.connect_event(), POLLIN, 0};
      CHECK(::poll(&entry, 1, 20'000) == 1);
      lane = engine.take_connect_request();
    }
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    std::this_thread::sleep_for(std::chrono::microseconds(200));  // until it sleeps
    engine.adopt(*lane, UniqueFd(ends[0]), 5.0, 0.0);
    const auto until = Clock::now() + std::chrono::nanoseconds(round * 200);
    while (Clock::now() < until) {
    }
    engine.before_fork();
    const pid_t pid = ::fork();
    if (pid == 0) {
      engine.close_fds_after_fork(true);
      ::_exit(::fcntl(ends[0], F_GETFD) == -1 ? 0 : 1);
    }
    engine.after_fork_in_parent();
    int status = -1;
    CHECK(::waitpid(pid, &status, 0) == pid);
    char request[256];
    CHECK(::recv(ends[1], request, sizeof request, 0) > 0);
    CHECK(::send(ends[1], ":1\r\n", 4, 0) == 4);
    wait_for(*queue, 1);
    engine.retire_connections();
    CHECK(::recv(ends[1], request, sizeof request, 0) == 0);
    ::close(ends[1]);
    CHECK(status == 0);
  }
}

int main(int count, char** names) {
  return check::run(count, names);
}
