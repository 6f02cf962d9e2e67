#include "session.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastkv {
namespace {

// A value up to this size is cheaper to copy out of a full scratch than to read by itself.
constexpr std::size_t kSmallValue = 4096;

std::uint64_t total_bytes(std::span<const Segment> value) noexcept {
  std::uint64_t bytes = 0;
  for (const Segment& segment : value) bytes += segment.size;
  return bytes;
}

}  // namespace

Session::Session() : scratch_(std::make_unique_for_overwrite<std::byte[]>(kScratchBytes)) {}

// --- sending -----------------------------------------------------------------------------------

// Makes heads_[begin..] part of the request stream, in one piece with what stands right before it.
void Session::end_inline(std::size_t begin) {
  const std::size_t size = heads_.size() - begin;
  if (!pieces_.empty() && !pieces_.back().external &&
      pieces_.back().offset + pieces_.back().size == begin) {
    pieces_.back().size += size;
  } else {
    pieces_.push_back({.offset = begin, .size = size});
  }
  queued_ += size;
}

void Session::push(const Operation& operation) {
  const std::size_t most = waiting_.size() + readers_.size() + 1;
  if (lost_.capacity() < most) lost_.reserve(2 * most);
  if (operation.ranges) {
    // A second WATCH of a key is ignored: one that was left would stand for ours.
    if (operation.ranges->snapshot() && std::exchange(unwatch_due_, false)) {
      push({.command = Command::unwatch});
    }
    readers_.push_back({.operation = operation, .first_byte = queued_, .tried_after = refusals_});
    if (!operation.ranges->snapshot()) return;
    try {
      push_step(readers_.back(), Command::watch);
    } catch (...) {
      readers_.pop_back();  // it was not taken
      throw;
    }
    return;
  }
  // Counts for the one command that follows it on the connection.
  if (operation.asking) push({.command = Command::asking});
  Waiting waiting{.ticket = operation.ticket,
                  .command = operation.command,
                  .repeatable = operation.repeatable,
                  .returned = operation.returned,
                  .first_byte = queued_,
                  .value = operation.value,
                  .value_bytes = total_bytes(operation.value)};
  std::size_t begin = heads_.size();
  switch (operation.command) {
    case Command::get:
      heads_.append("*2\r\n$3\r\nGET\r\n");
      append_bulk(heads_, operation.key);
      unread_ += waiting.value_bytes;
      break;
    case Command::exists:
      heads_.append("*2\r\n$6\r\nEXISTS\r\n");
      append_bulk(heads_, operation.key);
      break;
    case Command::unlink:
      ++stores_;
      heads_.append("*2\r\n$6\r\nUNLINK\r\n");
      append_bulk(heads_, operation.key);
      break;
    case Command::ping: heads_.append("*1\r\n$4\r\nPING\r\n"); break;
    case Command::server: heads_.append("*2\r\n$4\r\nINFO\r\n$6\r\nserver\r\n"); break;
    case Command::memory: heads_.append("*2\r\n$4\r\nINFO\r\n$6\r\nmemory\r\n"); break;
    case Command::unwatch:
      heads_.append("*1\r\n$7\r\nUNWATCH\r\n");
      waiting.abandoned = true;  // nobody waits for it
      break;
    case Command::asking:
      heads_.append("*1\r\n$6\r\nASKING\r\n");
      waiting.abandoned = true;  // nor for this: a refusal shows in the command's own reply
      break;
    case Command::watch:
    case Command::range:
    case Command::multi:
    case Command::exec: break;  // push_step's
    case Command::set:
      append_array_header(heads_, 3 + operation.set_option_count);
      heads_.append("$3\r\nSET\r\n");
      append_bulk(heads_, operation.key);
      append_bulk_header(heads_, waiting.value_bytes);
      end_inline(begin);
      for (const Segment& segment : operation.value) {
        if (segment.size == 0) continue;
        pieces_.push_back({.external = segment.data, .size = segment.size});
        queued_ += segment.size;
      }
      ++stores_;
      unstored_ += waiting.value_bytes;
      begin = heads_.size();
      heads_.append("\r\n");
      heads_.append(operation.set_options);
      break;
  }
  end_inline(begin);
  waiting.end_byte = queued_;
  waiting_.push_back(waiting);
}

std::span<const iovec> Session::prepare_write(std::size_t most) noexcept {
  std::size_t count = 0;
  std::size_t skip = piece_sent_;
  for (const Piece& piece : pieces_) {
    if (count == write_iov_.size() || most == 0) break;
    // sendmsg does not write through the pointer; iovec has no const form.
    void* const data = piece.external ? const_cast<std::byte*>(piece.external) + skip
                                      : static_cast<void*>(heads_.data() + piece.offset + skip);
    const std::size_t size = std::min(most, piece.size - skip);
    write_iov_[count++] = {data, size};
    most -= size;
    skip = 0;
  }
  return {write_iov_.data(), count};
}

void Session::commit_write(std::size_t bytes) noexcept {
  written_ += bytes;
  while (bytes > 0) {
    const Piece& piece = pieces_.front();
    const std::size_t taken = std::min(bytes, piece.size - piece_sent_);
    bytes -= taken;
    piece_sent_ += taken;
    if (piece_sent_ == piece.size) {
      pieces_.pop_front();
      piece_sent_ = 0;
    }
  }
  if (pieces_.empty()) {
    heads_.clear();
    return;
  }
  // A connection that always has something to send never gets here with no pieces: drop the sent
  // part of heads_ once it outweighs what is left.
  const auto first = std::find_if(pieces_.begin(), pieces_.end(),
                                  [](const Piece& piece) { return !piece.external; });
  const std::size_t sent = first == pieces_.end() ? heads_.size() : first->offset;
  if (sent > 4096 && sent > heads_.size() / 2) {
    heads_.erase(0, sent);
    for (Piece& piece : pieces_) {
      if (!piece.external) piece.offset -= sent;
    }
  }
}

// --- receiving ---------------------------------------------------------------------------------

// How many bytes to read for the next head: up to the header of the next large value and no more,
// so that no byte of its body must be copied.
std::size_t Session::head_target() const noexcept {
  std::size_t bytes = 0;
  for (std::size_t i = reading_ == Reading::head ? 0 : 1; i < waiting_.size(); ++i) {
    const Waiting& waiting = waiting_[i];
    switch (waiting.command) {
      case Command::unwatch:
      case Command::asking:
      case Command::watch:
      case Command::multi: bytes += 5; break;  // +OK
      case Command::exec: bytes += 4; break;   // *0
      case Command::get:
      case Command::range:
        bytes += bulk_header_size(waiting.value_bytes);
        if (waiting.value_bytes > kSmallValue) return bytes;
        bytes += waiting.value_bytes + 2;
        if (bytes >= kScratchBytes) return kScratchBytes;
        break;
      default: return kScratchBytes;
    }
  }
  return kScratchBytes;
}

bool Session::into_value() const noexcept {
  return reading_ == Reading::body && !discard_ && body_left_ > 0;
}

std::span<const iovec> Session::prepare_read() noexcept {
  std::size_t count = 0;
  bool whole = true;
  if (into_value()) {
    // While a body is read into its value the scratch is empty: commit_read copied all it held.
    const auto& value = waiting_.front().value;
    std::size_t at = segment_at_;
    std::uint64_t left = body_left_;  // a range ends before its value does
    for (std::size_t i = segment_; left > 0; ++i, at = 0) {
      if (value[i].size == at) continue;
      if (count == read_iov_.size() - 1) {
        whole = false;
        break;
      }
      const std::size_t size = std::min<std::uint64_t>(left, value[i].size - at);
      read_iov_[count++] = {value[i].data + at, size};
      left -= size;
    }
  }
  if (begin_ == end_) {
    begin_ = end_ = 0;
  } else if (end_ > kScratchBytes / 2 || begin_ > kScratchBytes / 2) {
    std::memmove(scratch_.get(), scratch_.get() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (whole) {
    std::size_t want = kScratchBytes;
    if (reading_ == Reading::head) {
      // Part of the head may be here; always ask for at least one byte more.
      const std::size_t have = end_ - begin_;
      want = head_target() > have ? head_target() - have : kSmallValue;
    } else if (!discard_) {
      want = 2 + head_target();
    }
    read_iov_[count++] = {scratch_.get() + end_, std::min(want, kScratchBytes - end_)};
  }
  return {read_iov_.data(), count};
}

void Session::advance_value(std::size_t bytes) noexcept {
  body_left_ -= bytes;
  unread_ -= bytes;
  const auto& value = waiting_.front().value;
  while (bytes > 0) {
    const std::size_t taken = std::min(bytes, value[segment_].size - segment_at_);
    bytes -= taken;
    segment_at_ += taken;
    if (segment_at_ == value[segment_].size) {
      ++segment_;
      segment_at_ = 0;
    }
  }
}

Status Session::commit_read(std::size_t bytes) {
  if (into_value()) {
    const std::size_t direct = std::min<std::uint64_t>(bytes, body_left_);
    advance_value(direct);
    bytes -= direct;
  }
  end_ += bytes;
  for (;;) {
    const std::size_t have = end_ - begin_;
    switch (reading_) {
      case Reading::head: {
        const auto step =
            parser_.next({reinterpret_cast<const char*>(scratch_.get() + begin_), have});
        if (step.found == ReplyParser::Found::incomplete) return {};
        if (step.found == ReplyParser::Found::malformed) return protocol_error(step.why);
        begin_ += step.consumed;
        if (Status status = take_head(step.head); !status.ok()) return status;
        break;
      }
      case Reading::body: {
        std::size_t taken = std::min<std::uint64_t>(have, body_left_);
        if (discard_) {
          body_left_ -= taken;
        } else {
          for (std::size_t left = taken; left > 0;) {
            const Segment& segment = waiting_.front().value[segment_];
            const std::size_t part = std::min(left, segment.size - segment_at_);
            if (part > 0) {
              std::memcpy(segment.data + segment_at_, scratch_.get() + begin_ + (taken - left),
                          part);
            }
            left -= part;
            // An empty segment is stepped over by the next advance.
            if (part == 0) {
              ++segment_;
              segment_at_ = 0;
            } else {
              advance_value(part);
            }
          }
        }
        begin_ += taken;
        if (body_left_ > 0) return {};
        reading_ = Reading::body_end;
        break;
      }
      case Reading::body_end:
        if (have < 2) return {};
        if (std::memcmp(scratch_.get() + begin_, "\r\n", 2) != 0) {
          return protocol_error("no line break after a value");
        }
        begin_ += 2;
        reading_ = Reading::head;
        if (waiting_.front().reader) {
          complete_step(body_outcome_ == Outcome::hit);
        } else {
          complete(body_outcome_, body_bytes_);
        }
        break;
    }
  }
}

Status Session::take_head(const ReplyHead& head) {
  using Type = ReplyHead::Type;
  if (waiting_.empty()) return protocol_error("a reply that nobody asked for");
  const Waiting& front = waiting_.front();
  if (front.end_byte > written_) {
    // Answered before it was sent to its end. A server does so to refuse a request that it will
    // not read. The rest must not be sent, or read from memory that is the caller's again.
    if (head.type != Type::error) return protocol_error("a reply to what was not asked yet");
    pieces_.clear();
    Status refused{Code::connection_lost, std::string(head.text)};
    if (!front.reader) complete(Outcome::refused, 0, head.text);
    return refused;
  }
  if (front.reader) return take_step(head);
  const bool awaits_body = front.command == Command::get;
  if (awaits_body && (head.type != Type::bulk || head.value < 0)) unread_ -= front.value_bytes;
  if (head.type == Type::error) {
    complete(Outcome::refused, 0, head.text);
    return {};
  }
  switch (front.command) {
    case Command::get:
      if (head.type != Type::bulk) return protocol_error("GET was not answered by a bulk string");
      if (head.value < 0) {
        complete(Outcome::miss);
        return {};
      }
      reading_ = Reading::body;
      segment_ = 0;
      segment_at_ = 0;
      body_left_ = static_cast<std::uint64_t>(head.value);
      body_bytes_ = head.value;
      body_outcome_ = body_left_ == front.value_bytes ? Outcome::hit : Outcome::size_mismatch;
      discard_ = front.abandoned || body_outcome_ == Outcome::size_mismatch;
      if (discard_) unread_ -= front.value_bytes;
      return {};
    case Command::server:
    case Command::memory:
      if (head.type == Type::array) return protocol_error("INFO was answered by an array");
      if (head.type != Type::bulk || head.value < 0) {
        complete(Outcome::miss);
        return {};
      }
      reading_ = Reading::body;
      segment_ = 0;
      segment_at_ = 0;
      body_left_ = static_cast<std::uint64_t>(head.value);
      body_bytes_ = head.value;
      body_outcome_ = body_left_ <= front.value_bytes ? Outcome::hit : Outcome::size_mismatch;
      discard_ = body_outcome_ == Outcome::size_mismatch;
      if (!discard_) unread_ += body_left_;
      return {};
    case Command::set:
      if (head.type == Type::simple && head.text == "OK") {
        complete(Outcome::hit);
      } else if (head.type == Type::bulk && head.value < 0) {
        complete(Outcome::miss);
      } else {
        return protocol_error("SET was answered by neither OK nor nil");
      }
      return {};
    case Command::exists:
    case Command::unlink:
      if (head.type != Type::integer) return protocol_error("no integer where one was due");
      complete(head.value > 0 ? Outcome::hit : Outcome::miss);
      return {};
    case Command::ping:
    case Command::unwatch:
    case Command::asking:
      if (head.type != Type::simple) return protocol_error("no simple string where one was due");
      complete(Outcome::hit);
      return {};
    case Command::watch:
    case Command::range:
    case Command::multi:
    case Command::exec: break;  // take_step's
  }
  return protocol_error("unknown command");
}

Status Session::protocol_error(std::string_view why) const {
  std::string detail(why);
  detail += ": ";
  // A few bytes help whoever must find the culprit; more could be a value.
  for (std::size_t i = begin_; i < std::min(end_, begin_ + 16); ++i) {
    const auto c = std::to_integer<unsigned char>(scratch_[i]);
    if (c >= 0x20 && c < 0x7f) {
      detail.push_back(static_cast<char>(c));
    } else {
      constexpr char kHex[] = "0123456789abcdef";
      detail += {'\\', 'x', kHex[c >> 4], kHex[c & 15]};
    }
  }
  return {Code::protocol_error, std::move(detail)};
}

void Session::complete(Outcome outcome, std::int64_t actual_bytes, std::string_view error) {
  const Waiting& front = waiting_.front();
  if (front.command == Command::set || front.command == Command::unlink) --stores_;
  if (front.command == Command::set) unstored_ -= front.value_bytes;
  if (!front.abandoned) {
    completed_.push_back(
        {front.ticket, outcome, actual_bytes, std::string(error.substr(0, kMaxError))});
  }
  waiting_.pop_front();
}

// --- giving up ---------------------------------------------------------------------------------

Session::Abandoned Session::abandon(const void* owner) noexcept {
  Abandoned result;
  for (Waiting& waiting : waiting_) {
    if (waiting.abandoned || waiting.ticket.owner != owner) continue;
    if (waiting.command == Command::set && waiting.end_byte > written_) result.usable = false;
    waiting.abandoned = true;
    if (&waiting == &waiting_.front() && reading_ == Reading::body && !discard_) {
      discard_ = true;
      unread_ -= body_left_;
    }
    if (waiting.reader) continue;
    ++result.released;
    result.sent |= written_ > waiting.first_byte;
  }
  for (Reader& reader : readers_) {
    if (reader.abandoned || reader.operation.ticket.owner != owner) continue;
    if (!reader.asked && reader.operation.ranges->snapshot()) unwatch_due_ = true;
    reader.abandoned = reader.asked = true;
    reader.operation.ranges->spoil(Outcome::torn);
    if (reader.operation.ranges->leave()) ++result.released;
  }
  complete_readers();
  return result;
}

bool Session::owes_given_up() const noexcept {
  const auto first = std::find_if(waiting_.begin(), waiting_.end(),
                                  [](const Waiting& one) { return one.ticket.owner; });
  return first != waiting_.end() && first->abandoned;
}

bool Session::is_nobodys(const Waiting& one) noexcept {
  return one.abandoned || (one.reader && one.reader->abandoned);
}

bool Session::owes_nobody() const noexcept {
  const auto first = std::find_if(waiting_.begin(), waiting_.end(),
                                  [](const Waiting& one) { return one.ticket.owner; });
  return first != waiting_.end() && is_nobodys(*first);
}

bool Session::asks_memory() const noexcept {
  return std::any_of(waiting_.begin(), waiting_.end(), [this](const Waiting& waiting) {
    return waiting.command == Command::memory && written_ > waiting.first_byte;
  });
}

bool Session::waited_for() const noexcept {
  return std::any_of(waiting_.begin(), waiting_.end(),
                     [](const Waiting& one) { return one.ticket.owner && !is_nobodys(one); });
}

bool Session::holds_unrepeatable() const noexcept {
  return std::any_of(waiting_.begin(), waiting_.end(), [this](const Waiting& one) {
    return !one.repeatable && !one.abandoned && written_ > one.first_byte;
  });
}

bool Session::holds_returned() const noexcept {
  return std::any_of(waiting_.begin(), waiting_.end(), [](const Waiting& one) {
    return (one.reader ? one.reader->operation.returned : one.returned) && !is_nobodys(one);
  });
}

const std::vector<Session::Lost>& Session::reset(const Status& why, bool counted) noexcept {
  std::vector<Lost>& lost = lost_;
  lost.clear();
  if (counted && why.code == Code::connection_lost) note_hang_up();
  for (const Waiting& waiting : waiting_) {
    if (waiting.abandoned || !waiting.ticket.owner || waiting.reader) continue;
    lost.push_back({waiting.ticket, written_ > waiting.first_byte});
  }
  for (const Reader& reader : readers_) {
    if (reader.abandoned) continue;
    // A helper that waits for its WATCH takes nothing with it.
    if (reader.reading || !reader.operation.helping) reader.operation.ranges->lose(why, counted);
    if (!reader.operation.ranges->leave()) continue;
    const bool whole = reader.operation.ranges->outcome() == Outcome::hit;
    lost.push_back({reader.operation.ticket, written_ > reader.first_byte, !whole});
  }
  waiting_.clear();
  readers_.clear();
  news_ = false;
  unwatch_due_ = false;
  completed_.clear();
  heads_.clear();
  pieces_.clear();
  piece_sent_ = 0;
  stores_ = 0;
  queued_ = written_ = unstored_ = unread_ = 0;
  parser_ = {};
  reading_ = Reading::head;
  begin_ = end_ = 0;
  return lost;
}

}  // namespace fastkv
