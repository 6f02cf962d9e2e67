// One thread with its epoll set, its connections and its clock: the only loop. Pulls operations
// from the Schedule for every connection with room, moves bytes between Stream and Session, and
// reports what completed. Never calls Python.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "batch.hpp"
#include "fd.hpp"
#include "inbox.hpp"
#include "schedule.hpp"
#include "session.hpp"
#include "stream.hpp"

namespace fastkv {

// How much a connection may carry at once, and in which pieces.
struct Window {
  std::uint64_t bytes = 0;
  std::size_t requests = 0;
  std::uint64_t range_bytes = 0;
  // Instead of `bytes`, of loads from a server that answers at once: no round trip must be hidden,
  // and what waits in replies and sockets leaves the caches. 0: `bytes`.
  std::uint64_t near_load_bytes = 0;
  // Smaller ranges, if the server's allocator wants them: see Worker::learn_allocator().
  bool fits_allocator = false;
};

class Worker {
 public:
  // Serves the lanes whose number is `index` modulo the number of workers.
  Worker(std::size_t index, Schedule& schedule, Window window);

  void start();
  void join();
  // In a child after fork, where the thread does not exist.
  void close_fds_after_fork(bool in_order) noexcept;

 private:
  enum class State : std::uint8_t { absent, requested, connected };
  // One connection for as long as the engine lives, through all its reconnects.
  struct Lane {
    std::uint32_t number = 0;
    PrioritySet priorities = 0;
    State state = State::absent;
    bool reconnects = false;         // it was connected before
    std::unique_ptr<Stream> stream;  // changes under Schedule::fork_mutex
    Session session;
    std::uint64_t generation = 0;  // if not the schedule's: pull no more, drop it when idle
    // INFO server, asked for at the first value that is shared as a snapshot.
    bool server_asked = false;
    std::string server;  // its run id; empty: unknown
    std::string server_reply;
    Segment server_target;
    bool asked_idle = false;      // nothing was on its way, and nothing has come since
    bool fresh = false;           // adopted since the last feed()
    bool closed_at_once = false;  // one was closed while it was, and none has answered since
    bool checking = false;        // a health check is on its way; pull when it is answered
    bool polls_write = false;     // registered for EPOLLOUT
    bool reads_on = false;        // see Stream::holds_bytes
    Clock::duration stall_timeout{};
    Clock::duration health_interval{};
    // When a byte last moved that is part of the oldest request or of its reply, or the wait for
    // one began.
    Clock::time_point progress;
    // From then on what came back to it has waited for an answer for a stall time-out, on this and
    // on those that were. It is to wait for one more at most: the connection is not dropped for
    // others' sake.
    Clock::time_point kept_from = Clock::time_point::max();
    Clock::duration waited{};    // ... and for so long before it came to this one
    Clock::time_point retry_at;  // absent: not to be asked for before
    Clock::time_point help_at;   // likewise, if it is only to help others
  };

  void run() noexcept;
  void loop();
  bool handle_messages();
  void adopt(Lane& lane, Adopt&& message);
  void receive(Lane& lane);
  void receive_some(Lane& lane);
  void transmit(Lane& lane);
  void poll_as_needed(Lane& lane);
  void settle(Lane& lane) noexcept;
  void feed(Lane& lane);
  void carry(Lane& lane);
  std::uint64_t load_window(const Lane& lane) const noexcept;
  void ask_allocator(Lane& lane);
  void learn_allocator(const Completed& reply) noexcept;
  void ask_server(Lane& lane);
  void learn_server(Lane& lane, const Completed& reply) noexcept;
  void lose(Lane& lane, const Status& why, bool counted) noexcept;
  void give_back(const Lane& lane, const Ticket& ticket, bool sent, bool counted,
                 const Status& why) noexcept;
  void abandon(Batch& batch) noexcept;
  int next_timeout() const;
  bool naps_are_fine() const noexcept;
  bool is_soon_answered() const noexcept;
  void look_at_cpu(const Lane& lane) noexcept;
  bool is_in_doubt(const Lane& lane) const noexcept;
  static Clock::duration doubt_patience(const Lane& lane) noexcept;
  static Clock::duration silence(const Lane& lane) noexcept;
  void check_stalls();
  void finished(Batch* batch) noexcept;
  void flush_finished() noexcept;
  Lane* lane_of(std::uint32_t number) noexcept;

  const std::size_t index_;
  Schedule& schedule_;
  const Window window_;
  const bool can_nap_;
  UniqueFd epoll_;
  std::thread thread_;
  Inbox::Letter letter_;  // changes under Schedule::fork_mutex

  // worker thread only
  std::vector<std::unique_ptr<Lane>> lanes_;  // lookup lanes first
  Clock::time_point now_;
  // Finished operations of one batch, counted here first: one atomic for many replies.
  Schedule::Run carried_;         // pulled, and not in a session yet
  bool turn_again_ = false;       // something changed that the loop must look at before it sleeps
  bool waits_are_short_ = false;  // see kNap
  // See kSharedLooks.
  int shared_looks_ = 0;
  std::optional<int> shared_cpu_;  // to be left
  Clock::time_point left_at_;      // when it was last decided
  Clock::time_point apart_at_;     // when the server was last seen elsewhere
  Clock::time_point leave_at_;     // not before
  Clock::duration leave_pause_{};
  std::optional<Clock::time_point> stores_held_until_;
  std::string allocator_reply_;  // of the one question
  Segment allocator_target_;
  Batch* finished_batch_ = nullptr;
  std::size_t finished_count_ = 0;
};

}  // namespace fastkv
