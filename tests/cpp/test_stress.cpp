// Everything at once: callers on several threads that cancel and time out, connections that break,
// are refused, stall or are retired, and a close in the middle. For ThreadSanitizer above all: a
// caller writes to its memory as soon as its batch is back, so a worker that still touches it
// races.
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
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

constexpr std::size_t kSmall = 700;
constexpr std::size_t kLarge = 60'000;

std::size_t size_of(std::string_view key) {
  return key.ends_with('L') ? kLarge : kSmall;
}

char letter_of(std::string_view key) {
  return static_cast<char>('a' + std::hash<std::string_view>()(key) % 26);
}

// A server on which the values of keys with an "m" are missing, with an "e" refused, with an "s" of
// another size; now and then it says nothing more.
class Server {
 public:
  std::optional<std::string> operator()(int, const std::vector<std::string>& words) {
    if (one_in(2000)) return std::nullopt;
    const std::string& command = words[0];
    if (words.size() < 2) return command == "EXEC" ? "*0\r\n" : "+OK\r\n";
    const std::string& key = words[1];
    if (command == "WATCH") return "+OK\r\n";
    if (key[0] == 'e') return "-WRONGTYPE no string\r\n";
    if (command == "EXISTS" || command == "UNLINK") return key[0] == 'm' ? ":0\r\n" : ":1\r\n";
    if (command == "SET") {
      const bool right = words[2] == std::string(size_of(key), letter_of(key));
      return right ? "+OK\r\n" : "-ERR wrong bytes\r\n";
    }
    if (command == "GETRANGE") {
      std::string value;
      if (key[0] != 'm') value.assign(size_of(key) + (key[0] == 's' ? 3 : 0), letter_of(key));
      const std::size_t begin = std::min(std::stoul(words[2]), value.size());
      const std::size_t end = std::min(std::stoul(words[3]) + 1, value.size());
      return bulk(std::string_view(value).substr(begin, end - std::min(begin, end)));
    }
    if (key[0] == 'm') return "$-1\r\n";
    return bulk(std::string(size_of(key) + (key[0] == 's' ? 3 : 0), letter_of(key)));
  }

 private:
  bool one_in(unsigned count) {
    std::lock_guard lock(mutex_);
    return random_() % count == 0;
  }

  std::mutex mutex_;
  std::mt19937 random_{7};
};

struct Call {
  Call(Command command, std::size_t keys, std::mt19937& random)
      : batch(std::make_shared<Batch>(command)), id(next_id++) {
    memory.resize(keys);
    names.resize(keys);
    for (std::size_t i = 0; i < keys; ++i) {
      names[i] = "kkkkkkmes"[random() % 9] + std::to_string(random() % 100) +
                 (random() % 8 == 0 ? "L" : "");
      batch->add_key(names[i]);
      if (command != Command::get && command != Command::set) continue;
      const std::size_t size = size_of(names[i]);
      memory[i].assign(size, command == Command::set ? letter_of(names[i]) : '\xa5');
      batch->add_segment(memory[i].data(), size / 2);
      batch->add_segment(memory[i].data() + size / 2, size - size / 2);
      batch->end_value();
    }
  }

  void check() const {
    for (std::size_t i = 0; i < names.size(); ++i) {
      const char kind = names[i][0];
      Outcome right = kind == 'e' ? Outcome::refused : Outcome::hit;
      if (kind == 'm' && batch->command() != Command::set) right = Outcome::miss;
      if (kind == 's' && batch->command() == Command::get) right = Outcome::size_mismatch;
      CHECK(batch->outcome(i) == right);
      if (batch->command() == Command::get && right == Outcome::hit) {
        CHECK(memory[i].find_first_not_of(letter_of(names[i])) == std::string::npos);
      }
    }
  }

  std::shared_ptr<Batch> batch;
  std::uint64_t id;
  std::vector<std::string> names;
  std::vector<std::string> memory;
};

// Submits, and gets everything back, until the engine is closed; after so many turns it does so.
int call_until_closed(Engine& engine, unsigned seed, int turns,
                      std::atomic<std::uint64_t>& newest) {
  std::mt19937 random(seed);
  int right = 0;
  constexpr std::array kCommands = {Command::get, Command::get, Command::set, Command::exists,
                                    Command::unlink};
  for (bool open = true; open; --turns) {
    if (turns == 0) engine.close();
    auto queue = std::make_shared<CompletionQueue>();
    std::vector<Call> calls;
    std::size_t accepted = 0;
    const std::size_t count = 1 + random() % 4;
    calls.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      Call& call = calls.emplace_back(kCommands[random() % 5], 1 + random() % 30, random);
      if (random() % 5 == 0) call.batch->forbid_repeat();
      if (random() % 3 == 0) call.batch->promise_immutable();
      const double seconds = random() % 3 == 0 ? 1e-5 * static_cast<double>(random() % 2000) : 0;
      open = engine.submit(call.batch, call.id, queue, retry(random() % 2 ? -1 : 0), seconds).ok();
      if (!open) break;
      newest = call.id;
      ++accepted;
      if (random() % 4 == 0) engine.cancel(call.id);
    }
    const auto done = wait_for(*queue, accepted);
    for (std::size_t i = 0; i < accepted; ++i) {
      CHECK(done.contains(calls[i].id));
      if (calls[i].batch->status().ok()) {
        calls[i].check();
        ++right;
      }
      for (std::string& value : calls[i].memory) std::memset(value.data(), '\x5a', value.size());
    }
  }
  return right;
}

}  // namespace

TEST(whatever_happens_every_batch_comes_back_once_and_right) {
  std::atomic<int> right{0};
  std::atomic<int> failed{0};
  for (unsigned round = 0; round < 12; ++round) {
    Engine engine(1 + round % 3, 1 + round % 5, Window{1u << (10 + round), 3 + round, 4096});
    Server server;
    Connector connector(engine, std::ref(server), 50 + 100 * (round % 4), 0.05);
    std::atomic<std::uint64_t> newest{0};
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
    for (unsigned caller = 0; caller < 3; ++caller) {
      threads.emplace_back([&, caller, seed = 10 * round + caller] {
        try {
          right += call_until_closed(engine, seed, caller == 0 ? 50 : -1, newest);
        } catch (const std::exception& error) {
          std::printf("%s\n", error.what());
          ++failed;
        }
      });
    }
    std::thread nuisance([&] {
      std::mt19937 random(round);
      while (!stop) {
        engine.cancel(newest - random() % 4);
        if (random() % 8 == 0) engine.retire_connections();
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 2000));
      }
    });
    for (std::thread& thread : threads) thread.join();
    stop = true;
    nuisance.join();
    CHECK(engine.batches() == 0);
  }
  CHECK(failed == 0 && right > 500);
}

int main(int count, char** names) {
  return check::run(count, names);
}
