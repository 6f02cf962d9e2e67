#include "completion_queue.hpp"

#include <utility>

namespace fastkv {

void CompletionQueue::push(std::uint64_t batch_id) {
  std::lock_guard lock(mutex_);
  const bool first = ready_.empty();
  ready_.push_back(batch_id);
  if (first) event_.signal();
}

std::vector<std::uint64_t> CompletionQueue::drain() {
  event_.clear();  // before the swap: an id pushed after it signals again
  std::lock_guard lock(mutex_);
  return std::exchange(ready_, {});
}

void CompletionQueue::wake() noexcept {
  std::lock_guard lock(mutex_);
  event_.signal();
}

void CompletionQueue::close() noexcept {
  std::lock_guard lock(mutex_);
  event_.close();
}

}  // namespace fastkv
