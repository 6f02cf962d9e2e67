// Connections that help to read a value in ranges, and what becomes of it if one fails: nothing of
// it is missing, and nobody waits for it.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

thread_local bool no_memory = false;

}  // namespace

// GCC does not see that both are ours.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
void* operator new(std::size_t size) {
  void* const memory = no_memory ? nullptr : std::malloc(size);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace {

constexpr std::size_t kBytes = 40'000;
constexpr std::size_t kLarge = 4 << 20;

std::string range(const std::vector<std::string>& words, std::size_t bytes) {
  const std::size_t begin = std::stoul(words[2]);
  return bulk(std::string(std::min(std::stoul(words[3]) + 1, bytes) - begin, 'x'));
}

// Has a session send what it wants, and answers.
void serve(Session& session) {
  std::string in;
  while (session.has_unsent()) {
    std::size_t size = 0;
    for (const iovec& part : session.prepare_write()) {
      in.append(static_cast<const char*>(part.iov_base), part.iov_len);
      size += part.iov_len;
    }
    session.commit_write(size);
  }
  std::string out;
  while (const auto words = take_request(in)) {
    if ((*words)[0] == "GETRANGE") {
      out += range(*words, kBytes);
    } else {
      out += (*words)[0] == "EXEC" ? "*0\r\n" : "+OK\r\n";
    }
  }
  std::string_view left = out;
  while (!left.empty()) {
    std::size_t moved = 0;
    for (const iovec& part : session.prepare_read()) {
      const std::size_t taken = std::min(part.iov_len, left.size());
      std::copy_n(left.data(), taken, static_cast<char*>(part.iov_base));
      left.remove_prefix(taken);
      moved += taken;
    }
    CHECK(session.commit_read(moved).ok());
  }
}

// One value, an owner and a helper that has joined.
struct Value {
  explicit Value(bool snapshot)
      : ranges(std::make_shared<RangedValue>(kBytes, 4000, snapshot)),
        operation{.command = Command::get,
                  .ticket = {this, 0},
                  .key = key,
                  .value = {&segment, 1},
                  .ranges = ranges} {
    owner.push(operation);
    owner.pump(1);
    if (snapshot) serve(owner);  // its WATCH
    CHECK(ranges->join());
    operation.helping = true;
  }
  bool whole() const { return memory.find('.') == std::string::npos; }

  std::string key = std::string(100, 'k');
  std::string memory = std::string(kBytes, '.');
  Segment segment{reinterpret_cast<std::byte*>(memory.data()), kBytes};
  std::shared_ptr<RangedValue> ranges;
  Operation operation;
  Session owner;
  Session helper;
};

// Of a server that is known by its id.
std::optional<std::string> answer(const std::vector<std::string>& words) {
  if (words[0] == "INFO") return bulk("# Server\r\nrun_id:0123abcd\r\n");
  if (words[0] == "GET") return bulk(std::string(words[1] == "warm" ? 100 : kLarge, 'x'));
  if (words[0] == "GETRANGE") return range(words, kLarge);
  return words[0] == "EXEC" ? "*0\r\n" : "+OK\r\n";
}

struct Get {
  Get(Engine& engine, const std::string& key, std::size_t bytes, std::size_t keys = 1)
      : memory(keys, std::string(bytes, '.')) {
    for (std::string& value : memory) {
      batch->add_key(key);
      batch->add_segment(value.data(), value.size());
      batch->end_value();
    }
    CHECK(engine.submit(batch, next_id++, queue, retry(5), 0).ok());
  }
  Code wait() {
    wait_for(*queue, 1);
    return batch->status().code;
  }

  std::shared_ptr<Batch> batch = std::make_shared<Batch>(Command::get);
  std::shared_ptr<CompletionQueue> queue = std::make_shared<CompletionQueue>();
  std::vector<std::string> memory;
};

// Two workers read a large value. The connection of who helps never answers its WATCH, and then the
// owner's is lost, or is not.
void share_with_silent_helper(bool owner_lost) {
  std::atomic<int> owner{-1};
  std::atomic<bool> asked{false};  // the helper
  std::atomic<bool> over{false};
  Engine engine(2, 3, Window{16 << 10, 64, 16 << 10});
  Connector connector(
      engine,
      [&](int connection, const auto& words) -> std::optional<std::string> {
        if (words[0] == "WATCH" && !over) {
          int nobody = -1;
          owner.compare_exchange_strong(nobody, connection);
          if (owner != connection) {
            asked = true;
            return std::nullopt;
          }
        }
        if (words[0] == "GETRANGE" && !over) {
          // Time for both to fall asleep over it.
          std::this_thread::sleep_for(std::chrono::milliseconds(asked ? 20 : 1));
          over = asked.load();
          if (over && owner_lost) return std::string(kHangUp);
        }
        return answer(words);
      },
      SIZE_MAX, 0.0);  // no stall time-out
  for (int i = 0; i < 20; ++i) CHECK(Get(engine, "warm", 100, 64).wait() == Code::ok);
  Get get(engine, "k", kLarge);
  CHECK(get.wait() == Code::ok && get.batch->outcome(0) == Outcome::hit);
  CHECK(get.memory[0] == std::string(kLarge, 'x'));
  CHECK(asked);
  // Nor does anybody who comes later stand behind that WATCH.
  for (int i = 0; i < 6; ++i) CHECK(Get(engine, "warm", 100).wait() == Code::ok);
}

}  // namespace

TEST(a_range_that_could_not_be_asked_for_is_missed) {
  int failures = 0;
  // How many stand before it decides what must grow.
  for (int before = 0; before < 40; ++before) {
    Value value(false);
    for (int i = 0; i < before; ++i) {
      value.helper.push({.command = Command::exists, .ticket = {&failures, 0}, .key = "other"});
    }
    value.helper.push(value.operation);
    no_memory = true;
    try {
      value.helper.pump(1);
      no_memory = false;
      continue;
    } catch (const std::bad_alloc&) {
      no_memory = false;
    }
    ++failures;
    value.helper.reset({Code::internal_error, "no memory"}, false);
    while (value.owner.completed().empty()) {
      value.owner.pump(1 << 20);
      serve(value.owner);
    }
    CHECK(value.owner.completed()[0].outcome == Outcome::lost || value.whole());
  }
  CHECK(failures > 0);
}

TEST(who_only_meant_to_help_takes_no_attempt_from_a_whole_value) {
  Value value(true);
  value.helper.push(value.operation);
  value.helper.pump(1 << 20);
  value.owner.pump(1 << 20);
  serve(value.owner);
  CHECK(value.whole() && value.owner.completed().empty());
  const auto& lost = value.helper.reset({Code::connection_lost, "reset"}, true);
  CHECK(lost.size() == 1 && !lost[0].counted);
}

TEST(a_helper_that_waits_for_its_watch_does_not_wait_for_it_once_the_value_is_lost) {
  share_with_silent_helper(true);
}

TEST(a_watch_that_nobody_needs_any_more_keeps_nobody) {
  share_with_silent_helper(false);
}

TEST(nobody_connects_without_end_to_help_where_each_connection_is_closed_at_once) {
  Engine engine(1, 3, Window{16 << 10, 64, 16 << 10});
  auto batch = std::make_shared<Batch>(Command::get);
  std::string memory(kLarge, '.');
  batch->add_key("k");
  batch->add_segment(memory.data(), memory.size());
  batch->end_value();
  auto queue = std::make_shared<CompletionQueue>();
  CHECK(engine.submit(batch, next_id++, queue, retry(0), 1.5).ok());
  std::thread owner;
  int asked = 0;
  while (!queue->next()) {
    pollfd entries[] = {{engine.connect_event(), POLLIN, 0}, {queue->fd(), POLLIN, 0}};
    CHECK(::poll(entries, 2, 20'000) > 0);
    while (const auto lane = engine.take_connect_request()) {
      int ends[2];
      CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
      if (asked++ == 0) {  // silent after its WATCH
        owner = std::thread([fd = ends[1]] {
          const auto silent = [](int, const auto& words) -> std::optional<std::string> {
            if (words[0] == "GETRANGE") return std::nullopt;
            return answer(words);
          };
          ::serve(UniqueFd(fd), 0, silent, SIZE_MAX);
        });
      } else {
        ::close(ends[1]);
      }
      engine.adopt(*lane, UniqueFd(ends[0]), 0, 0);
    }
  }
  CHECK(asked <= 10);
  engine.close();
  owner.join();
}

int main(int count, char** names) {
  return check::run(count, names);
}
