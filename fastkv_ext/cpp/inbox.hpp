// What one worker is told by all other threads, and by what it is woken.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "batch.hpp"
#include "fd.hpp"
#include "stream.hpp"

namespace fastkv {

// Which priorities a lane serves, as bits.
using PrioritySet = std::uint8_t;
constexpr PrioritySet priority_bit(Priority p) noexcept {
  return static_cast<PrioritySet>(1u << static_cast<unsigned>(p));
}
constexpr PrioritySet without(PrioritySet set, Priority p) noexcept {
  return static_cast<PrioritySet>(set & ~priority_bit(p));
}
inline constexpr PrioritySet kLookups = priority_bit(Priority::lookup);
inline constexpr PrioritySet kValues =
    priority_bit(Priority::retrieve) | priority_bit(Priority::store);

struct Adopt {  // a connected lane
  std::uint32_t lane = 0;
  std::unique_ptr<Stream> stream;
  Clock::duration stall_timeout{};    // 0: none
  Clock::duration health_interval{};  // 0: none
};
struct ConnectFailed {
  std::uint32_t lane = 0;
  Clock::duration delay{};  // before it is asked for again
};
using Message = std::variant<Adopt, ConnectFailed>;

class Inbox {
 public:
  // Set by the worker before it looks for work and sleeps, read by whoever queues work. Both sides
  // are sequentially consistent, and so is Schedule::queued_: either the worker sees the work, or
  // the other side sees that it must wake the worker.
  std::atomic<bool> asleep{false};
  PrioritySet priorities = 0;  // what its lanes serve; immutable after start

  // Under Schedule::fork_mutex. Throws std::bad_alloc.
  void post(Message message);
  void abandon(const std::shared_ptr<Batch>& batch, std::size_t worker) noexcept;
  void stop() noexcept;
  void wake() noexcept;
  // The worker's: a descriptor to sleep on, whether a letter came, and which. The look clears the
  // wake-up first, so that a later message signals again.
  int fd() const noexcept { return event_.fd(); }
  bool look() noexcept;
  struct Letter {
    std::vector<Message> messages;
    bool stop = false;
    void close_after_fork() noexcept;
  };
  Letter take() noexcept;  // under Schedule::fork_mutex
  // Behind look(): the batches that were abandoned, one a call, null when there is none left.
  std::shared_ptr<Batch> take_abandoned(std::size_t worker) noexcept;
  // No wake-up afterwards. Under the mutex, because a caller that is late with one must not write
  // to a descriptor that is somebody else's by then.
  void close() noexcept;
  // In a child, where a thread that holds the mutex does not exist. In order: the fork mutex was
  // held.
  void close_after_fork(bool in_order) noexcept;

 private:
  EventFd event_;  // signalled and closed under mutex_
  std::mutex mutex_;
  // guarded by mutex_
  Letter letter_;
  Batch* abandoned_ = nullptr;  // see Batch::links_
};

}  // namespace fastkv
