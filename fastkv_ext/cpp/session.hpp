// The protocol of one connection, without the connection: what to send, where the next bytes must
// land, which operation each reply completes. No sockets, threads, clocks or locks, so a test or a
// fuzzer can drive it. Single-threaded: a worker owns it.
//
// Bytes from the peer land in two places. Small things (heads, CRLFs, and what came with them) go
// through the scratch; the rest of a value goes straight to the caller's memory:
//
//     $4\r\n d a t a \r\n $4\r\n ...           scratch: [0 .. begin_ .. end_ .. kScratchBytes)
//     '----' '-----' '---------'                         parsed  unread  free
//     scratch target  tail of the same readv: CRLF and the next head, no byte of the next body
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ranged_value.hpp"
#include "resp.hpp"
#include "status.hpp"

namespace fastkv {

// A stretch of a caller's memory. A value is one or more of them, in order.
struct Segment {
  std::byte* data = nullptr;
  std::size_t size = 0;
};

enum class Command : std::uint8_t {
  get,
  set,
  exists,
  unlink,
  ping,
  asking,
  // INFO server and INFO memory, whose reply fits in the value if it hits.
  server,
  memory,
  // Steps of a GET in ranges.
  unwatch,
  watch,
  range,
  multi,
  exec,
};

// Names an operation for its owner; the session only hands it back.
struct Ticket {
  void* owner = nullptr;  // null: the worker's own
  std::uint32_t index = 0;
};

struct Operation {
  Command command = Command::get;
  Ticket ticket;
  std::string_view key;            // read during push(), or until the last range is asked for
  std::span<const Segment> value;  // get, set: used until the operation completes
  // get: read it in ranges; null: whole. Shared with other connections that read the same value.
  std::shared_ptr<RangedValue> ranges;
  bool helping = false;          // ... that another connection has begun
  bool asking = false;           // ask a node of a cluster that does not own the slot yet
  bool repeatable = true;        // false: it may change more if it is sent twice
  bool returned = false;         // it was on another connection, and got no answer there
  std::string_view set_options;  // set: arguments after the value, already RESP bulk strings
  std::size_t set_option_count = 0;
};

struct Completed {
  Ticket ticket;
  Outcome outcome = Outcome::unanswered;
  // size_mismatch: the length of the value that the server has; `server`: of the reply.
  std::int64_t actual_bytes = 0;
  std::string error;  // refused: the error line
  // lost: what happened.
  std::shared_ptr<RangedValue> ranges;
};

class Session {
 public:
  static constexpr std::size_t kScratchBytes = std::size_t{64} << 10;
  static constexpr std::size_t kMaxIov = 64;
  // What is kept of an error line: a server that answers every key of a batch with the longest one
  // must not fill our memory.
  static constexpr std::size_t kMaxError = 1024;

  Session();

  // Appends a request. Its reply will be expected after those of all earlier ones. Not while the
  // ranges of an earlier one are still to be asked for.
  void push(const Operation& operation);

  // A value in ranges is one request after the other, as long as fewer than `window` bytes are
  // outstanding: asked for all at once, the server would build the whole value before it sends.
  // May complete an operation, too.
  void pump(std::uint64_t window);
  bool pumping() const noexcept { return !readers_.empty() && !readers_.back().asked; }
  bool pumping_parts() const noexcept {
    return pumping() && readers_.back().operation.ranges->in_parts();
  }
  // Since the last call, something happened to a value that others read or could read, too: have
  // them pump().
  bool take_news() noexcept { return std::exchange(news_, false); }
  // A server, proxy or ACL has refused a command that ranges need, or has hung up on the first of
  // them, as some proxies do on what they do not know. Whether it will the next time,
  // too, no wording says for certain: one value is read whole by a plain GET, and after each
  // further refusal in a row twice as many, before ranges are tried again. Survives reset(), or
  // each reconnect would try at once.
  bool ranges_refused() const noexcept { return whole_left_ > 0; }
  // The same, asked for a value that would be read in ranges, and counted.
  bool read_whole() noexcept {
    if (whole_left_ == 0) return false;
    --whole_left_;
    return true;
  }
  // Once, when it is no single event: the error line.
  std::string take_refusal() noexcept { return std::exchange(refusal_, {}); }

  // What to send next, in order, at most so many bytes; commit_write says how much of it went out.
  std::span<const iovec> prepare_write(std::size_t most = SIZE_MAX) noexcept;
  void commit_write(std::size_t bytes) noexcept;

  // Where the next bytes must land; commit_read says how many came. A failure means that the peer
  // does not speak our protocol, or will not read what we send: the connection must be dropped,
  // after completed() was looked at. Code::closed: so it must, but nothing was the matter with it.
  std::span<const iovec> prepare_read() noexcept;
  Status commit_read(std::size_t bytes);

  // What commit_read completed, oldest first. The caller clears it.
  std::vector<Completed>& completed() noexcept { return completed_; }

  // Gives up the memory of all operations of `owner`: it is neither read nor written afterwards.
  // Their replies are discarded in step when they come. `usable` is false if a SET of theirs was
  // not sent to its end: then the connection must be dropped.
  struct Abandoned {
    std::size_t released = 0;
    bool usable = true;
    bool sent = false;  // a byte of one of their requests
  };
  Abandoned abandon(const void* owner) noexcept;

  // The connection is gone: what was not completed, oldest first, and whether any byte of its
  // request was sent. The session can be used for a new connection afterwards.
  struct Lost {
    Ticket ticket;
    bool sent = false;
    bool counted = true;  // if not, another connection has read all of it
  };
  // `why` and `counted`: for what others read, too, and will find out later. Good until the next
  // push().
  const std::vector<Lost>& reset(const Status& why, bool counted) noexcept;

  std::size_t requests() const noexcept { return waiting_.size(); }
  // Those of them that only change something: SET and UNLINK.
  std::size_t stores() const noexcept { return stores_; }
  // Value bytes on their way: asked for and not yet read, and twice those of SETs that are not
  // answered, which wait in two socket buffers and are cold when the server gets to them.
  std::uint64_t outstanding_bytes() const noexcept { return unread_ + 2 * unstored_; }
  // The peer will send at least so many bytes more.
  std::uint64_t sure_bytes() const noexcept {
    return reading_ == Reading::body ? body_left_ + 2 : 1;
  }
  bool has_unsent() const noexcept { return written_ != queued_; }
  // The oldest request is out: what is written now belongs to others, and moves it no further.
  bool awaits_reply() const noexcept {
    return !waiting_.empty() && waiting_.front().end_byte <= written_;
  }
  // The next reply is to an operation that was given up, or to one of the worker's own before it.
  bool owes_given_up() const noexcept;
  // The same, or it is to a step for a value that others have read meanwhile.
  bool owes_nobody() const noexcept;
  // The question about the server's memory is on its way.
  bool asks_memory() const noexcept;
  // Somebody waits for a reply ...
  bool waited_for() const noexcept;
  // ... to what must not be sent again.
  bool holds_unrepeatable() const noexcept;
  // ... to what came back from another connection.
  bool holds_returned() const noexcept;

 private:
  // Our part in a GET in ranges. Its steps stand in waiting_, and point here.
  struct Reader {
    Operation operation;
    std::uint64_t first_byte = 0;   // as in Waiting
    std::size_t unanswered = 0;     // steps pushed and not answered
    bool watched = false;           // WATCH was answered
    bool reading = false;           // a range was pushed
    bool answered = false;          // a step was, at least the beginning
    bool asked = false;             // no more steps follow
    std::uint32_t tried_after = 0;  // refusals_, when it was begun
    bool refused = false;           // a step was
    bool multi_refused = false;     // then EXEC is, too, and no transaction is open
    bool abandoned = false;
  };
  struct Waiting {
    Ticket ticket;
    Command command = Command::get;
    bool abandoned = false;
    bool repeatable = true;
    bool returned = false;
    // Where the request begins and ends in the stream of all requests.
    std::uint64_t first_byte = 0;
    std::uint64_t end_byte = 0;
    std::span<const Segment> value;
    std::uint64_t value_bytes = 0;  // from here in `value` on:
    std::size_t segment = 0;
    std::size_t segment_at = 0;
    Reader* reader = nullptr;
  };
  // A stretch of the request stream: bytes of heads_ (external is null) or of a caller's value.
  struct Piece {
    const std::byte* external = nullptr;
    std::size_t offset = 0;
    std::size_t size = 0;
  };
  enum class Reading : std::uint8_t { head, body, body_end };

  static bool is_nobodys(const Waiting& one) noexcept;
  void end_inline(std::size_t begin);
  Waiting& push_step(Reader& reader, Command command, const RangedValue::Range& range = {});
  void push_range(Reader& reader, const RangedValue::Range& range);
  void retire(Reader& reader);
  std::size_t head_target() const noexcept;
  bool into_value() const noexcept;
  void advance_value(std::size_t bytes) noexcept;
  Status take_head(const ReplyHead& head);
  Status protocol_error(std::string_view why) const;
  Status take_step(const ReplyHead& head);
  void refuse(Reader& reader, std::string_view line);
  void note_hang_up() noexcept;
  void complete_step(bool fits);
  void complete_readers();
  void complete(Outcome outcome, std::int64_t actual_bytes = 0, std::string_view error = {});

  std::vector<Lost> lost_;  // has room for all of the next two: their end takes no memory
  std::deque<Waiting> waiting_;
  std::deque<Reader> readers_;  // elements do not move
  bool news_ = false;
  std::uint32_t refusals_ = 0;    // of readers, with none between that was not refused
  std::uint64_t whole_left_ = 0;  // values to read whole before ranges are tried again
  std::string refusal_;
  bool unwatch_due_ = false;  // a WATCH was left without its EXEC
  std::vector<Completed> completed_;

  // Sending.
  std::string heads_;
  std::deque<Piece> pieces_;
  std::size_t piece_sent_ = 0;  // bytes of pieces_.front() that are out
  std::uint64_t queued_ = 0;    // bytes of requests ever pushed, and ever written
  std::uint64_t written_ = 0;
  std::size_t stores_ = 0;      // waiting_ SETs and UNLINKs
  std::uint64_t unstored_ = 0;  // value bytes of SETs that are not answered
  std::array<iovec, kMaxIov> write_iov_;

  // Receiving.
  ReplyParser parser_;
  Reading reading_ = Reading::head;
  std::uint64_t body_left_ = 0;  // reading body: bytes still to come
  bool discard_ = false;         // reading body: it fits nowhere, drop it
  Outcome body_outcome_ = Outcome::unanswered;
  std::int64_t body_bytes_ = 0;
  std::size_t segment_ = 0;  // where the next body byte goes, in waiting_.front().value
  std::size_t segment_at_ = 0;
  std::uint64_t unread_ = 0;
  std::unique_ptr<std::byte[]> scratch_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::array<iovec, kMaxIov> read_iov_;
};

}  // namespace fastkv
