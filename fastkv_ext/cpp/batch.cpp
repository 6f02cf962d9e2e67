#include "batch.hpp"

#include "resp.hpp"

namespace fastkv {

void Batch::add_key(std::string_view key) {
  keys_.append(key);
  key_ends_.push_back(keys_.size());
}

void Batch::add_set_option(std::string_view argument) {
  append_bulk(set_options_, argument);
  ++set_option_count_;
}

// UNLINK ranks with the stores: a bulk eviction must not delay a lookup.
Priority Batch::priority() const noexcept {
  switch (command_) {
    case Command::exists: return Priority::lookup;
    case Command::get: return Priority::retrieve;
    default: return Priority::store;
  }
}

std::string_view Batch::key(std::size_t index) const noexcept {
  const std::size_t begin = index == 0 ? 0 : key_ends_[index - 1];
  return std::string_view(keys_).substr(begin, key_ends_[index] - begin);
}

std::uint64_t Batch::value_bytes(std::size_t index) const noexcept {
  std::uint64_t bytes = 0;
  if (value_ends_.empty()) return 0;
  for (std::size_t i = index == 0 ? 0 : value_ends_[index - 1]; i < value_ends_[index]; ++i) {
    bytes += segments_[i].size;
  }
  return bytes;
}

bool Batch::in_ranges(std::size_t index) const noexcept {
  if (range_bytes_ == 0 || range_failures_[index] >= 2) return false;
  const std::uint64_t bytes = value_bytes(index);
  return bytes >= range_bytes_ / 2 && bytes > RangedValue::kEndBytes;
}

void Batch::note_range_failure(std::uint32_t index, Outcome outcome) noexcept {
  range_failures_[index] =
      outcome == Outcome::torn ? static_cast<std::uint8_t>(range_failures_[index] + 1) : 2;
}

Operation Batch::operation(std::uint32_t index) {
  Operation operation{.command = command_, .ticket = {this, index}, .key = key(index)};
  if (!value_ends_.empty()) {
    const std::size_t begin = index == 0 ? 0 : value_ends_[index - 1];
    operation.value = std::span(segments_).subspan(begin, value_ends_[index] - begin);
  }
  if (in_ranges(index)) {
    operation.ranges = std::make_shared<RangedValue>(value_bytes(index), range_bytes_, !immutable_);
  }
  operation.set_options = set_options_;
  operation.set_option_count = set_option_count_;
  return operation;
}

bool Batch::retried_by_policy(std::string_view error) const noexcept {
  for (const std::string& prefix : retry_->error_replies) {
    if (error.starts_with(prefix)) return true;
  }
  return false;
}

void Batch::answer(Completed&& completed) {
  const std::uint32_t index = completed.ticket.index;
  if (completed.outcome == Outcome::refused || completed.outcome == Outcome::size_mismatch) {
    std::lock_guard lock(failures_mutex_);
    failures_.push_back({index, completed.actual_bytes, std::move(completed.error)});
  }
  outcomes_[index] = completed.outcome;
}

}  // namespace fastkv
