// Ids of completed batches, on their way to the one caller that waits for them. A caller (an event
// loop, a blocking thread, an adapter) owns one queue and sleeps on its descriptor. Knows neither
// RESP nor sockets.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "fd.hpp"

namespace fastkv {

class CompletionQueue {
 public:
  int fd() const noexcept { return event_.fd(); }

  // Any thread. Wakes the caller unless earlier ids still wait to be drained: they share a wake-up.
  void push(std::uint64_t batch_id);

  // The caller. A wake-up may come for an empty queue, never the reverse.
  std::vector<std::uint64_t> drain();

  // Wakes the caller with nothing to drain.
  void wake() noexcept { event_.signal(); }

  void close_after_fork() noexcept { event_.close(); }

 private:
  EventFd event_;
  std::mutex mutex_;
  std::vector<std::uint64_t> ready_;  // guarded by mutex_
};

}  // namespace fastkv
