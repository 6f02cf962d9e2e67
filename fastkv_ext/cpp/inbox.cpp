#include "inbox.hpp"

#include <utility>

namespace fastkv {

void Inbox::post(Message message) {
  std::lock_guard lock(mutex_);
  letter_.messages.push_back(std::move(message));
  event_.signal();
}

void Inbox::abandon(const std::shared_ptr<Batch>& batch, std::size_t worker) noexcept {
  std::lock_guard lock(mutex_);
  batch->links_[worker] = {batch, abandoned_};
  abandoned_ = batch.get();
  event_.signal();
}

void Inbox::stop() noexcept {
  std::lock_guard lock(mutex_);
  letter_.stop = true;
  event_.signal();
}

void Inbox::wake() noexcept {
  std::lock_guard lock(mutex_);
  event_.signal();
}

void Inbox::close() noexcept {
  std::lock_guard lock(mutex_);
  event_.close();
  letter_.messages.clear();
}

void Inbox::close_after_fork(bool in_order) noexcept {
  event_.close();
  if (in_order) return letter_.close_after_fork();
  if (!mutex_.try_lock()) return;  // somebody was in the middle of changing the letter, perhaps
  letter_.close_after_fork();
  mutex_.unlock();
}

void Inbox::Letter::close_after_fork() noexcept {
  for (Message& message : messages) {
    auto* const adopt = std::get_if<Adopt>(&message);
    if (adopt && adopt->stream) adopt->stream->close_after_fork();
  }
}

bool Inbox::look() noexcept {
  event_.clear();
  std::lock_guard lock(mutex_);
  return letter_.stop || !letter_.messages.empty();
}

Inbox::Letter Inbox::take() noexcept {
  std::lock_guard lock(mutex_);
  return std::exchange(letter_, {});
}

std::shared_ptr<Batch> Inbox::take_abandoned(std::size_t worker) noexcept {
  std::lock_guard lock(mutex_);
  if (!abandoned_) return nullptr;
  Batch::Link& link = abandoned_->links_[worker];
  abandoned_ = std::exchange(link.next, nullptr);
  return std::move(link.self);
}

}  // namespace fastkv
