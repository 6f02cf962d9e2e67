// Sessions that read values in ranges, alone and several together.
#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.hpp"
#include "session.hpp"
#include "session_peer.hpp"

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
  for (int i = 0; i < 51'000; ++i) value += static_cast<char>('a' + i % 23);
  for (const bool snapshot : {true, false}) {
    for (const std::size_t most : {1, 7, 1000, 1 << 20}) {
      Session session;
      Memory memory({3, 19'000, 0, 31'000, 997});
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

TEST(a_refused_step_is_a_misfit) {
  // WATCH, four ranges, MULTI, EXEC.
  for (std::size_t refused = 0; refused < 7; ++refused) {
    for (const auto& [why, speaks_of_command] : std::vector<std::pair<std::string, bool>>{
             {"-ERR unknown command\r\n", true},
             {"-invalid request\r\n", true},
             {"-NOPERM this user has no permissions to run the 'watch' command\r\n", true},
             {"-EXECABORT Transaction discarded because of: this user has no permissions to run "
              "the 'exec' command\r\n",
              true},
             {"-NOPERM No permissions to access a key\r\n", false},
             {"-WRONGTYPE a list\r\n", false},
             {"-LOADING wait\r\n", false},
             {"-MOVED 7 h:1\r\n", false}}) {
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
      CHECK(session.ranges_refused() == speaks_of_command);
      CHECK(status.ok() == (refused != 6));  // a connection may be left inside MULTI
      CHECK(session.outstanding_bytes() == 0);
    }
  }
}

TEST(each_refusal_in_a_row_makes_twice_as_many_values_be_read_whole_and_a_success_forgets) {
  Session session;
  Memory memory(30'000);
  const auto try_ranges = [&](bool refused) {
    session.push(in_ranges(memory, true));
    session.pump(1 << 20);
    auto replies = replies_to(sent(session), std::string(30'000, 'x'));
    if (refused) {
      // All that a backend does while it is away: one refusal.
      std::fill(replies.begin(), replies.begin() + 5, "-ERR backend unavailable\r\n");
    }
    for (const std::string& reply : replies) CHECK(feed(session, reply).ok());
    CHECK(completed(session)[0].outcome == (refused ? Outcome::misfit : Outcome::hit));
  };
  const auto read_whole = [&] {
    std::size_t values = 0;
    while (session.read_whole()) ++values;
    return values;
  };
  for (int round = 0; round < 2; ++round) {
    for (std::size_t whole = 1; whole <= 1 << 6; whole *= 2) {
      try_ranges(true);
      // A new connection leads to the same server.
      if (whole == 4) session.reset({Code::connection_lost, {}}, true);
      CHECK(session.ranges_refused());
      CHECK(session.take_refusal() == (whole == 2 ? "ERR backend unavailable" : ""));
      CHECK(read_whole() == whole && !session.ranges_refused());
    }
    try_ranges(false);
    CHECK(!session.ranges_refused());
  }
}

TEST(a_connection_that_ends_at_the_first_step_counts_as_a_refusal) {
  const Status lost{Code::connection_lost, {}};
  for (const bool snapshot : {true, false}) {
    Session session;
    Memory memory(30'000);
    const auto try_ranges = [&](std::size_t answered) {
      session.push(in_ranges(memory, snapshot));
      session.pump(1 << 20);
      auto replies = replies_to(sent(session), std::string(30'000, 'x'));
      for (std::size_t i = 0; i < answered; ++i) CHECK(feed(session, replies[i]).ok());
    };
    try_ranges(1);
    session.reset(lost, true);
    CHECK(!session.ranges_refused());
    for (const std::size_t whole : {1, 2, 4}) {
      try_ranges(0);
      session.reset(lost, true);
      for (std::size_t i = 0; i < whole; ++i) CHECK(session.read_whole());
      CHECK(!session.ranges_refused());
    }
    try_ranges(0);
    session.reset({Code::stalled, {}}, true);
    CHECK(!session.ranges_refused());
    try_ranges(0);
    session.reset({Code::closed, {}}, false);
    CHECK(!session.ranges_refused());
  }
}

TEST(values_that_were_asked_for_at_once_are_refused_once) {
  Session session;
  std::deque<Memory> memories;
  for (int i = 0; i < 5; ++i) {
    session.push(in_ranges(memories.emplace_back(30'000), true));
    session.pump(1 << 20);
  }
  sent(session);
  for (int i = 0; i < 5 * 7; ++i) CHECK(feed(session, "-ERR wait\r\n").ok());
  CHECK(session.read_whole() && !session.read_whole());
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

int main(int count, char** names) {
  return check::run(count, names);
}
