// Ids of completed batches, on their way to the one caller that waits for them. A caller (an event
// loop, a blocking thread, an adapter) owns one queue and sleeps on its descriptor. Knows neither
// RESP nor sockets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "fd.hpp"

namespace fastkv {

class CompletionQueue {
 public:
  int fd() const noexcept { return event_.fd(); }

  // Any thread. Makes room for a push that will come: it must not fail. Throws std::bad_alloc.
  void expect();
  void forget() noexcept;  // it will not come
  // Any thread, as often as was expected. Wakes the caller unless earlier ids still wait to be
  // drained: they share a wake-up.
  void push(std::uint64_t batch_id) noexcept;

  // The caller: the oldest id, until there is none. Takes no memory. A wake-up may come for an
  // empty queue, never the reverse.
  std::optional<std::uint64_t> next() noexcept;

  // Any thread. Wakes the caller with nothing to drain.
  void wake() noexcept;

  // The caller, when it expects nothing more: gives the descriptor back.
  void close() noexcept;
  // In a child, where a thread that holds the mutex does not exist.
  void close_after_fork() noexcept { event_.close(); }

 private:
  std::mutex mutex_;
  // Signalled and closed under mutex_: a late push must not write to a descriptor that is
  // somebody else's by then.
  EventFd event_;
  // guarded by mutex_
  std::vector<std::uint64_t> ready_;  // has room for all that are expected
  std::size_t first_ = 0;             // in ready_: those before it have been taken
  std::size_t expected_ = 0;          // with those in ready_
};

}  // namespace fastkv
