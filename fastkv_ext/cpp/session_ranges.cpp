// Session's part in reading a value in ranges: which steps it asks for, what their replies mean.
// See RangedValue for why these.
#include <algorithm>
#include <string>
#include <utility>

#include "session.hpp"

namespace fastkv {
namespace {

// Codes of Redis's own, such as WRONGTYPE, MOVED or LOADING, speak of the key or of the moment: a
// plain GET would be answered likewise. NOPERM and EXECABORT may speak of either.
bool speaks_of_command(std::string_view line) noexcept {
  const auto code = line.substr(0, line.find(' '));
  return code == "ERR" || line.find("to run the") != std::string_view::npos ||
         !std::all_of(code.begin(), code.end(), [](char c) { return c >= 'A' && c <= 'Z'; });
}

}  // namespace

void Session::pump(std::uint64_t window) {
  while (pumping()) {
    Reader& reader = readers_.back();
    RangedValue& ranges = *reader.operation.ranges;
    if (!ranges.exhausted()) {
      // See RangedValue: a helper claims nothing before its WATCH was answered.
      if (reader.operation.helping && ranges.snapshot() && !reader.watched) return;
      if (outstanding_bytes() >= window) return;
      if (const auto range = ranges.claim()) {
        push_range(reader, *range);
        continue;
      }
    }
    reader.asked = true;
    if (ranges.snapshot() && (reader.reading || !reader.operation.helping)) {
      push_step(reader, Command::multi);
      push_step(reader, Command::exec);
    } else if (!reader.reading) {  // came too late
      unwatch_due_ |= ranges.snapshot();
      retire(reader);
    }
    complete_readers();  // after a misfit its last answer may be there
  }
}

void Session::push_range(Reader& reader, const RangedValue::Range& range) {
  reader.reading = true;  // first: it is claimed, and if we fail nobody else will read it
  Waiting& waiting = push_step(reader, Command::range, range);
  unread_ += range.bytes;
  std::uint64_t left = range.first;
  while (left > 0 && left >= waiting.value[waiting.segment].size) {
    left -= waiting.value[waiting.segment++].size;
  }
  waiting.segment_at = left;
}

Session::Waiting& Session::push_step(Reader& reader, Command command,
                                     const RangedValue::Range& range) {
  const std::size_t begin = heads_.size();
  const std::string_view key = reader.operation.key;
  switch (command) {
    case Command::watch:
      heads_.append("*2\r\n$5\r\nWATCH\r\n");
      append_bulk(heads_, key);
      break;
    case Command::range:
      heads_.append("*4\r\n$8\r\nGETRANGE\r\n");
      append_bulk(heads_, key);
      append_bulk(heads_, std::to_string(range.first));
      // The end is inclusive; to notice a longer value, the last range asks for one byte more.
      append_bulk(heads_, std::to_string(range.first + range.bytes - (range.to_end ? 0 : 1)));
      break;
    case Command::multi: heads_.append("*1\r\n$5\r\nMULTI\r\n"); break;
    default: heads_.append("*1\r\n$4\r\nEXEC\r\n"); break;
  }
  Waiting waiting{.ticket = reader.operation.ticket,
                  .command = command,
                  .abandoned = reader.abandoned,
                  .first_byte = queued_,
                  .value = reader.operation.value,
                  .value_bytes = range.bytes,
                  .reader = &reader};
  end_inline(begin);
  waiting.end_byte = queued_;
  waiting_.push_back(waiting);
  ++reader.unanswered;
  return waiting_.back();
}

Status Session::take_step(const ReplyHead& head) {
  using Type = ReplyHead::Type;
  const Waiting& front = waiting_.front();
  const Command command = front.command;
  front.reader->answered = true;
  if (head.type == Type::error) {
    if (command == Command::range) unread_ -= front.value_bytes;
    refuse(*front.reader, head.text);
    if (command == Command::multi) front.reader->multi_refused = true;
    // After a MULTI that was not, the server would go on to queue what we send.
    const bool in_multi = command == Command::exec && !front.reader->multi_refused;
    Status status;
    if (in_multi) status = {Code::closed, std::string(head.text)};
    complete_step(false);
    return status;
  }
  switch (command) {
    case Command::range:
      if (head.type != Type::bulk || head.value < 0) {
        return protocol_error("GETRANGE was not answered by a string");
      }
      reading_ = Reading::body;
      segment_ = front.segment;
      segment_at_ = front.segment_at;
      body_left_ = static_cast<std::uint64_t>(head.value);
      body_outcome_ = body_left_ == front.value_bytes ? Outcome::hit : Outcome::misfit;
      discard_ = front.abandoned || body_outcome_ == Outcome::misfit;
      if (discard_) unread_ -= front.value_bytes;
      return {};
    case Command::exec:
      // A nil is an array in RESP2; some proxies say it with a bulk string.
      if (!(head.type == Type::array && head.value <= 0) &&
          !(head.type == Type::bulk && head.value < 0)) {
        return protocol_error("EXEC was answered by neither an empty array nor nil");
      }
      if (head.value < 0) front.reader->operation.ranges->spoil(Outcome::torn);
      complete_step(true);
      return {};
    default:
      if (head.type != Type::simple || head.text != "OK") {
        return protocol_error("WATCH or MULTI was not answered by OK");
      }
      if (command == Command::watch && !front.reader->operation.helping) {
        front.reader->operation.ranges->open();
        news_ |= front.reader->operation.ranges->worth_joining();
      }
      complete_step(true);
      return {};
  }
}

void Session::refuse(Reader& reader, std::string_view line) {
  reader.refused = true;
  if (!speaks_of_command(line)) return;
  // Begun before the last refusal was known, it says nothing new.
  if (reader.tried_after != refusals_) return;
  constexpr std::uint32_t kMostDoublings = 20;
  whole_left_ = std::uint64_t{1} << std::min(refusals_++, kMostDoublings);
  if (refusals_ == 2) refusal_ = line.substr(0, kMaxError);
}

// The connection ended at the first command of a value in ranges, unless it was one of the worker's
// own right before it.
void Session::note_hang_up() noexcept {
  const auto first = std::find_if(waiting_.begin(), waiting_.end(),
                                  [](const Waiting& waiting) { return waiting.ticket.owner; });
  if (first == waiting_.end() || !first->reader || first->reader->answered) return;
  if (written_ > first->first_byte) refuse(*first->reader, "hung up");  // too short to take memory
}

void Session::complete_step(bool fits) {
  Reader& reader = *waiting_.front().reader;
  if (waiting_.front().command == Command::watch) reader.watched = true;
  waiting_.pop_front();
  if (!fits && !reader.abandoned) reader.operation.ranges->spoil(Outcome::misfit);
  --reader.unanswered;
  complete_readers();
}

void Session::complete_readers() {
  while (!readers_.empty() && readers_.front().asked && readers_.front().unanswered == 0) {
    Reader& reader = readers_.front();
    if (reader.reading && !reader.refused && !reader.abandoned) refusals_ = 0;
    retire(reader);
    readers_.pop_front();
  }
}

// No range of ours is on its way. What is of the whole value, the last reader says.
void Session::retire(Reader& reader) {
  if (reader.abandoned) return;
  // First, because it may throw.
  completed_.push_back({.ticket = reader.operation.ticket});
  reader.abandoned = true;
  const auto& ranges = reader.operation.ranges;
  if (!ranges->leave()) {
    completed_.pop_back();
    news_ = true;  // a helper that still waits for its WATCH need not
    return;
  }
  completed_.back().outcome = ranges->outcome();
  if (ranges->outcome() == Outcome::lost) completed_.back().ranges = ranges;
}

}  // namespace fastkv
