// A session without a socket: give it the peer's bytes in any pieces, look where they land.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.hpp"
#include "session.hpp"

using namespace fastkv;

namespace {

// A caller's memory for one value, in parts, poisoned.
struct Memory {
  explicit Memory(std::vector<std::size_t> sizes) {
    for (const std::size_t size : sizes) parts.emplace_back(size, '\xa5');
    for (std::string& part : parts) {
      segments.push_back({reinterpret_cast<std::byte*>(part.data()), part.size()});
    }
  }
  explicit Memory(std::size_t size) : Memory(std::vector<std::size_t>{size}) {}
  Memory(const Memory&) = delete;

  std::string text() const {
    std::string all;
    for (const std::string& part : parts) all += part;
    return all;
  }
  bool poisoned() const { return text().find_first_not_of('\xa5') == std::string::npos; }

  std::vector<std::string> parts;
  std::vector<Segment> segments;
};

int owner_a;
int owner_b;

Operation get(std::string_view key, const Memory& memory, void* owner = &owner_a,
              std::uint32_t index = 0) {
  return {.command = Command::get, .ticket = {owner, index}, .key = key, .value = memory.segments};
}

Operation plain(Command command, std::string_view key, std::uint32_t index = 0) {
  return {.command = command, .ticket = {&owner_a, index}, .key = key};
}

// Everything the session wants to send, at most `most` bytes a write.
std::string sent(Session& session, std::size_t most = 1 << 20) {
  std::string out;
  while (session.has_unsent()) {
    std::size_t left = most;
    for (const iovec& part : session.prepare_write()) {
      const std::size_t taken = std::min(left, part.iov_len);
      out.append(static_cast<const char*>(part.iov_base), taken);
      left -= taken;
    }
    session.commit_write(most - left);
  }
  return out;
}

// Feeds what the peer says, at most `most` bytes a read.
Status feed(Session& session, std::string_view bytes, std::size_t most = 1 << 20) {
  while (!bytes.empty()) {
    std::size_t moved = 0;
    for (const iovec& part : session.prepare_read()) {
      const std::size_t taken = std::min({part.iov_len, bytes.size(), most - moved});
      std::memcpy(part.iov_base, bytes.data(), taken);
      bytes.remove_prefix(taken);
      moved += taken;
    }
    CHECK(moved > 0);
    if (Status status = session.commit_read(moved); !status.ok()) return status;
  }
  return {};
}

std::vector<Completed> completed(Session& session) {
  return std::exchange(session.completed(), {});
}

std::string bulk(std::string_view value) {
  return "$" + std::to_string(value.size()) + "\r\n" + std::string(value) + "\r\n";
}

}  // namespace

TEST(a_value_lands_in_its_memory_however_the_stream_is_cut) {
  const std::string value(20'000, 'v');
  for (const std::size_t most : {1, 2, 3, 7, 100, 4096, 1 << 20}) {
    Session session;
    Memory first(value.size());
    Memory second({5, 0, 7, value.size() - 12});
    Memory third(3);
    session.push(get("a", first, &owner_a, 0));
    session.push(get("b", second, &owner_a, 1));
    session.push(get("c", third, &owner_a, 2));
    CHECK(session.outstanding_bytes() == 2 * value.size() + 3);
    CHECK(sent(session, most) ==
          "*2\r\n$3\r\nGET\r\n$1\r\na\r\n*2\r\n$3\r\nGET\r\n$1\r\nb\r\n*2\r\n$3\r\nGET\r\n$"
          "1\r\nc\r\n");
    CHECK(feed(session, bulk(value) + bulk(value) + bulk("xyz"), most).ok());
    const auto done = completed(session);
    CHECK(done.size() == 3);
    for (const Completed& one : done) CHECK(one.outcome == Outcome::hit);
    CHECK(done[1].ticket.index == 1);
    CHECK(first.text() == value && second.text() == value && third.text() == "xyz");
    CHECK(session.requests() == 0 && session.outstanding_bytes() == 0);
  }
}

TEST(no_byte_of_a_large_body_is_copied_when_reads_come_whole) {
  Session session;
  Memory first(100'000);
  Memory second(100'000);
  session.push(get("a", first));
  session.push(get("b", second));
  sent(session);
  const std::string stream = bulk(std::string(100'000, 'x')) + bulk(std::string(100'000, 'y'));
  // Reads as the socket would do them: the head alone, then body + CRLF + the next head.
  CHECK(session.prepare_read().size() == 1);
  CHECK(session.prepare_read()[0].iov_len == 9);  // $100000\r\n
  CHECK(feed(session, stream.substr(0, 9)).ok());
  const auto target = session.prepare_read();
  CHECK(target.size() == 2);
  CHECK(target[0].iov_base == first.parts[0].data() && target[0].iov_len == 100'000);
  CHECK(target[1].iov_len == 2 + 9);
  CHECK(feed(session, stream.substr(9)).ok());
  CHECK(completed(session).size() == 2);
}

TEST(each_outcome_leaves_the_connection_in_step) {
  for (const std::size_t most : {1, 2, 5, 1 << 20}) {
    Session session;
    Memory hit(3);
    Memory miss(4);
    Memory shorter(5);
    Memory longer(2);
    Memory refused(4);
    Memory empty(0);
    std::uint32_t index = 0;
    for (const Memory* memory : {&hit, &miss, &shorter, &longer, &refused, &empty, &hit}) {
      session.push(get("k", *memory, &owner_a, index++));
    }
    session.push(plain(Command::exists, "k", index++));
    session.push(plain(Command::exists, "k", index++));
    session.push(plain(Command::unlink, "k", index++));
    sent(session);
    CHECK(feed(session,
               bulk("abc") + "$-1\r\n" + bulk("abc") + bulk("abc") + "-WRONGTYPE bad\r\n" +
                   bulk("") + bulk("def") + ":1\r\n:0\r\n:1\r\n",
               most)
              .ok());
    const auto done = completed(session);
    const std::vector<Outcome> expected = {
        Outcome::hit,     Outcome::miss, Outcome::size_mismatch, Outcome::size_mismatch,
        Outcome::refused, Outcome::hit,  Outcome::hit,           Outcome::hit,
        Outcome::miss,    Outcome::hit};
    CHECK(done.size() == expected.size());
    for (std::size_t i = 0; i < done.size(); ++i) {
      CHECK(done[i].outcome == expected[i]);
      CHECK(done[i].ticket.index == i);
    }
    CHECK(done[2].actual_bytes == 3 && done[3].actual_bytes == 3);
    CHECK(done[4].error == "WRONGTYPE bad");
    CHECK(hit.text() == "def");
    CHECK(miss.poisoned() && shorter.poisoned() && longer.poisoned() && refused.poisoned());
    CHECK(session.outstanding_bytes() == 0);
  }
}

TEST(asking_stands_right_before_its_command_and_has_no_outcome_of_its_own) {
  for (const std::size_t most : {1, 5, 1 << 20}) {
    for (const std::string said : {"+OK\r\n", "-ERR no cluster\r\n"}) {
      Session session;
      Memory memory(3);
      session.push(plain(Command::exists, "a"));
      Operation asking = get("k", memory, &owner_a, 1);
      asking.asking = true;
      session.push(asking);
      asking = plain(Command::unlink, "k", 2);
      asking.asking = true;
      session.push(asking);
      session.push(plain(Command::exists, "b", 3));
      const std::string ask = "*1\r\n$6\r\nASKING\r\n";
      CHECK(sent(session) ==
            "*2\r\n$6\r\nEXISTS\r\n$1\r\na\r\n" + ask + "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n" + ask +
                "*2\r\n$6\r\nUNLINK\r\n$1\r\nk\r\n" + "*2\r\n$6\r\nEXISTS\r\n$1\r\nb\r\n");
      CHECK(feed(session, ":1\r\n" + said + bulk("abc") + said + "-MOVED 7 h:1\r\n:0\r\n", most)
                .ok());
      const auto done = completed(session);
      CHECK(done.size() == 4);
      for (std::uint32_t i = 0; i < 4; ++i) CHECK(done[i].ticket.index == i);
      CHECK(done[1].outcome == Outcome::hit && memory.text() == "abc");
      CHECK(done[2].outcome == Outcome::refused && done[2].error == "MOVED 7 h:1");
      CHECK(session.outstanding_bytes() == 0 && session.requests() == 0);
    }
  }
}

TEST(a_set_sends_all_parts_of_its_value_and_its_options) {
  for (const std::size_t most : {1, 3, 1 << 20}) {
    Session session;
    Memory value({2, 0, 3});
    value.parts[0] = "ab";
    value.parts[2] = "cde";
    for (std::size_t i = 0; i < 3; ++i) {
      value.segments[i].data = reinterpret_cast<std::byte*>(value.parts[i].data());
    }
    session.push({.command = Command::set,
                  .ticket = {&owner_a, 0},
                  .key = "k",
                  .value = value.segments,
                  .set_options = "$2\r\nNX\r\n",
                  .set_option_count = 1});
    CHECK(session.outstanding_bytes() == 2 * 5);
    CHECK(sent(session, most) == "*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$5\r\nabcde\r\n$2\r\nNX\r\n");
    CHECK(session.outstanding_bytes() == 2 * 5);  // somewhere on the way
    CHECK(feed(session, "$-1\r\n", most).ok());
    CHECK(session.outstanding_bytes() == 0);
    CHECK(completed(session)[0].outcome == Outcome::miss);
  }
}

TEST(a_session_that_is_never_idle_does_not_grow) {
  Session session;
  Memory value(10);
  session.push(
      {.command = Command::set, .ticket = {&owner_a, 0}, .key = "k", .value = value.segments});
  std::string stream;
  for (int round = 0; round < 20'000; ++round) {
    session.push(
        {.command = Command::set, .ticket = {&owner_a, 0}, .key = "k", .value = value.segments});
    std::size_t left = 35;  // less than a request: there is always something unsent
    for (const iovec& part : session.prepare_write()) {
      const std::size_t taken = std::min(left, part.iov_len);
      stream.append(static_cast<const char*>(part.iov_base), taken);
      left -= taken;
    }
    session.commit_write(35 - left);
  }
  stream += sent(session);
  const std::string one = "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$10\r\n" + value.text() + "\r\n";
  CHECK(stream.size() == one.size() * 20'001);
  for (std::size_t at = 0; at < stream.size(); at += one.size()) {
    CHECK(stream.compare(at, one.size(), one) == 0);
  }
}

TEST(what_answers_another_question_is_a_protocol_error) {
  Memory memory(3);
  const std::vector<std::pair<Command, std::string>> cases = {
      {Command::get, ":1\r\n"},          {Command::get, "+OK\r\n"},
      {Command::get, "*0\r\n"},          {Command::get, "$3\r\nabcd\r\n"},
      {Command::get, "$3\r\nabc\n\r"},   {Command::set, ":1\r\n"},
      {Command::set, "+YES\r\n"},        {Command::set, "$2\r\nOK\r\n"},
      {Command::exists, "+1\r\n"},       {Command::exists, "$1\r\n1\r\n"},
      {Command::unlink, "*1\r\n:1\r\n"}, {Command::get, "$x\r\n"},
      {Command::get, "_\r\n"},           {Command::get, ">2\r\n"},
  };
  for (const auto& [command, reply] : cases) {
    for (const std::size_t most : {1, 1 << 20}) {
      Session session;
      Operation operation = plain(command, "k");
      if (command == Command::get || command == Command::set) operation.value = memory.segments;
      session.push(operation);
      sent(session);
      const Status status = feed(session, reply, most);
      CHECK(status.code == Code::protocol_error);
      CHECK(completed(session).empty());
      CHECK(session.reset({Code::connection_lost, {}}, true).size() == 1);
    }
  }
}

TEST(a_reply_that_nobody_asked_for_is_a_protocol_error) {
  Session session;
  CHECK(feed(session, "+OK\r\n").code == Code::protocol_error);
}

TEST(abandoned_memory_is_not_written_and_the_stream_stays_in_step) {
  const std::string value(10'000, 'v');
  const std::string stream = bulk(value) + bulk(value) + bulk(value);
  // Abandon after each number of bytes.
  for (std::size_t cut = 0; cut < stream.size(); cut += 97) {
    Session session;
    Memory a1(value.size());
    Memory b(value.size());
    Memory a2(value.size());
    session.push(get("1", a1, &owner_a, 1));
    session.push(get("2", b, &owner_b, 2));
    session.push(get("3", a2, &owner_a, 3));
    sent(session);
    CHECK(feed(session, stream.substr(0, cut)).ok());
    std::size_t finished = 0;
    for (const Completed& one : completed(session)) finished += one.ticket.owner == &owner_a;
    const std::string before1 = a1.text();
    const std::string before2 = a2.text();
    const auto abandoned = session.abandon(&owner_a);
    CHECK(abandoned.usable);
    CHECK(abandoned.released + finished == 2);
    CHECK(feed(session, stream.substr(cut)).ok());
    CHECK(a1.text() == before1 && a2.text() == before2);
    CHECK(b.text() == value);
    for (const Completed& one : completed(session)) CHECK(one.ticket.owner == &owner_b);
    CHECK(session.requests() == 0 && session.outstanding_bytes() == 0);
  }
}

TEST(a_set_abandoned_before_its_end_makes_the_connection_unusable) {
  Memory value(1000);
  for (const bool whole : {false, true}) {
    Session session;
    session.push(
        {.command = Command::set, .ticket = {&owner_a, 0}, .key = "k", .value = value.segments});
    if (whole) sent(session);
    const auto abandoned = session.abandon(&owner_a);
    CHECK(abandoned.released == 1);
    CHECK(abandoned.usable == whole);
  }
}

TEST(an_error_before_a_set_was_sent_to_its_end_ends_the_sending) {
  for (const std::size_t sent_bytes : {0, 10, 25, 500}) {
    Session session;
    Memory value(1000);
    session.push(plain(Command::exists, "k", 0));
    sent(session);
    session.push(
        {.command = Command::set, .ticket = {&owner_a, 1}, .key = "k", .value = value.segments});
    session.push(
        {.command = Command::set, .ticket = {&owner_a, 2}, .key = "k", .value = value.segments});
    session.prepare_write();
    session.commit_write(sent_bytes);
    const Status status = feed(session, ":1\r\n-ERR Protocol error: invalid bulk length\r\n");
    CHECK(status.code == Code::connection_lost);
    const auto done = completed(session);
    CHECK(done.size() == 2 && done[0].outcome == Outcome::hit);
    CHECK(done[1].outcome == Outcome::refused && done[1].ticket.index == 1);
    // Its memory may be the caller's again: no more of it is sent.
    CHECK(session.prepare_write().empty());
    const auto lost = session.reset({Code::connection_lost, {}}, true);
    CHECK(lost.size() == 1 && lost[0].ticket.index == 2 && !lost[0].sent);
  }
}

TEST(a_success_before_a_request_was_sent_to_its_end_is_a_protocol_error) {
  for (const std::size_t sent_bytes : {0, 10, 500}) {
    Session session;
    Memory value(1000);
    session.push(
        {.command = Command::set, .ticket = {&owner_a, 1}, .key = "k", .value = value.segments});
    session.prepare_write();
    session.commit_write(sent_bytes);
    CHECK(feed(session, "+OK\r\n").code == Code::protocol_error);
    CHECK(completed(session).empty());
  }
}

TEST(reset_says_what_was_lost_and_whether_it_was_sent) {
  Session session;
  Memory value(1000);
  session.push(get("a", value, &owner_a, 1));
  session.push(get("b", value, &owner_b, 2));
  session.push({.command = Command::ping});
  session.push(get("c", value, &owner_a, 3));
  session.abandon(&owner_b);
  session.prepare_write();
  session.commit_write(25);  // all of the first, some of the second
  const auto lost = session.reset({Code::connection_lost, {}}, true);
  CHECK(lost.size() == 2);  // neither the abandoned one nor the ping
  CHECK(lost[0].ticket.index == 1 && lost[0].sent);
  CHECK(lost[1].ticket.index == 3 && !lost[1].sent);
  CHECK(session.requests() == 0 && !session.has_unsent() && session.outstanding_bytes() == 0);
  // And it can be used again.
  session.push(plain(Command::exists, "k"));
  CHECK(sent(session) == "*2\r\n$6\r\nEXISTS\r\n$1\r\nk\r\n");
  CHECK(feed(session, ":1\r\n").ok());
}

TEST(more_segments_than_one_system_call_takes_are_filled_in_order) {
  Session session;
  std::vector<std::size_t> sizes;
  std::string value;
  for (std::size_t i = 0; i < 500; ++i) {
    sizes.push_back(1 + i % 50);
    value.append(1 + i % 50, static_cast<char>('a' + i % 26));
  }
  Memory memory(sizes);
  session.push(get("k", memory));
  sent(session);
  CHECK(feed(session, bulk(value)).ok());
  CHECK(memory.text() == value);
}

TEST(random_bytes_give_completions_or_one_error_the_same_for_every_cut) {
  std::mt19937 random(7);
  const std::vector<std::string> words = {
      "$",      "3",      "\r\n", "\r", "\n",    "abc",           "-",       "+",       "OK",
      ":",      "1",      "*",    "-1", "ERR x", "$3\r\nabc\r\n", "$-1\r\n", "+OK\r\n", ":1\r\n",
      "-E\r\n", "$5\r\n", "hello"};
  for (int round = 0; round < 20'000; ++round) {
    std::string stream;
    for (auto i = random() % 12; i > 0; --i) stream += words[random() % words.size()];
    std::vector<std::string> results;
    for (const std::size_t most : {std::size_t{1}, std::size_t{3}, std::size_t{1} << 20}) {
      Session session;
      Memory memory(3);
      session.push(get("a", memory, &owner_a, 0));
      session.push(plain(Command::exists, "b", 1));
      session.push(get("c", memory, &owner_a, 2));
      session.push(
          {.command = Command::set, .ticket = {&owner_a, 3}, .key = "d", .value = memory.segments});
      sent(session);
      const Status status = feed(session, stream, most);
      std::string result = status.ok() ? "ok" : "error";
      for (const Completed& one : completed(session)) {
        result += " " + std::to_string(static_cast<int>(one.outcome)) + one.error;
      }
      results.push_back(result + " " + memory.text());
    }
    CHECK(results[0] == results[1] && results[1] == results[2]);
  }
}

// --- in ranges ---------------------------------------------------------------------------------

namespace {

Operation in_ranges(const Memory& memory, bool snapshot, void* owner = &owner_a,
                    std::uint32_t index = 0) {
  Operation operation = get("k", memory, owner, index);
  operation.ranges = std::make_shared<RangedValue>(memory.text().size(), 10'000, snapshot);
  return operation;
}

// The replies to a value in ranges, from a server that has `value`.
std::vector<std::string> replies_to(const std::string& requests, const std::string& value) {
  std::vector<std::string> replies;
  std::size_t at = 0;
  const auto next = [&] {
    at = requests.find("\r\n", at) + 2;
    const std::size_t end = requests.find("\r\n", at);
    const std::string word = requests.substr(at, end - at);
    at = end + 2;
    return word;
  };
  while (at < requests.size()) {
    at = requests.find("\r\n", at) + 2;
    const std::string command = next();
    if (command == "GETRANGE") {
      next();
      const std::size_t begin = std::stoul(next());
      const std::size_t end = std::min<std::size_t>(std::stoul(next()) + 1, value.size());
      replies.push_back(bulk(begin < end ? value.substr(begin, end - begin) : ""));
    } else if (command == "EXEC") {
      replies.push_back("*0\r\n");
    } else {
      if (command == "WATCH") next();
      replies.push_back("+OK\r\n");
    }
  }
  return replies;
}

}  // namespace

TEST(a_value_in_ranges_is_asked_for_as_the_window_allows_and_lands_in_order) {
  std::string value;
  for (int i = 0; i < 45'000; ++i) value += static_cast<char>('a' + i % 23);
  for (const bool snapshot : {true, false}) {
    for (const std::size_t most : {1, 7, 1000, 1 << 20}) {
      Session session;
      Memory memory({3, 19'000, 0, 25'000, 997});
      session.push(in_ranges(memory, snapshot));
      std::string requests;
      int rounds = 0;
      while (session.requests() > 0 || session.pumping()) {
        session.pump(15'000);
        CHECK(session.outstanding_bytes() <= 25'000);
        const std::string sent_now = sent(session);
        requests += sent_now;
        for (const std::string& reply : replies_to(sent_now, value)) {
          CHECK(feed(session, reply, most).ok());
        }
        CHECK(++rounds < 10);
      }
      CHECK(rounds >= 3);
      const auto done = completed(session);
      CHECK(done.size() == 1 && done[0].outcome == Outcome::hit);
      CHECK(memory.text() == value);
      CHECK(session.outstanding_bytes() == 0);
      CHECK((requests.find("WATCH") != std::string::npos) == snapshot);
      CHECK((requests.find("EXEC") != std::string::npos) == snapshot);
    }
  }
}

TEST(a_value_in_ranges_of_another_length_or_none_is_a_misfit) {
  for (const std::size_t actual : {0, 5, 20'000, 29'999, 30'001, 90'000}) {
    for (const bool snapshot : {true, false}) {
      for (const std::uint64_t window : {1, 15'000, 1'000'000}) {
        Session session;
        Memory memory(30'000);
        session.push(in_ranges(memory, snapshot));
        while (session.requests() > 0 || session.pumping()) {
          session.pump(window);
          for (const std::string& reply : replies_to(sent(session), std::string(actual, 'x'))) {
            CHECK(feed(session, reply).ok());
          }
        }
        const auto done = completed(session);
        CHECK(!done.empty() && done.back().outcome == Outcome::misfit);
        CHECK(session.outstanding_bytes() == 0);
      }
    }
  }
}

TEST(with_the_end_of_a_value_no_byte_of_its_body_is_read_that_must_be_copied) {
  Session session;
  Memory memory(30'000);
  session.push(in_ranges(memory, false));
  session.pump(1 << 20);
  const auto replies = replies_to(sent(session), std::string(30'000, 'x'));
  std::size_t room = 0;
  for (const iovec& part : session.prepare_read()) room += part.iov_len;
  CHECK(room == replies[0].size() + std::string_view("$12048\r\n").size());
}

TEST(an_exec_that_answers_nil_says_that_the_value_is_torn) {
  for (const std::string nil : {"*-1\r\n", "$-1\r\n"}) {
    Session session;
    Memory memory(30'000);
    session.push(in_ranges(memory, true));
    session.pump(1 << 20);
    auto replies = replies_to(sent(session), std::string(30'000, 'x'));
    CHECK(replies.back() == "*0\r\n");
    replies.back() = nil;
    for (const std::string& reply : replies) CHECK(feed(session, reply).ok());
    CHECK(completed(session)[0].outcome == Outcome::torn);
  }
}

TEST(a_multi_that_is_refused_leaves_no_transaction_open) {
  Session session;
  Memory memory(30'000);
  session.push(in_ranges(memory, true));
  session.pump(1 << 20);
  auto replies = replies_to(sent(session), std::string(30'000, 'x'));
  replies[5] = "-NOPERM to run the 'multi' command\r\n";
  replies[6] = "-ERR EXEC without MULTI\r\n";
  for (const std::string& reply : replies) CHECK(feed(session, reply).ok());
  CHECK(completed(session)[0].outcome == Outcome::misfit);
}

TEST(a_watch_that_was_left_is_undone_before_the_next) {
  Session session;
  Memory first(50'000);
  Memory second(30'000);
  session.push(in_ranges(first, true));
  session.pump(25'000);
  const auto left = replies_to(sent(session), std::string(50'000, 'x'));
  session.abandon(&owner_a);
  session.push(in_ranges(second, true, &owner_b));
  session.pump(1 << 20);
  const std::string requests = sent(session);
  CHECK(requests.starts_with("*1\r\n$7\r\nUNWATCH\r\n*2\r\n$5\r\nWATCH\r\n"));
  for (const std::string& reply : left) CHECK(feed(session, reply).ok());
  CHECK(feed(session, "+OK\r\n").ok());
  const std::string rest = requests.substr(std::string_view("*1\r\n$7\r\nUNWATCH\r\n").size());
  for (const std::string& reply : replies_to(rest, std::string(30'000, 'y'))) {
    CHECK(feed(session, reply).ok());
  }
  const auto done = completed(session);
  CHECK(done.size() == 1 && done[0].outcome == Outcome::hit);
  CHECK(second.text() == std::string(30'000, 'y'));
}

TEST(a_refused_step_is_a_misfit_and_remembered) {
  // WATCH, four ranges, MULTI, EXEC.
  for (std::size_t refused = 0; refused < 7; ++refused) {
    for (const std::string why :
         {"-ERR unknown command\r\n", "-LOADING wait\r\n", "-MOVED 7 h:1\r\n", "-ASK 7 h:1\r\n"}) {
      Session session;
      Memory memory(30'000);
      session.push(in_ranges(memory, true));
      session.pump(1 << 20);
      auto replies = replies_to(sent(session), std::string(30'000, 'x'));
      CHECK(replies.size() == 7);
      replies[refused] = why;
      Status status;
      for (const std::string& reply : replies) status = feed(session, reply);
      CHECK(completed(session)[0].outcome == Outcome::misfit);
      CHECK(session.ranges_refused() == why.starts_with("-ERR"));
      CHECK(status.ok() == (refused != 6));  // a connection may be left inside MULTI
      CHECK(session.outstanding_bytes() == 0);
    }
  }
}

TEST(abandoned_ranges_are_not_written_and_no_more_are_asked_for) {
  const std::string value(50'000, 'v');
  for (const std::size_t answered : {0, 1, 2, 3, 4}) {
    Session session;
    Memory memory(value.size());
    Memory other(3);
    session.push(in_ranges(memory, true));
    session.pump(25'000);
    const auto replies = replies_to(sent(session), value);
    CHECK(replies.size() == 5);  // WATCH and four ranges
    for (std::size_t i = 0; i < answered; ++i) CHECK(feed(session, replies[i]).ok());
    CHECK(session.abandon(&owner_a).released == 1);
    CHECK(!session.pumping());
    const std::string before = memory.text();
    session.push(get("other", other, &owner_b));
    for (std::size_t i = answered; i < replies.size(); ++i) CHECK(feed(session, replies[i]).ok());
    CHECK(memory.text() == before);
    sent(session);
    CHECK(feed(session, bulk("abc")).ok());
    const auto done = completed(session);
    CHECK(done.size() == 1 && done[0].ticket.owner == &owner_b);
    CHECK(other.text() == "abc" && session.outstanding_bytes() == 0);
    CHECK(session.reset({Code::connection_lost, {}}, true).empty());
  }
}

TEST(a_lost_value_in_ranges_is_lost_once) {
  Session session;
  Memory memory(50'000);
  session.push(in_ranges(memory, true, &owner_a, 7));
  session.pump(25'000);
  sent(session);
  const auto lost = session.reset({Code::connection_lost, {}}, true);
  CHECK(lost.size() == 1 && lost[0].ticket.index == 7 && lost[0].sent);
  CHECK(!session.pumping());
}

// --- by several connections --------------------------------------------------------------------

namespace {

Operation helping(const Operation& owners) {
  Operation operation = owners;
  operation.helping = true;
  return operation;
}

// A server with one key, whose value is one letter over and over. Each connection has its own
// WATCH.
struct Server {
  struct Connection {
    bool watching = false;
    bool touched = false;
    std::string requests;  // received, not run yet
    std::string replies;   // not delivered yet
  };

  void write() {
    version = static_cast<char>(version == 'z' ? 'a' : version + 1);
    for (Connection& connection : connections) connection.touched = true;
  }

  // Runs the oldest request of a connection.
  void run(Connection& connection) {
    std::size_t at = 0;
    const auto word = [&] {
      const std::size_t end = connection.requests.find("\r\n", at);
      const std::string found = connection.requests.substr(at, end - at);
      at = end + 2;
      return found;
    };
    std::vector<std::string> words(std::stoul(word().substr(1)));
    for (std::string& argument : words) {
      word();
      argument = word();
    }
    connection.requests.erase(0, at);
    if (words[0] == "GETRANGE") {
      const std::size_t begin = std::stoul(words[2]);
      const std::size_t end = std::min(std::stoul(words[3]) + 1, bytes);
      connection.replies += bulk(std::string(end - begin, version));
    } else if (words[0] == "EXEC") {
      const bool unchanged = !std::exchange(connection.touched, false);
      connection.watching = false;
      connection.replies += unchanged ? "*0\r\n" : "*-1\r\n";
    } else {
      if (words[0] == "WATCH" && !std::exchange(connection.watching, true)) {
        connection.touched = false;
      }
      if (words[0] == "UNWATCH") connection.watching = connection.touched = false;
      connection.replies += "+OK\r\n";
    }
  }

  std::size_t bytes;
  char version = 'a';
  std::vector<Connection> connections;
};

}  // namespace

TEST(a_value_read_by_several_connections_is_of_one_version_or_torn) {
  std::mt19937 random(7);
  const auto chance = [&](unsigned one_in) { return random() % one_in == 0; };
  int hits = 0;
  int torn = 0;
  int shared = 0;
  for (int round = 0; round < 20'000; ++round) {
    constexpr std::size_t kReaders = 3;
    Server server{.bytes = 30'000 + random() % 60'000, .connections = {}};
    server.connections.resize(kReaders);
    std::array<Session, kReaders> sessions;
    Memory memory(server.bytes);
    const Operation operation = in_ranges(memory, true);
    const unsigned writes_one_in = 1u << (random() % 10);
    const std::uint64_t window = 1 + random() % 30'000;
    std::array<bool, kReaders> reading{true};
    sessions[0].push(operation);
    std::vector<Completed> done;
    while (done.empty()) {
      const std::size_t i = random() % kReaders;
      Session& session = sessions[i];
      Server::Connection& connection = server.connections[i];
      switch (random() % 4) {
        case 0:
          if (!reading[i] && operation.ranges->join()) {
            reading[i] = true;
            ++shared;
            session.push(helping(operation));
          }
          break;
        case 1:
          session.pump(window);
          connection.requests += sent(session);
          break;
        case 2:
          if (!connection.requests.empty()) server.run(connection);
          if (chance(writes_one_in)) server.write();
          break;
        default: {
          const std::string bytes = connection.replies.substr(0, random() % 20'000);
          connection.replies.erase(0, bytes.size());
          CHECK(feed(session, bytes).ok());
          break;
        }
      }
      for (Session& each : sessions) {
        for (const Completed& completed : completed(each)) done.push_back(completed);
      }
    }
    CHECK(done.size() == 1);
    if (done[0].outcome == Outcome::hit) {
      ++hits;
      CHECK(memory.text() == std::string(server.bytes, memory.text()[0]));
    } else {
      CHECK(done[0].outcome == Outcome::torn);
      ++torn;
    }
  }
  CHECK(hits > 1000 && torn > 1000 && shared > 10'000);
}

TEST(a_value_that_one_of_its_readers_lost_is_lost_when_the_last_one_leaves) {
  for (const bool owner_first : {true, false}) {
    Session owner;
    Session helper;
    Memory memory(90'000);
    const Operation operation = in_ranges(memory, false);
    owner.push(operation);
    owner.pump(1);
    CHECK(operation.ranges->join());
    helper.push(helping(operation));
    helper.pump(1);
    Session& gone = owner_first ? owner : helper;
    Session& stays = owner_first ? helper : owner;
    const auto replies = replies_to(sent(stays), std::string(90'000, 'x'));
    CHECK(gone.reset({Code::stalled, "slow"}, true).empty());  // not the last
    stays.pump(1 << 20);
    CHECK(!stays.has_unsent());  // the rest would be of no use
    for (const std::string& reply : replies) CHECK(feed(stays, reply).ok());
    const auto done = completed(stays);
    CHECK(done.size() == 1 && done[0].outcome == Outcome::lost);
    CHECK(done[0].ranges->loss().code == Code::stalled && done[0].ranges->loss().detail == "slow");
    CHECK(!operation.ranges->join());
  }
}

TEST(a_helper_that_comes_too_late_leaves_no_watch_behind) {
  Session owner;
  Session helper;
  Memory memory(90'000);
  const std::string value(90'000, 'x');
  const Operation operation = in_ranges(memory, true);
  owner.push(operation);
  owner.pump(1);
  const std::string first = sent(owner);
  CHECK(!operation.ranges->join());  // not before the owner's WATCH was answered
  CHECK(feed(owner, "+OK\r\n").ok());
  CHECK(owner.take_news() && !owner.take_news());
  CHECK(operation.ranges->join());
  helper.push(helping(operation));
  helper.pump(1 << 20);
  CHECK(sent(helper) == "*2\r\n$5\r\nWATCH\r\n$1\r\nk\r\n");
  owner.pump(1 << 20);
  auto replies = replies_to(first + sent(owner), value);
  for (std::size_t i = 1; i < replies.size(); ++i) CHECK(feed(owner, replies[i]).ok());
  CHECK(completed(owner).empty());  // the helper may still be reading, for all it knows
  helper.pump(1 << 20);
  const auto done = completed(helper);
  CHECK(done.size() == 1 && done[0].outcome == Outcome::hit);
  CHECK(memory.text() == value);
  Memory next(30'000);
  helper.push(in_ranges(next, true, &owner_b));
  CHECK(sent(helper).starts_with("*1\r\n$7\r\nUNWATCH\r\n"));
}

TEST(a_helper_that_was_lost_before_it_read_anything_takes_nothing_with_it) {
  Session owner;
  Session helper;
  Memory memory(90'000);
  const std::string value(90'000, 'x');
  const Operation operation = in_ranges(memory, true);
  owner.push(operation);
  sent(owner);
  CHECK(feed(owner, "+OK\r\n").ok());
  CHECK(operation.ranges->join());
  helper.push(helping(operation));
  sent(helper);
  CHECK(helper.reset({Code::stalled, {}}, true).empty());
  owner.pump(1 << 20);
  for (const std::string& reply : replies_to(sent(owner), value)) CHECK(feed(owner, reply).ok());
  const auto done = completed(owner);
  CHECK(done.size() == 1 && done[0].outcome == Outcome::hit && memory.text() == value);
}

TEST(no_more_is_offered_to_write_than_was_asked_for) {
  Session session;
  Memory memory({400, 600});
  session.push({.command = Command::set, .key = "k", .value = memory.segments});
  std::string whole;
  while (session.has_unsent()) {
    std::string some;
    for (const iovec& part : session.prepare_write(300)) {
      some.append(static_cast<const char*>(part.iov_base), part.iov_len);
    }
    CHECK(!some.empty() && some.size() <= 300);
    session.commit_write(some.size());
    whole += some;
  }
  CHECK(whole == "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1000\r\n" + memory.text() + "\r\n");
}

TEST(a_value_that_others_have_read_completes_when_its_owner_looks) {
  Session owner;
  Session helper;
  Memory memory(90'000);
  const std::string value(90'000, 'x');
  const Operation operation = in_ranges(memory, false);
  CHECK(operation.ranges->join());
  helper.push(helping(operation));
  helper.pump(1 << 20);
  for (const std::string& reply : replies_to(sent(helper), value)) CHECK(feed(helper, reply).ok());
  CHECK(completed(helper).empty() && helper.take_news());
  owner.push(operation);
  owner.pump(1 << 20);
  CHECK(owner.requests() == 0 && !owner.pumping() && !owner.has_unsent());
  const auto done = completed(owner);
  CHECK(done.size() == 1 && done[0].outcome == Outcome::hit && memory.text() == value);
}

TEST(an_abandoned_reader_leaves_and_the_last_one_releases_the_memory) {
  Session owner;
  Session helper;
  Memory memory(90'000);
  const Operation operation = in_ranges(memory, false);
  owner.push(operation);
  owner.pump(1 << 14);
  CHECK(operation.ranges->join());
  helper.push(helping(operation));
  helper.pump(1 << 14);
  CHECK(owner.abandon(&owner_a).released == 0);
  CHECK(helper.abandon(&owner_a).released == 1);
  for (Session* session : {&owner, &helper}) {
    for (const std::string& reply : replies_to(sent(*session), std::string(90'000, 'x'))) {
      CHECK(feed(*session, reply).ok());
    }
    CHECK(completed(*session).empty());
  }
  CHECK(memory.poisoned());
}

int main() {
  return check::run_all();
}
