// A server whose allocator pays for large replies is asked for smaller ranges.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

constexpr std::uint64_t kRange = std::uint64_t{64} << 10;
constexpr std::size_t kSmall = 100'000;
constexpr std::size_t kLarge = 4 * kRange;

struct Server {
  explicit Server(std::string about_memory, bool fits = true)
      : Server(std::move(about_memory), {1 << 20, 64, kRange, 1 << 19, fits}) {}
  Server(std::string about_memory, Window window)
      : info(std::move(about_memory)), engine(2, 4, window) {}

  std::optional<std::string> answer(const std::vector<std::string>& words) {
    if (words[0] == "INFO") {
      if (words[1] == "server") return bulk("# Server\r\nrun_id:0123abcd\r\n");
      ++asked;
      return info;
    }
    if (words[0] == "EXEC") return "*0\r\n";
    if (words[0] != "GETRANGE") return "+OK\r\n";
    const auto first = std::stoull(words[2]);
    const auto bytes = std::min<std::uint64_t>(std::stoull(words[3]) + 1, size) - first;
    std::uint64_t most = largest;
    while (bytes > most && !largest.compare_exchange_weak(most, bytes)) {
    }
    return bulk(std::string(bytes, 'r'));
  }

  // The largest range that was asked for, of 20 values.
  std::uint64_t read(std::size_t bytes, bool immutable) {
    largest = 0;
    size = bytes;
    Call call(Command::get, 20, "k", bytes);
    if (immutable) call.batch->promise_immutable();
    call.submit(engine);
    CHECK(call.wait() == Code::ok);
    for (const std::string& value : call.memory) CHECK(value == std::string(bytes, 'r'));
    return largest;
  }

  const std::string info;
  std::atomic<int> asked{0};
  std::atomic<std::uint64_t> largest{0};
  std::atomic<std::size_t> size{0};
  Engine engine;
  Connector connector{engine, [this](int, const auto& words) { return answer(words); }};
};

const std::string kLibc = bulk("# Memory\r\nused_memory:1\r\nmem_allocator:libc\r\nlazyfree:0\r\n");

}  // namespace

TEST(small_values_are_read_in_parts_if_the_allocator_is_the_c_librarys) {
  for (const bool immutable : {false, true}) {
    Server server(kLibc);
    server.read(kSmall, immutable);
    CHECK(server.read(kSmall, immutable) <= kRange / 2 + RangedValue::kEndBytes);
    CHECK(server.read(kLarge, immutable) >= kRange);
    CHECK(server.asked == 1);
  }
}

TEST(if_it_is_another_or_unknown_they_are_read_in_ranges) {
  for (const std::string& info :
       {bulk("# Memory\r\nmem_allocator:jemalloc-5.3.0\r\n"), bulk("mem_allocator:libc\r\n"),
        bulk(""), bulk(std::string(100'000, 'x')), std::string("$-1\r\n"), std::string("+OK\r\n"),
        std::string(":1\r\n"), std::string("-NOPERM this user may not run 'info'\r\n")}) {
    Server server(info);
    for (int i = 0; i < 3; ++i) CHECK(server.read(kSmall, true) >= kRange);
    CHECK(server.asked == 1);
  }
}

TEST(who_hangs_up_on_the_question_or_answers_nonsense_does_so_once_and_at_nobodys_cost) {
  for (const std::string& info :
       {std::string(kHangUp), std::string("*1\r\n$1\r\nx\r\n"), std::string("?\r\n"),
        std::string("$9\r\nmem_").append(kHangUp)}) {
    for (const bool immutable : {false, true}) {
      Server server(info);
      for (int i = 0; i < 3; ++i) CHECK(server.read(kSmall, immutable) >= kRange);
      CHECK(server.asked == 1);
    }
  }
}

TEST(a_window_of_one_byte_is_enough) {
  Server server(kLibc, Window{1, 64, kRange, 1, true});
  for (int i = 0; i < 3; ++i) server.read(kSmall, i % 2 == 0);
}

TEST(who_has_chosen_a_length_gets_it_and_large_values_raise_no_question) {
  Server chosen(kLibc, false);
  for (int i = 0; i < 2; ++i) CHECK(chosen.read(kSmall, true) >= kRange);
  CHECK(chosen.asked == 0);
  Server large(kLibc);
  large.read(kLarge, true);
  CHECK(large.asked == 0);
}

int main(int count, char** names) {
  return check::run(count, names);
}
