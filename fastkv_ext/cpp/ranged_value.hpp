// A large value on its way in ranges, read by one connection or by several at once. Says which
// range is asked for next, and what became of the whole. No sockets, threads, clocks or locks;
// any thread.
//
// That all connections lead to one server is the caller's business (see Schedule::offer).
//
// All ranges are of one version, by optimistic locking
// (https://redis.io/docs/latest/develop/reference/transactions/). Each reader sends WATCH key, its
// ranges, MULTI, EXEC, and EXEC is answered by an empty array only if nobody touched the key since
// that WATCH. So what one reader got is of one version. What all got is, too: they claim ranges
// only when the WATCH of every reader so far has been answered, and send EXEC when no range is
// left. All their unchanged intervals hold the moment at which the last range was claimed.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "status.hpp"

namespace fastkv {

class RangedValue {
 public:
  // The first range asked for is the value's end. It tells a missing, shorter or longer value from
  // the right one for the price of 2 KiB. And it moves the others off the server's page grid:
  //
  //     |0 ... range_bytes + 2 KiB | range_bytes | ... | rest | last 2 KiB |
  //       second                     third                      first
  //
  // A rest of up to half a range belongs to the one before it: two requests for 512 and 100 KiB
  // take longer than one.
  //
  // A server keeps a large value, and the reply that it copies it to, a few bytes behind the
  // beginning of a page each. Some processors are two to four times slower at `rep movsb`, the C
  // library's copy of large blocks, if the destination lies less than 64 bytes ahead of the source
  // in that sense (AMD Zen 3 to 5; https://sourceware.org/bugzilla/show_bug.cgi?id=30994).
  static constexpr std::uint64_t kEndBytes = 2048;

  // For a server that pays for large replies, a value of less than four ranges is read `in_parts`:
  // as few equal ones as have half a range each at most.
  static bool is_small(std::uint64_t bytes, std::uint64_t range_bytes) noexcept {
    return bytes / 4 < range_bytes;
  }

  // `bytes` is more than kEndBytes.
  RangedValue(std::uint64_t bytes, std::uint64_t range_bytes, bool snapshot,
              bool in_parts = false) noexcept;

  bool snapshot() const noexcept { return snapshot_; }
  bool in_parts() const noexcept { return in_parts_; }
  // Whether there is enough of it for others to help.
  bool divisible() const noexcept { return ranges_ > 3; }

  struct Range {
    std::uint64_t first = 0;
    std::uint64_t bytes = 0;
    bool to_end = false;
  };
  // A range that nobody has asked for. None if there are no more, or the others would be of no use.
  std::optional<Range> claim() noexcept;
  bool exhausted() const noexcept;

  // The owner, who reads from the start, says when others may help: at once if no snapshot is
  // wanted, else when its WATCH has been answered.
  void open() noexcept { open_ = true; }
  // Another reader comes. False if there is nothing left that is worth it.
  bool worth_joining() const noexcept;
  bool join() noexcept;
  // A reader goes: none of its ranges is on its way any more. True: it was the last one, and
  // outcome() stands.
  bool leave() noexcept;

  // `torn`, `misfit`, or `lost`: a connection that read it broke. The first one counts.
  void spoil(Outcome outcome) noexcept;
  void lose(const Status& why, bool counted) noexcept;
  Outcome outcome() const noexcept { return outcome_; }
  // After `lost`, and the last leave().
  const Status& loss() const noexcept { return loss_; }
  bool loss_counted() const noexcept { return loss_counted_; }

 private:
  const std::uint64_t bytes_;
  const std::uint64_t range_bytes_;
  const std::uint32_t ranges_;
  const bool snapshot_;
  const bool in_parts_;
  // Sequentially consistent, all of them: once a claim fails or exhausted() is true, every claim
  // that succeeded, and the open() before it, has happened.
  std::atomic<std::uint32_t> claimed_{0};
  std::atomic<bool> open_;
  std::atomic<std::uint32_t> readers_{1};
  std::atomic<Outcome> outcome_{Outcome::hit};
  // Written by the reader whose lose() came first, read after the last leave().
  Status loss_;
  bool loss_counted_ = false;
};

}  // namespace fastkv
