// Large values that several connections, of several workers, read together.
#include <malloc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

// What connect_all() reads.
constexpr std::string_view kSmallKey = "small";

// A server whose keys, but that one, hold one letter over and over, which changes now and then.
class Store {
 public:
  explicit Store(std::size_t bytes, unsigned changes_one_in = 0)
      : bytes_(bytes), changes_one_in_(changes_one_in) {}

  std::optional<std::string> operator()(int connection, const std::vector<std::string>& words) {
    std::lock_guard lock(mutex_);
    ++calls_[words[0]];
    ++by_connection_[words[0]][connection];
    if (changes_one_in_ > 0 && random_() % changes_one_in_ == 0) ++version_;
    const char letter = static_cast<char>('a' + version_ % 26);
    if (words[0] == "GET") return bulk(std::string(words[1] == kSmallKey ? 100 : bytes_, letter));
    if (words[0] == "GETRANGE") {
      const std::size_t begin = std::stoul(words[2]);
      const std::size_t end = std::min(std::stoul(words[3]) + 1, bytes_);
      return bulk(std::string(end - begin, letter));
    }
    if (words[0] == "INFO") return bulk("# Server\r\nrun_id:0123abcd\r\nport:1\r\n");
    auto& watched = watched_[connection];
    if (words[0] == "WATCH") {
      if (!watched) watched = version_;
      return "+OK\r\n";
    }
    if (words[0] == "EXEC") {
      return std::exchange(watched, std::nullopt).value_or(version_) == version_ ? "*0\r\n"
                                                                                 : "*-1\r\n";
    }
    if (words[0] == "UNWATCH") watched.reset();
    return words[0] == "EXISTS" ? ":1\r\n" : "+OK\r\n";
  }

  int calls(const std::string& command) {
    std::lock_guard lock(mutex_);
    return calls_[command];
  }
  std::size_t connections_that_sent(const std::string& command) {
    std::lock_guard lock(mutex_);
    return by_connection_[command].size();
  }
  void forget() {
    std::lock_guard lock(mutex_);
    calls_.clear();
    by_connection_.clear();
  }

 private:
  const std::size_t bytes_;
  const unsigned changes_one_in_;
  std::mutex mutex_;
  std::mt19937 random_{5};
  unsigned version_ = 0;
  std::map<int, std::optional<unsigned>> watched_;
  std::map<std::string, int> calls_;
  std::map<std::string, std::map<int, int>> by_connection_;
};

// Each connection leads to a server of its own, and they hold different versions.
struct Strangers {
  std::optional<std::string> operator()(int connection, const std::vector<std::string>& words) {
    const char letter = static_cast<char>('a' + connection);
    if (words[0] == "INFO") {
      if (anonymous) return "-NOPERM this user has no permissions to run the 'info' command\r\n";
      return bulk("# Server\r\nrun_id:" + std::string(40, letter) + "\r\n");
    }
    if (words[0] == "GETRANGE") {
      const std::size_t begin = std::stoul(words[2]);
      return bulk(std::string(std::min(std::stoul(words[3]) + 1, bytes) - begin, letter));
    }
    if (words[0] == "GET") return bulk(std::string(100, letter));
    return words[0] == "EXEC" ? "*0\r\n" : words[0] == "EXISTS" ? ":1\r\n" : "+OK\r\n";
  }
  std::size_t bytes;
  bool anonymous;
};

struct Get {
  Get(std::size_t keys, std::size_t bytes, bool immutable, std::string_view name = {})
      : batch(std::make_shared<Batch>(Command::get)), id(next_id++) {
    memory.assign(keys, std::string(bytes, '\xa5'));
    if (immutable) batch->promise_immutable();
    for (std::size_t i = 0; i < keys; ++i) {
      batch->add_key(name.empty() ? "k" + std::to_string(i) : std::string(name));
      batch->add_segment(memory[i].data(), bytes / 3);
      batch->add_segment(memory[i].data() + bytes / 3, bytes - bytes / 3);
      batch->end_value();
    }
  }
  bool right() const {
    return std::all_of(memory.begin(), memory.end(), [](const std::string& value) {
      return value[0] != '\xa5' && value.find_first_not_of(value[0]) == std::string::npos;
    });
  }

  std::shared_ptr<Batch> batch;
  std::uint64_t id;
  std::vector<std::string> memory;
};

// Has all connections for values made, as reading many does.
void connect_all(Engine& engine, const Connector& connector, int connections) {
  while (connector.asked() < connections) {
    auto queue = std::make_shared<CompletionQueue>();
    Get warm(64, 100, false, kSmallKey);
    engine.submit(warm.batch, warm.id, queue, retry(-1), 0);
    wait_for(*queue, 1);
  }
}

constexpr std::uint64_t kRange = 16 << 10;
constexpr Window kWindow{16 << 10, 64, kRange};
constexpr std::size_t kLarge = 4 << 20;

}  // namespace

TEST(workers_that_sleep_are_woken_to_help) {
  for (const bool immutable : {false, true}) {
    Store store(kLarge);
    Engine engine(3, 4, kWindow);  // a lane for lookups, and one with each worker
    Connector connector(engine, std::ref(store));
    connect_all(engine, connector, 3);
    store.forget();
    auto queue = std::make_shared<CompletionQueue>();
    Get get(1, kLarge, immutable);
    engine.submit(get.batch, get.id, queue, retry(0), 0);
    wait_for(*queue, 1);
    CHECK(get.batch->outcome(0) == Outcome::hit && get.right());
    CHECK(store.connections_that_sent("GETRANGE") > 1);
    CHECK(store.calls("WATCH") == store.calls("EXEC") + store.calls("UNWATCH"));
  }
}

TEST(a_value_that_is_complete_does_not_wait_for_a_helper_whose_watch_is_not_answered) {
  Store store(kLarge);
  std::atomic<int> owner{-1};
  const auto answer = [&](int connection, const std::vector<std::string>& words) {
    if (words[0] == "WATCH") {
      int nobody = -1;
      owner.compare_exchange_strong(nobody, connection);
      if (owner != connection) return std::optional<std::string>();
    }
    return store(connection, words);
  };
  Engine engine(2, 3, kWindow);
  Connector connector(engine, answer);
  connect_all(engine, connector, 2);
  const auto start = Clock::now();
  auto queue = std::make_shared<CompletionQueue>();
  Get get(1, kLarge, false);
  engine.submit(get.batch, get.id, queue, retry(0), 0);
  wait_for(*queue, 1);
  CHECK(get.batch->status().ok() && get.right());
  CHECK(Clock::now() - start < std::chrono::seconds(4));  // before that connection has stalled
}

TEST(servers_behind_one_name_do_not_share_a_snapshot) {
  for (const bool anonymous : {false, true}) {
    Engine engine(3, 4, kWindow);
    Connector connector(engine, Strangers{kLarge, anonymous});
    connect_all(engine, connector, 3);
    for (int i = 0; i < 20; ++i) {
      auto queue = std::make_shared<CompletionQueue>();
      Get get(1, kLarge, false);
      engine.submit(get.batch, get.id, queue, retry(0), 0);
      wait_for(*queue, 1);
      CHECK(get.batch->outcome(0) == Outcome::hit && get.right());
    }
  }
}

TEST(nobody_connects_to_help_with_what_is_over) {
  // Without retries; and with one, in whose back-off nothing can be done.
  for (const double delay : {0.0, 60.0}) {
    Store store(kLarge);
    Connector* connector = nullptr;
    const auto answer = [&](int connection, const std::vector<std::string>& words) {
      if (words[0] == "WATCH") connector->refuse();  // the server goes, and stays away
      return store(connection, words);
    };
    Engine engine(1, 3, kWindow);
    Connector made(engine, answer, 6);
    connector = &made;
    auto queue = std::make_shared<CompletionQueue>();
    Get get(1, kLarge, false);
    engine.submit(get.batch, get.id, queue, retry(delay > 0 ? 1 : 0, delay), 0.3);
    wait_for(*queue, 1);
    CHECK(!get.batch->status().ok());
    CHECK(connector->asked() < 20);
  }
}

TEST(shared_values_are_right_and_complete_exactly_once_whatever_happens) {
  std::mt19937 random(11);
  int shared = 0;
  int hits = 0;
  for (int round = 0; round < 60; ++round) {
    const bool immutable = round % 3 == 0;
    const bool losses = round % 2 == 0;
    const std::size_t bytes = 2049 + random() % 300'000;
    Store store(bytes, immutable || random() % 2 == 0 ? 0 : 1u << (random() % 9));
    const std::size_t workers = 2 + random() % 3;
    Engine engine(workers, workers + random() % 4,
                  Window{1 + random() % 80'000, 1 + random() % 64, 400 + random() % 40'000});
    Connector connector(engine, std::ref(store), losses ? 20 + random() % 200 : SIZE_MAX);
    for (int turn = 0; turn < 40; ++turn) {
      auto queue = std::make_shared<CompletionQueue>();
      std::vector<Get> gets;
      for (unsigned i = 0; i < 1 + random() % 3; ++i) {
        gets.emplace_back(random() % 4 != 0 ? 1 : random() % 6 + 1, bytes, immutable);
      }
      for (const Get& get : gets) {
        const double seconds = random() % 4 == 0 ? 1e-5 * static_cast<double>(random() % 200) : 0;
        engine.submit(get.batch, get.id, queue, retry(-1), seconds);
      }
      const auto until = Clock::now() + std::chrono::microseconds(random() % 1000);
      while (Clock::now() < until) {
      }
      if (random() % 4 == 0) engine.cancel(gets[0].id);
      if (random() % 50 == 0) engine.retire_connections();
      wait_for(*queue, gets.size());
      for (Get& get : gets) {
        const Code code = get.batch->status().code;
        CHECK(code == Code::ok || code == Code::cancelled || code == Code::timed_out);
        if (code == Code::ok) {
          CHECK(get.right());
          ++hits;
        } else {
          for (std::string& value : get.memory) value.assign(bytes, '\x5a');
        }
      }
      // Whoever still wrote would have done so by now.
      Get next(2, bytes, immutable);
      auto again = std::make_shared<CompletionQueue>();
      engine.submit(next.batch, next.id, again, retry(-1), 0);
      wait_for(*again, 1);
      CHECK(next.right());
      for (const Get& get : gets) {
        if (get.batch->status().ok()) continue;
        for (const std::string& value : get.memory) {
          CHECK(value.find_first_not_of('\x5a') == std::string::npos);
        }
      }
    }
    if (store.connections_that_sent("GETRANGE") > 1) ++shared;
    CHECK(engine.batches() == 0);
  }
  CHECK(shared > 30 && hits > 1000);
}

int main(int count, char** names) {
  // Most of its time would go by in page faults: the servers make and drop large replies.
  ::mallopt(M_MMAP_THRESHOLD, 64 << 20);
  ::mallopt(M_TRIM_THRESHOLD, 1 << 30);
  return check::run(count, names);
}
