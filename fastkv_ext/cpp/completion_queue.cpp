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
  const bool first = first_ == ready_.size();
  ready_.push_back(batch_id);
  if (first) event_.signal();
}

std::optional<std::uint64_t> CompletionQueue::next() noexcept {
  std::lock_guard lock(mutex_);
  if (first_ < ready_.size()) return ready_[first_++];
  event_.clear();
  expected_ -= ready_.size();
  ready_.clear();
  first_ = 0;
  return std::nullopt;
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
