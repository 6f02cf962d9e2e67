#include "stats.hpp"

#include <algorithm>
#include <bit>
#include <span>

#include "slots.hpp"

namespace fastkv {

Stats::Result result_of(Code code) noexcept {
  switch (code) {
    case Code::ok: return Stats::Result::ok;
    case Code::timed_out:
    case Code::stalled: return Stats::Result::timed_out;
    case Code::cancelled: return Stats::Result::cancelled;
    default: return Stats::Result::failed;
  }
}

// Counted up here first: one atomic for many keys.
void Stats::count(const Batch& batch, Result result, std::chrono::nanoseconds took) noexcept {
  std::array<std::uint64_t, kOutcomes> keys{};
  const std::span<const Outcome> outcomes = batch.outcomes();
  for (std::size_t i = 0; i < kRedirected; ++i) {
    keys[i] = static_cast<std::uint64_t>(
        std::count(outcomes.begin(), outcomes.end(), static_cast<Outcome>(i)));
  }
  std::uint64_t bytes = 0;
  if (batch.command() == Command::get || batch.command() == Command::set) {
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
      if (outcomes[i] == Outcome::hit) bytes += batch.value_bytes(i);
    }
  }
  // Of a call over several nodes that never got to one, there are none.
  keys[static_cast<std::size_t>(Outcome::unanswered)] += batch.size() - outcomes.size();
  for (const Batch::Failure& failure : batch.failures()) {
    if (batch.outcome(failure.index) != Outcome::refused || !redirects(failure.error)) continue;
    --keys[static_cast<std::size_t>(Outcome::refused)];
    ++keys[kRedirected];
  }
  PerCommand& counts = commands_[static_cast<std::size_t>(batch.command())];
  counts.batches[static_cast<std::size_t>(result)].add();
  for (std::size_t i = 0; i < kOutcomes; ++i) {
    if (keys[i] > 0) counts.keys[i].add(keys[i]);
  }
  if (bytes > 0) counts.bytes.add(bytes);
  const auto ns = static_cast<std::uint64_t>(std::max<std::int64_t>(took.count(), 1));
  counts.nanoseconds.add(ns);
  const auto bucket = static_cast<std::size_t>(std::bit_width((ns - 1) / kFirstBound));
  counts.durations[std::min(bucket, kBuckets - 1)].add();
}

}  // namespace fastkv
