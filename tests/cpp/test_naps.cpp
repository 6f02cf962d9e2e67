// While a worker looks by the clock for what a server on its machine sends, all else goes on.
#include <algorithm>
#include <atomic>
#include <chrono>
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

constexpr std::size_t kLarge = 1 << 20;

// A value is its key's first letter, over and over.
std::optional<std::string> tell(const std::vector<std::string>& words) {
  if (words[0] == "GET") return bulk(std::string(kLarge, words[1][0]));
  return words[0] == "SET" ? "+OK\r\n" : ":1\r\n";
}

// One worker for all: nobody else would do what it does not.
struct Local {
  explicit Local(Answer answer, double stall_seconds = 5.0)
      : connector(engine, std::move(answer), SIZE_MAX, stall_seconds) {
    connector.use_tcp();
  }
  Engine engine{1, 4, {2 << 20, 64, 0}};
  Connector connector;
};

bool is_right(const Call& call, char letter) {
  return std::all_of(call.memory.begin(), call.memory.end(), [&](const std::string& value) {
    return value.find_first_not_of(letter) == std::string::npos;
  });
}

}  // namespace

TEST(loads_are_right_and_lookups_stores_and_cancellations_go_on) {
  Local local([](int, const auto& words) { return tell(words); });
  std::atomic<bool> ended{false};
  std::thread others([&] {
    while (!ended) {
      Call lookup(Command::exists, 10);
      lookup.submit(local.engine);
      CHECK(lookup.wait() == Code::ok);
      Call store(Command::set, 1, "s", kLarge);
      store.submit(local.engine);
      CHECK(store.wait() == Code::ok);
      Call given_up(Command::get, 20, "g", kLarge);
      given_up.submit(local.engine);
      local.engine.cancel(given_up.id);
      CHECK(given_up.wait() == Code::cancelled || is_right(given_up, 'g'));
    }
  });
  for (int i = 0; i < 20; ++i) {
    const char letter = static_cast<char>('a' + i % 4);
    Call load(Command::get, 20, std::string(1, letter), kLarge);
    load.submit(local.engine);
    CHECK(load.wait() == Code::ok);
    CHECK(is_right(load, letter));
  }
  ended = true;
  others.join();
}

TEST(a_server_that_stops_in_the_middle_is_noticed) {
  for (const bool by_deadline : {false, true}) {
    std::atomic<int> asked{0};
    Local local(
        [&](int, const auto& words) -> std::optional<std::string> {
          if (++asked > 40) return std::nullopt;
          return tell(words);
        },
        by_deadline ? 0 : 0.2);
    Call load(Command::get, 60, "a", kLarge);
    load.submit(local.engine, by_deadline ? 0.3 : 0);
    const Code code = load.wait();
    CHECK(code == (by_deadline ? Code::timed_out : Code::stalled));
  }
}

TEST(an_engine_can_be_closed_while_much_is_on_its_way) {
  for (int i = 0; i < 10; ++i) {
    Local local([](int, const auto& words) { return tell(words); });
    Call load(Command::get, 200, "a", kLarge);
    load.submit(local.engine);
    std::this_thread::sleep_for(std::chrono::milliseconds(5 * i));
    local.engine.close();
    const Code code = load.wait();
    CHECK(code == Code::closed || code == Code::ok);
  }
}

int main(int count, char** names) {
  return check::run(count, names);
}
