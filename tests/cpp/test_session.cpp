// A session that reads and writes whole values.
#include <algorithm>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.hpp"
#include "session.hpp"
#include "session_peer.hpp"

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

TEST(what_a_server_announces_is_not_allocated_and_what_it_says_is_not_kept_at_any_length) {
  const std::string huge = "$99999999999999\r\n";
  const std::string part(100'000, 'x');
  {
    Session session;
    Memory memory(3);
    session.push(get("k", memory));
    sent(session);
    CHECK(feed(session, huge + part).ok());
    CHECK(session.sure_bytes() == 99'999'999'999'999 - part.size() + 2);
    CHECK(completed(session).empty() && memory.poisoned());
    CHECK(session.reset({Code::connection_lost, {}}, true).size() == 1);
  }
  for (const std::string& line :
       {"-ERR " + std::string(50'000, 'x'), "+" + std::string(50'000, 'x')}) {
    Session session;
    session.push(plain(Command::exists, "k"));
    sent(session);
    const Status status = feed(session, line + "\r\n", 1000);
    const auto done = completed(session);
    CHECK(status.ok() == (line[0] == '-'));
    CHECK(status.detail.size() < 200);
    if (status.ok()) CHECK(done[0].error == line.substr(1, Session::kMaxError));
  }
  for (const std::string& stream :
       {"-ERR " + std::string(10'000'000, 'x'), std::string("*2147483647\r\n"),
        std::string("*99999999999999\r\n:1\r\n")}) {
    Session session;
    Memory memory(3);
    session.push(get("k", memory));
    sent(session);
    CHECK(feed(session, stream).code == Code::protocol_error);
    CHECK(completed(session).empty());
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

TEST(a_line_that_was_cut_off_with_its_connection_is_forgotten) {
  for (const std::string_view cut : {"-ERR a long line without an end", "$", "+OK\r", "$3\r\nab"}) {
    Session session;
    Memory memory(3);
    session.push(get("a", memory));
    sent(session);
    CHECK(feed(session, cut).ok());
    session.reset({Code::connection_lost, {}}, true);
    session.push(get("b", memory));
    sent(session);
    CHECK(feed(session, bulk("xyz")).ok());
    const auto done = completed(session);
    CHECK(done.size() == 1 && done[0].outcome == Outcome::hit && memory.text() == "xyz");
  }
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

int main(int count, char** names) {
  return check::run(count, names);
}
