// Two sessions that may share values, driven by a script that the input is: which operations, which
// bytes from the server, when the owner gives up or a connection breaks. Whatever it says:
//
// - each operation ends once, and says only what the server's bytes say: each end is compared with
//   the replies as a second parser reads them;
// - no memory is written but that of operations in flight, and none is sent that was given up;
// - a connection ends at most with one error, and all is the same for every way of cutting bytes.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.hpp"
#include "session.hpp"

using namespace fastkv;

namespace {

constexpr std::size_t kSessions = 2;
constexpr std::size_t kGuard = 16;
constexpr char kGuardByte = '\xc3';
constexpr char kPoison = '\xa5';  // of memory that was not written yet
constexpr char kGone = '\x5a';    // of memory that is the caller's again

class Input {
 public:
  explicit Input(std::string_view bytes) : rest_(bytes) {}
  bool empty() const { return rest_.empty(); }
  std::size_t byte() {
    if (rest_.empty()) return 0;
    const auto value = static_cast<unsigned char>(rest_[0]);
    rest_.remove_prefix(1);
    return value;
  }
  std::string_view bytes(std::size_t count) {
    const auto taken = rest_.substr(0, count);
    rest_.remove_prefix(taken.size());
    return taken;
  }

 private:
  std::string_view rest_;
};

// --- what the server was asked, and what it said, read the plain way -----------------------------

using Words = std::vector<std::string>;

struct Reply {
  char type = 0;
  std::int64_t value = 0;  // of an integer; the length of a bulk or array
  std::string text;        // the line of an error or simple string; the body
};

std::optional<std::string_view> take_line(std::string_view& bytes) {
  const std::size_t end = bytes.find("\r\n");
  if (end == std::string_view::npos) return std::nullopt;
  const auto line = bytes.substr(0, end);
  bytes.remove_prefix(end + 2);
  return line;
}

std::optional<Words> take_request(std::string_view& bytes) {
  auto rest = bytes;
  const auto head = take_line(rest);
  if (!head) return std::nullopt;
  CHECK(head->starts_with('*'));
  Words words(std::stoul(std::string(head->substr(1))));
  for (std::string& word : words) {
    const auto size = take_line(rest);
    if (!size) return std::nullopt;
    CHECK(size->starts_with('$'));
    const std::size_t length = std::stoul(std::string(size->substr(1)));
    if (rest.size() < length + 2) return std::nullopt;
    word = rest.substr(0, length);
    CHECK(rest.substr(length, 2) == "\r\n");
    rest.remove_prefix(length + 2);
  }
  bytes = rest;
  return words;
}

// Of what a session has accepted: anything else would have ended the connection.
std::optional<Reply> take_reply(std::string_view& bytes) {
  auto rest = bytes;
  const auto line = take_line(rest);
  if (!line || line->empty()) return std::nullopt;
  Reply reply{.type = (*line)[0], .text = std::string(line->substr(1))};
  if (reply.type == ':' || reply.type == '$' || reply.type == '*') {
    reply.value = std::strtoll(reply.text.c_str(), nullptr, 10);
  }
  if (reply.type == '$' && reply.value >= 0) {
    const auto length = static_cast<std::uint64_t>(reply.value);
    if (rest.size() < 2 || rest.size() - 2 < length) return std::nullopt;
    reply.text = rest.substr(0, length);
    rest.remove_prefix(length + 2);
  }
  bytes = rest;
  return reply;
}

// --- operations ----------------------------------------------------------------------------------

struct Link;

struct Work {
  enum class End : std::uint8_t { none, completed, released, lost };

  Command command = Command::get;
  std::string key;
  std::size_t owner = 0;
  std::vector<std::string> memory;  // each part between two guards
  std::vector<Segment> segments;
  std::string set_value;
  std::size_t bytes = 0;
  std::shared_ptr<RangedValue> ranges;
  const Link* begun_by = nullptr;  // in ranges; others only helped
  // In ranges: what its readers were told.
  struct Evidence {
    std::string read;
    std::size_t good = 0;
    bool torn = false;
    bool unfit = false;
    bool help_refused = false;  // no matter, if it came too late to help
    bool unfinished = false;
    bool lost = false;
  };
  Evidence evidence;
  End end = End::none;

  void make_memory(const std::vector<std::size_t>& sizes) {
    memory.reserve(sizes.size());
    for (const std::size_t size : sizes) {
      memory.push_back(std::string(kGuard, kGuardByte) + std::string(size, kPoison) +
                       std::string(kGuard, kGuardByte));
      segments.push_back({reinterpret_cast<std::byte*>(memory.back().data()) + kGuard, size});
      bytes += size;
    }
  }
  std::string text() const {
    std::string all;
    for (const std::string& part : memory) {
      all.append(part, kGuard, part.size() - 2 * kGuard);
    }
    return all;
  }
  void fill(char with) {
    for (const Segment& segment : segments) std::memset(segment.data, with, segment.size);
  }
  bool only(char byte) const {
    return std::all_of(segments.begin(), segments.end(), [byte](const Segment& segment) {
      const auto* const data = reinterpret_cast<const char*>(segment.data);
      // Each byte is as the one before it.
      return segment.size == 0 ||
             (data[0] == byte && std::memcmp(data, data + 1, segment.size - 1) == 0);
    });
  }
  bool guarded() const {
    static const std::string kWhole(kGuard, kGuardByte);
    return std::all_of(memory.begin(), memory.end(), [](const std::string& part) {
      return part.starts_with(kWhole) && part.ends_with(kWhole);
    });
  }
};

struct Link {
  Session session;
  // All that was sent, and all that came, since it was connected.
  std::string asked;
  std::string said;
  std::vector<Words> requests;
  std::vector<Reply> replies;
  std::set<const Work*> read;  // in ranges
  std::vector<Work*> infos;

  void take_what_is_whole() {
    auto rest = std::string_view(asked).substr(requests_end_);
    while (auto request = take_request(rest)) requests.push_back(std::move(*request));
    requests_end_ = asked.size() - rest.size();
    rest = std::string_view(said).substr(replies_end_);
    while (auto reply = take_reply(rest)) replies.push_back(std::move(*reply));
    replies_end_ = said.size() - rest.size();
  }
  void forget() {
    asked.clear();
    said.clear();
    requests.clear();
    replies.clear();
    read.clear();
    infos.clear();
    requests_end_ = replies_end_ = 0;
  }

 private:
  std::size_t requests_end_ = 0;
  std::size_t replies_end_ = 0;
};

class Run {
 public:
  // `step`: bytes a read at most.
  Run(std::string_view script, std::size_t step) : input_(script), step_(step) {}

  // What happened, to be compared with another run's.
  std::string operator()() {
    for (int turns = 0; !input_.empty() && turns < 60; ++turns) turn();
    for (Link& link : links_) drop(link, {Code::closed, {}});
    for (const Work& work : works_) {
      CHECK(work.end != Work::End::none);
      CHECK(work.guarded() && work.only(kGone));
    }
    return events_;
  }

 private:
  void turn() {
    const std::size_t what = input_.byte();
    Link& link = links_[what & 1];
    switch ((what >> 1) % 8) {
      case 0: return push_plain(link);
      case 1: return push_ranged(link);
      case 2: return help(link);
      case 3: return transmit(link);
      case 4: return feed(link, input_.bytes(input_.byte()));
      case 5: return answer_well(link);
      case 6: return feed_many(link);
      default: return give_up(link);
    }
  }

  Work& add(Command command, std::size_t owner) {
    Work& work = works_.emplace_back();
    work.command = command;
    work.owner = owner;
    work.key = "k" + std::to_string(works_.size() - 1);
    return work;
  }

  Operation operation_of(Work& work) {
    const auto index = static_cast<std::uint32_t>(std::stoul(work.key.substr(1)));
    Operation operation{.command = work.command,
                        .ticket = {&owners_[work.owner], index},
                        .key = work.key,
                        .value = work.segments,
                        .ranges = work.ranges};
    return operation;
  }

  // Sizes that the input says, around `total`.
  std::vector<std::size_t> cut(std::size_t total) {
    std::vector<std::size_t> sizes;
    for (std::size_t parts = input_.byte() % 4; parts > 0; --parts) {
      sizes.push_back(std::min(total, input_.byte() * (total / 256 + 1)));
      total -= sizes.back();
    }
    sizes.push_back(total);
    return sizes;
  }

  void push_plain(Link& link) {
    if (link.session.pumping()) return;
    const std::size_t how = input_.byte();
    if (how % 16 == 15) return link.session.push({.command = Command::ping});
    if (how % 16 == 14) return push_info(link);
    constexpr std::array kCommands = {Command::get, Command::set, Command::exists, Command::unlink};
    Work& work = add(kCommands[how % 4], how >> 7);
    if (work.command == Command::get || work.command == Command::set) {
      const std::size_t size = input_.byte();
      work.make_memory(cut((how & 16) != 0 ? size * 50 : size % 16));
    }
    if (work.command == Command::set) {
      work.fill('v');
      work.set_value = work.text();
    }
    Operation operation = operation_of(work);
    operation.asking = (how & 32) != 0;
    if (work.command == Command::set && (how & 64) != 0) {
      operation.set_options = "$2\r\nNX\r\n";
      operation.set_option_count = 1;
    }
    link.session.push(operation);
  }

  // Of a worker's own: its reply may be shorter than its memory.
  void push_info(Link& link) {
    Work& work = add(Command::server, 0);
    work.make_memory({input_.byte()});
    link.infos.push_back(&work);
    const auto index = static_cast<std::uint32_t>(works_.size());
    link.session.push(
        {.command = Command::server, .ticket = {nullptr, index}, .value = work.segments});
  }

  void push_ranged(Link& link) {
    if (link.session.pumping() || link.session.read_whole()) return;
    const std::size_t how = input_.byte();
    Work& work = add(Command::get, how >> 7);
    work.make_memory(cut(RangedValue::kEndBytes + 1 + input_.byte() * 20));
    work.ranges = std::make_shared<RangedValue>(work.bytes, 100 + (how & 31) * 50, (how & 32) != 0);
    link.session.push(operation_of(work));
    work.begun_by = &link;
    link.read.insert(&work);
    shared_ = works_.size() - 1;
  }

  void help(Link& link) {
    if (!shared_ || link.session.pumping() || link.session.ranges_refused()) return;
    Work& work = works_[*shared_];
    // Offered to the others once, as the schedule does it, and not to who reads it.
    if (work.end != Work::End::none || work.begun_by == &link || !work.ranges->join()) return;
    shared_.reset();
    Operation operation = operation_of(work);
    operation.helping = true;
    link.read.insert(&work);
    link.session.push(operation);
  }

  void transmit(Link& link) {
    const std::size_t how = input_.byte();
    link.session.pump((how & 63) * 200);
    settle(link);
    std::size_t left = how < 128 ? SIZE_MAX : input_.byte();
    while (link.session.has_unsent() && left > 0) {
      std::size_t taken = 0;
      for (const iovec& part : link.session.prepare_write(left)) {
        link.asked.append(static_cast<const char*>(part.iov_base), part.iov_len);
        taken += part.iov_len;
      }
      CHECK(taken > 0 && taken <= left);
      link.session.commit_write(taken);
      left -= taken;
    }
    link.session.take_news();
  }

  // One byte over and over: long lines, large values.
  void feed_many(Link& link) {
    const std::size_t count = input_.byte();
    feed(link, std::string(count * 30, static_cast<char>(input_.byte())));
  }

  // What a server would say to the oldest requests.
  void answer_well(Link& link) {
    link.take_what_is_whole();
    const std::size_t how = input_.byte();
    const std::size_t first = link.replies.size();
    std::string bytes;
    for (std::size_t i = first; i < std::min(link.requests.size(), first + how % 8 + 1); ++i) {
      bytes += answer(link.requests[i], how);
    }
    feed(link, bytes);
  }

  std::string answer(const Words& request, std::size_t how) {
    const auto bulk = [](const std::string& text) {
      return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
    };
    if (request[0] == "GET") {
      if (how >= 200) return how >= 228 ? "$-1\r\n" : bulk(std::string(how, 's'));
      return bulk(std::string(works_[std::stoul(request[1].substr(1))].bytes,
                              static_cast<char>('a' + letter_++ % 26)));
    }
    if (request[0] == "GETRANGE") {
      const std::size_t bytes = works_[std::stoul(request[1].substr(1))].bytes;
      const std::size_t begin = std::stoul(request[2]);
      const std::size_t end = std::min(std::stoul(request[3]) + 1, bytes);
      return bulk(std::string(end - begin, static_cast<char>('a' + letter_++ % 26)));
    }
    if (request[0] == "EXEC") return how < 128 ? "*0\r\n" : "*-1\r\n";
    if (request[0] == "EXISTS" || request[0] == "UNLINK") return how < 128 ? ":1\r\n" : ":0\r\n";
    if (request[0] == "PING") return "+PONG\r\n";
    if (request[0] == "INFO") return bulk(std::string(how, 'i'));
    return "+OK\r\n";
  }

  void feed(Link& link, std::string_view bytes) {
    for (std::size_t reads = 0; !bytes.empty(); ++reads) {
      // Inside a long body there is little to find byte by byte.
      const std::size_t most = reads < 60 ? step_ : std::max<std::size_t>(step_, 997);
      std::size_t moved = 0;
      for (const iovec& part : link.session.prepare_read()) {
        check_target(part);
        const std::size_t taken = std::min({part.iov_len, bytes.size(), most - moved});
        std::memcpy(part.iov_base, bytes.data(), taken);
        link.said.append(bytes.substr(0, taken));
        bytes.remove_prefix(taken);
        moved += taken;
      }
      CHECK(moved > 0);
      const Status status = link.session.commit_read(moved);
      settle(link);
      if (status.ok()) continue;
      events_ += " error" + std::to_string(static_cast<int>(status.code));
      CHECK(status.detail.size() < ReplyParser::kMaxLine);
      drop(link, status);
      return;
    }
  }

  // The scratch, or memory of an operation in flight.
  void check_target(const iovec& part) {
    const auto* const begin = static_cast<const char*>(part.iov_base);
    for (const Work& work : works_) {
      for (const std::string& memory : work.memory) {
        if (begin < memory.data() || begin >= memory.data() + memory.size()) continue;
        CHECK(work.end == Work::End::none && work.command != Command::set);
        CHECK(begin >= memory.data() + kGuard);
        CHECK(begin + part.iov_len <= memory.data() + memory.size() - kGuard);
      }
    }
  }

  void end(Work& work, Work::End how) {
    CHECK(work.end == Work::End::none);
    work.end = how;
    CHECK(work.guarded());
    work.fill(kGone);
  }

  void give_up(Link& link) {
    const std::size_t how = input_.byte();
    if (how % 4 == 0) return drop(link, {Code::stalled, "slow"});
    const std::size_t owner = how >> 7;
    std::size_t released = 0;
    std::array<bool, kSessions> usable{};
    for (std::size_t i = 0; i < kSessions; ++i) {
      const auto abandoned = links_[i].session.abandon(&owners_[owner]);
      released += abandoned.released;
      usable[i] = abandoned.usable;
      settle(links_[i]);
    }
    std::size_t open = 0;
    for (Work& work : works_) {
      if (work.owner != owner || work.end != Work::End::none) continue;
      if (work.command == Command::server) continue;
      ++open;
      end(work, Work::End::released);
    }
    CHECK(released == open);
    for (std::size_t i = 0; i < kSessions; ++i) {
      if (!usable[i]) drop(links_[i], {Code::cancelled, {}});
    }
  }

  void drop(Link& link, const Status& why) {
    for (const auto& lost : link.session.reset(why, true)) {
      Work& work = works_[lost.ticket.index];
      CHECK(lost.sent || link.asked.find(work.key + "\r\n") == std::string::npos);
      events_ += " lost" + std::to_string(lost.ticket.index) + (lost.sent ? "s" : "");
      end(work, Work::End::lost);
    }
    CHECK(link.session.requests() == 0 && link.session.outstanding_bytes() == 0);
    CHECK(!link.session.has_unsent() && !link.session.pumping());
    for (Work* info : link.infos) {
      if (info->end == Work::End::none) end(*info, Work::End::lost);
    }
    link.take_what_is_whole();
    for (Work& work : works_) {
      if (!link.read.contains(&work) || work.end != Work::End::none) continue;
      gather(work, link);
      work.evidence.lost = true;
      if (work.begun_by == &link) work.begun_by = nullptr;
    }
    link.forget();
  }

  // --- what is said to have happened, and what did -----------------------------------------------

  void settle(Link& link) {
    if (link.session.completed().empty()) return;
    for (Link& each : links_) each.take_what_is_whole();
    for (const Completed& done : std::exchange(link.session.completed(), {})) {
      if (!done.ticket.owner) {
        if (done.ticket.index > 0) check_info(link, works_[done.ticket.index - 1], done);
        continue;
      }
      Work& work = works_[done.ticket.index];
      CHECK(done.ticket.owner == &owners_[work.owner]);
      CHECK(work.end == Work::End::none);
      events_ += " " + std::to_string(done.ticket.index) + ":" +
                 std::to_string(static_cast<int>(done.outcome)) + done.error;
      if (done.outcome == Outcome::hit) events_ += work.text();
      if (work.ranges) {
        check_ranged(work, done.outcome);
      } else {
        check_plain(link, work, done);
      }
      end(work, Work::End::completed);
    }
  }

  static bool is_error(const Reply& reply, const Completed& done) {
    return reply.type == '-' && done.error == reply.text.substr(0, Session::kMaxError);
  }

  void check_plain(const Link& link, const Work& work, const Completed& done) {
    const auto& requests = link.requests;
    const auto& replies = link.replies;
    const auto request = std::find_if(requests.begin(), requests.end(), [&](const Words& words) {
      return words.size() > 1 && words[1] == work.key;
    });
    const auto number = static_cast<std::size_t>(request - requests.begin());
    CHECK(number < replies.size());
    const Reply& reply = replies[number];
    if (request == requests.end()) {  // refused before it was sent to its end
      CHECK(done.outcome == Outcome::refused && is_error(reply, done));
      return;
    }
    if (work.command == Command::set) CHECK((*request)[2] == work.set_value);
    if (done.outcome == Outcome::refused) {
      CHECK(is_error(reply, done));
    } else if (work.command == Command::get) {
      CHECK(reply.type == '$');
      const bool fits = reply.value == static_cast<std::int64_t>(work.bytes);
      const Outcome right = reply.value < 0 ? Outcome::miss
                            : fits          ? Outcome::hit
                                            : Outcome::size_mismatch;
      CHECK(done.outcome == right);
      if (right == Outcome::hit) CHECK(work.text() == reply.text);
      if (right == Outcome::size_mismatch) CHECK(done.actual_bytes == reply.value);
    } else if (work.command == Command::set) {
      CHECK(done.outcome == (reply.type == '+' ? Outcome::hit : Outcome::miss));
    } else {
      CHECK(done.outcome == (reply.value > 0 ? Outcome::hit : Outcome::miss));
    }
    if (work.command == Command::get && done.outcome != Outcome::hit) CHECK(work.only(kPoison));
  }

  void check_info(const Link& link, Work& work, const Completed& done) {
    std::size_t earlier = 0;
    for (const Work* info : link.infos) earlier += info->end == Work::End::completed;
    CHECK(link.infos[earlier] == &work);
    std::size_t number = 0;
    for (;; ++number) {
      if (number < link.requests.size() && link.requests[number][0] != "INFO") continue;
      if (earlier-- == 0) break;
    }
    CHECK(number < link.replies.size());
    const Reply& reply = link.replies[number];
    events_ += " info" + std::to_string(static_cast<int>(done.outcome)) + done.error;
    if (reply.type == '-') {
      CHECK(done.outcome == Outcome::refused && is_error(reply, done));
    } else if (reply.type != '$' || reply.value < 0) {
      CHECK(done.outcome == Outcome::miss);
    } else {
      CHECK(done.actual_bytes == reply.value);
      CHECK((done.outcome == Outcome::hit) == (reply.text.size() <= work.bytes));
      if (done.outcome == Outcome::hit) CHECK(work.text().starts_with(reply.text));
    }
    end(work, Work::End::completed);
  }

  void check_ranged(Work& work, Outcome outcome) {
    for (const Link& link : links_) gather(work, link);
    const Work::Evidence& evidence = work.evidence;
    switch (outcome) {
      case Outcome::hit:
        CHECK(!evidence.torn && !evidence.unfit && !evidence.unfinished);
        CHECK(evidence.good == work.bytes && work.text() == evidence.read);
        break;
      case Outcome::torn: CHECK(evidence.torn); break;
      case Outcome::misfit: CHECK(evidence.unfit || evidence.help_refused); break;
      case Outcome::lost: CHECK(evidence.lost); break;
      default: CHECK(false);
    }
  }

  // What a connection was told of a value in ranges.
  void gather(Work& work, const Link& link) {
    Work::Evidence& evidence = work.evidence;
    evidence.read.resize(work.bytes, kPoison);
    bool reading = false;  // the next EXEC is its
    for (std::size_t i = 0; i < link.requests.size(); ++i) {
      const Words& request = link.requests[i];
      const bool ours = request.size() > 1 && request[1] == work.key;
      const bool range = ours && request[0] == "GETRANGE";
      reading |= work.ranges->snapshot() && (range || (ours && &link == work.begun_by));
      if (!ours && !(reading && (request[0] == "MULTI" || request[0] == "EXEC"))) continue;
      if (i >= link.replies.size()) {
        // Only a WATCH need not be waited for, by one who has read nothing.
        evidence.unfinished |= range || reading;
        return;
      }
      const Reply& reply = link.replies[i];
      if (range) {
        const std::size_t begin = std::stoul(request[2]);
        const std::size_t size = std::min(std::stoul(request[3]) + 1, work.bytes) - begin;
        if (reply.type != '$' || static_cast<std::size_t>(reply.value) != size) {
          evidence.unfit = true;
          continue;
        }
        evidence.read.replace(begin, size, reply.text);
        evidence.good += size;
        continue;
      }
      const bool helps = request[0] == "WATCH" && &link != work.begun_by;
      (helps ? evidence.help_refused : evidence.unfit) |= reply.type == '-';
      if (request[0] != "EXEC") continue;
      evidence.torn |= reply.type != '-' && reply.value < 0;
      reading = false;
    }
    evidence.unfinished |= reading;
  }

  Input input_;
  const std::size_t step_;
  std::array<Link, kSessions> links_;
  std::array<int, 2> owners_{};
  std::deque<Work> works_;
  std::optional<std::size_t> shared_;
  unsigned letter_ = 0;
  std::string events_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view script(reinterpret_cast<const char*>(data), size);
  const std::string whole = Run(script, SIZE_MAX)();
  CHECK(Run(script, 7)() == whole);
  CHECK(Run(script, 1)() == whole);
  return 0;
}
