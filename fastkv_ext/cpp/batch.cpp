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
  if (range_bytes_ == 0 || whole_ || range_failures_[index] >= 2) return false;
  const std::uint64_t bytes = value_bytes(index);
  return bytes >= range_bytes_ / 2 && bytes > RangedValue::kEndBytes;
}

void Batch::note_range_failure(std::uint32_t index, Outcome outcome) noexcept {
  range_failures_[index] =
      outcome == Outcome::torn ? static_cast<std::uint8_t>(range_failures_[index] + 1) : 2;
}

bool Batch::is_small(std::size_t index) const noexcept {
  return RangedValue::is_small(value_bytes(index), range_bytes_);
}

Operation Batch::operation(std::uint32_t index, bool in_parts) {
  Operation operation{.command = command_, .ticket = {this, index}, .key = key(index)};
  if (!value_ends_.empty()) {
    const std::size_t begin = index == 0 ? 0 : value_ends_[index - 1];
    operation.value = std::span(segments_).subspan(begin, value_ends_[index] - begin);
  }
  if (in_ranges(index)) {
    operation.ranges = std::make_shared<RangedValue>(value_bytes(index), range_bytes_, !immutable_,
                                                     in_parts && is_small(index));
  }
  operation.asking = asking_;
  operation.repeatable = repeatable_;
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

bool Batch::answer(Completed&& completed) noexcept {
  const std::uint32_t index = completed.ticket.index;
  if (completed.outcome == Outcome::refused || completed.outcome == Outcome::size_mismatch) {
    try {
      std::lock_guard lock(failures_mutex_);
      failures_.push_back({index, completed.actual_bytes, std::move(completed.error)});
    } catch (...) {
      return false;
    }
  }
  outcomes_[index] = completed.outcome;
  return true;
}

// --- parts -------------------------------------------------------------------------------------

std::vector<std::vector<std::uint32_t>> Batch::route(const SlotMap& map,
                                                     std::span<const std::uint32_t> indices) const {
  std::vector<std::vector<std::uint32_t>> routed(1);
  for (const std::uint32_t index : indices) {
    const std::size_t owner = map.owner(key(index));
    if (owner == SlotMap::kNobody) {
      routed.back().push_back(index);
      continue;
    }
    if (owner + 1 >= routed.size()) {
      std::vector<std::uint32_t> nobodys = std::move(routed.back());
      routed.back().clear();
      routed.resize(owner + 2);
      routed.back() = std::move(nobodys);
    }
    routed[owner].push_back(index);
  }
  return routed;
}

std::shared_ptr<Batch> Batch::part(std::vector<std::uint32_t> indices) const {
  auto part = std::make_shared<Batch>(command_);
  part->repeatable_ = repeatable_;
  part->immutable_ = immutable_;
  part->set_options_ = set_options_;
  part->set_option_count_ = set_option_count_;
  part->reserve(indices.size());
  for (const std::uint32_t index : indices) {
    part->add_key(key(index));
    if (value_ends_.empty()) continue;
    const std::size_t begin = index == 0 ? 0 : value_ends_[index - 1];
    part->segments_.insert(part->segments_.end(),
                           segments_.begin() + static_cast<std::ptrdiff_t>(begin),
                           segments_.begin() + static_cast<std::ptrdiff_t>(value_ends_[index]));
    part->end_value();
  }
  part->places_ = std::move(indices);
  return part;
}

Batch::Rest Batch::take(const Batch& part) {
  Rest rest;
  if (outcomes_.empty()) prepare_outcomes();
  for (const Failure& failure : part.failures_) {
    const bool refused = part.outcomes_[failure.index] == Outcome::refused;
    auto& failures = refused && redirects(failure.error) ? rest.redirected : failures_;
    failures.push_back({part.places_[failure.index], failure.actual_bytes, failure.error});
  }
  for (std::size_t i = 0; i < part.places_.size(); ++i) {
    const Outcome outcome = part.outcomes_.empty() ? Outcome::unanswered : part.outcomes_[i];
    outcomes_[part.places_[i]] = outcome;
    if (outcome == Outcome::unanswered) rest.unanswered.push_back(part.places_[i]);
  }
  // Answered only once they are answered elsewhere.
  for (const Failure& failure : rest.redirected) outcomes_[failure.index] = Outcome::unanswered;
  return rest;
}

}  // namespace fastkv
