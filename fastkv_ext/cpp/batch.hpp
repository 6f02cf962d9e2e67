// One call of a user: its keys, its memory, what became of each key. Filled by the caller, then
// shared with the workers until its last operation is finished. Takes no decision: the Schedule
// says which operation runs when.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "completion_queue.hpp"
#include "session.hpp"
#include "slots.hpp"
#include "status.hpp"

namespace fastkv {

using Clock = std::chrono::steady_clock;

// What wins when a connection asks for work, highest first.
enum class Priority : std::uint8_t { lookup, retrieve, store };
inline constexpr std::size_t kPriorities = 3;

// redis-py's Retry, as far as an operation is concerned.
struct RetryPolicy {
  std::int64_t retries = 0;  // below 0: for ever
  // Before the first attempt after a loss, the second ...; the last delay serves all later ones.
  std::vector<std::chrono::duration<double>> delays;
  bool connection_lost = true;
  bool stalled = true;
  // Error replies that start with one of these count as a lost connection ("LOADING").
  std::vector<std::string> error_replies;
};

class Batch {
 public:
  struct Failure {
    std::uint32_t index = 0;
    std::int64_t actual_bytes = 0;
    std::string error;
  };

  explicit Batch(Command command) : command_(command) {}

  // Filling, before submit: one thread.
  void reserve(std::size_t keys) { key_ends_.reserve(keys); }
  void add_key(std::string_view key);
  void add_segment(void* data, std::size_t size) {
    segments_.push_back({static_cast<std::byte*>(data), size});
  }
  void end_value() { value_ends_.push_back(segments_.size()); }
  void add_set_option(std::string_view argument);
  void forbid_repeat() noexcept { repeatable_ = false; }
  // No value is read in ranges.
  void read_whole() noexcept { whole_ = true; }
  // The keys go to a node of a cluster that is about to get their slots, and nothing may stand
  // between ASKING and the command: no ranges.
  void ask() noexcept { asking_ = whole_ = true; }
  // No value changes while it is read: no snapshot is needed.
  void promise_immutable() noexcept { immutable_ = true; }

  // One call over the nodes of a cluster: the batch itself is never submitted. Parts of it are,
  // each to one node, until every key has an answer. The memory is the whole's.
  //
  // For each owner of slots, the keys that it serves; those that nobody does come last.
  std::vector<std::vector<std::uint32_t>> route(const SlotMap& map,
                                                std::span<const std::uint32_t> indices) const;
  std::shared_ptr<Batch> part(std::vector<std::uint32_t> indices) const;
  // A part has completed: takes over its answers. What is left has to be sent again.
  struct Rest {
    std::vector<std::uint32_t> unanswered;  // by index in the whole
    std::vector<Failure> redirected;
  };
  Rest take(const Batch& part);

  // Before the first answer.
  void prepare_outcomes() { outcomes_.assign(size(), Outcome::unanswered); }

  Command command() const noexcept { return command_; }
  bool immutable() const noexcept { return immutable_; }
  Priority priority() const noexcept;
  std::size_t size() const noexcept { return key_ends_.size(); }
  std::string_view key(std::size_t index) const noexcept;
  std::uint64_t value_bytes(std::size_t index) const noexcept;
  bool repeatable() const noexcept { return repeatable_; }
  // Whether the value is to be read in ranges.
  bool in_ranges(std::size_t index) const noexcept;
  // Of a value in ranges: see RangedValue::is_small(), and `in_parts` there.
  bool is_small(std::size_t index) const noexcept;
  Operation operation(std::uint32_t index, bool in_parts = false);
  // A read in ranges was of no use. After two torn ones, or one misfit, the value is read whole.
  void note_range_failure(std::uint32_t index, Outcome outcome) noexcept;

  // True if an error reply is one that the policy treats as a lost connection.
  bool retried_by_policy(std::string_view error) const noexcept;

  // Workers. Each index is answered once, by the worker that carries it.
  void answer(std::uint32_t index, Outcome outcome) noexcept { outcomes_[index] = outcome; }
  // False: there was no memory for its failure.
  bool answer(Completed&& completed) noexcept;

  // The caller, after completion.
  Outcome outcome(std::size_t index) const noexcept { return outcomes_[index]; }
  std::span<const Outcome> outcomes() const noexcept { return outcomes_; }
  bool all_answered_plainly() const noexcept { return failures_.empty(); }
  const std::vector<Failure>& failures() const noexcept { return failures_; }
  const Status& status() const noexcept { return status_; }

 private:
  friend class Inbox;
  friend class Schedule;

  // immutable after submit
  const Command command_;
  bool repeatable_ = true;
  bool immutable_ = false;
  bool whole_ = false;
  bool asking_ = false;
  std::vector<std::uint32_t> places_;  // of a part: the keys' indices in the whole
  std::uint64_t range_bytes_ = 0;
  std::string keys_;  // all keys, one after the other
  std::vector<std::size_t> key_ends_;
  std::vector<Segment> segments_;  // all values' segments, one after the other
  std::vector<std::size_t> value_ends_;
  std::string set_options_;
  std::size_t set_option_count_ = 0;
  std::uint64_t id_ = 0;
  // Shared: the caller may drop its queue while the batch is still on its way there.
  std::shared_ptr<CompletionQueue> queue_;
  // Shared: one policy serves many batches, and outlives a change of the client's.
  std::shared_ptr<const RetryPolicy> retry_;
  Clock::time_point submitted_;
  std::optional<Clock::time_point> deadline_;
  // [i], guarded by the mutex of worker i's inbox: the batch itself, which stands there since it
  // was abandoned, and whoever stands behind it. Shared: the batch may complete, and its caller
  // drop it, before every worker has looked.
  struct Link {
    std::shared_ptr<Batch> self;
    Batch* next = nullptr;
  };
  std::vector<Link> links_;

  // guarded by Schedule::mutex_
  std::size_t cursor_ = 0;            // the first operation that was never pulled
  std::vector<std::uint32_t> again_;  // operations that came back from a lost connection
  struct Past {
    std::uint32_t attempts = 0;
    Clock::time_point silent_since{};  // see Schedule::requeue
  };
  std::vector<Past> past_;   // empty until an operation is lost
  Status status_;            // not ok: the batch failed as a whole
  bool abandoned_ = false;   // its memory must not be used for new operations
  bool queued_ = false;      // it stands in a queue
  std::size_t dropped_ = 0;  // operations that nobody pulled before it was abandoned
  // Of those that were abandoned at once. Through the batches, as the next: to end them takes no
  // memory.
  std::shared_ptr<Batch> next_abandoned_;
  std::size_t delayed_ = 0;  // operations that wait for their next attempt

  // Counted down by workers; the one that reaches 0 completes the batch.
  std::atomic<std::size_t> unfinished_{0};

  std::vector<Outcome> outcomes_;             // [i]: the worker that carries i, then the caller
  std::vector<std::uint8_t> range_failures_;  // [i]: the worker that carries i
  std::mutex failures_mutex_;
  std::vector<Failure> failures_;  // guarded by failures_mutex_ until completion
};

}  // namespace fastkv
