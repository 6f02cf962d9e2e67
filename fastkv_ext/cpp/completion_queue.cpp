#include "completion_queue.hpp"

namespace fastkv {

void CompletionQueue::expect() {
  std::lock_guard lock(mutex_);
  if (ready_.capacity() <= expected_) ready_.reserve(2 * expected_ + 1);
  ++expected_;
}

void CompletionQueue::forget() noexcept {
  std::lock_guard lock(mutex_);
  --expected_;
}

void CompletionQueue::push(std::uint64_t batch_id) noexcept {
  std::lock_guard lock(mutex_);
  const bool first = ready_.empty();
  ready_.push_back(batch_id);
  if (first) event_.signal();
}

std::vector<std::uint64_t> CompletionQueue::drain() {
  std::lock_guard lock(mutex_);
  std::vector<std::uint64_t> taken(ready_);  // a copy: the room is for those to come
  event_.clear();
  ready_.clear();
  expected_ -= taken.size();
  return taken;
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
