#include "ranged_value.hpp"

#include <algorithm>

namespace fastkv {
namespace {

std::uint32_t count_ranges(std::uint64_t bytes, std::uint64_t range_bytes) noexcept {
  const std::uint64_t body = bytes - RangedValue::kEndBytes;
  const std::uint64_t first = range_bytes + RangedValue::kEndBytes;
  const std::uint64_t rest = body > first ? body - first : 0;
  // What is left over makes a range of its own if it is more than half of one.
  return static_cast<std::uint32_t>(2 + (rest + (range_bytes - 1) / 2) / range_bytes);
}

std::uint64_t part_bytes(std::uint64_t bytes, std::uint64_t range_bytes) noexcept {
  constexpr std::uint64_t kPage = 4096;  // or all but the first would be on the grid
  const std::uint64_t body = bytes - RangedValue::kEndBytes;
  const std::uint64_t most = std::max<std::uint64_t>(range_bytes / 2, 1);
  const std::uint64_t parts = std::max<std::uint64_t>((body + most - 1) / most, 2);
  return ((body + parts - 1) / parts + kPage - 1) / kPage * kPage;
}

}  // namespace

RangedValue::RangedValue(std::uint64_t bytes, std::uint64_t range_bytes, bool snapshot,
                         bool in_parts) noexcept
    : bytes_(bytes),
      range_bytes_(in_parts ? part_bytes(bytes, range_bytes) : range_bytes),
      ranges_(count_ranges(bytes, range_bytes_)),
      snapshot_(snapshot),
      in_parts_(in_parts),
      open_(!snapshot) {}

bool RangedValue::exhausted() const noexcept {
  return claimed_ >= ranges_ || outcome_ != Outcome::hit;
}

std::optional<RangedValue::Range> RangedValue::claim() noexcept {
  // No fetch_add behind the end, or the count would run over one day.
  if (exhausted()) return std::nullopt;
  const std::uint32_t number = claimed_.fetch_add(1);
  if (number >= ranges_) return std::nullopt;
  const std::uint64_t end = bytes_ - kEndBytes;
  if (number == 0) return Range{.first = end, .bytes = kEndBytes, .to_end = true};
  const bool last = number + 1 == ranges_;
  if (number == 1) return Range{.bytes = last ? end : range_bytes_ + kEndBytes};
  const std::uint64_t first = kEndBytes + (number - 1) * range_bytes_;
  return Range{.first = first, .bytes = last ? end - first : range_bytes_};
}

bool RangedValue::worth_joining() const noexcept {
  return divisible() && open_ && outcome_ == Outcome::hit && claimed_ + 1 < ranges_;
}

bool RangedValue::join() noexcept {
  if (!worth_joining()) return false;
  // Nobody comes back to a value that its last reader has left.
  for (std::uint32_t readers = readers_; readers > 0;) {
    if (readers_.compare_exchange_weak(readers, readers + 1)) return true;
  }
  return false;
}

bool RangedValue::leave() noexcept {
  return readers_.fetch_sub(1) == 1;
}

void RangedValue::spoil(Outcome outcome) noexcept {
  Outcome good = Outcome::hit;
  outcome_.compare_exchange_strong(good, outcome);
}

void RangedValue::lose(const Status& why, bool counted) noexcept {
  Outcome good = Outcome::hit;
  if (!outcome_.compare_exchange_strong(good, Outcome::lost)) return;
  loss_ = why;
  loss_counted_ = counted;
}

}  // namespace fastkv
