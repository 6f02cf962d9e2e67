// What became of the batches and connections of one client: counters that only grow. Workers
// write them, anybody reads them at any time, a forked child included: there is no lock.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "batch.hpp"
#include "session.hpp"
#include "status.hpp"

namespace fastkv {

class Stats {
 public:
  // Relaxed: each counter stands for itself, and orders nothing. What a caller was told of, it
  // finds counted, since the completion queue's mutex lies between.
  class Counter {
   public:
    void add(std::uint64_t n = 1) noexcept { value_.fetch_add(n, std::memory_order_relaxed); }
    std::uint64_t get() const noexcept { return value_.load(std::memory_order_relaxed); }

   private:
    std::atomic<std::uint64_t> value_{0};
  };

  // What became of a batch as a whole.
  enum class Result : std::uint8_t { ok, timed_out, cancelled, failed };
  static constexpr std::size_t kResults = 4;
  // What became of a key: Outcome's up to `refused`, of which these are no errors:
  static constexpr std::size_t kRedirected = static_cast<std::size_t>(Outcome::refused) + 1;
  static constexpr std::size_t kOutcomes = kRedirected + 1;
  // Durations: up to 50 us, 100 us ... 13.1 s, and longer ones.
  static constexpr std::uint64_t kFirstBound = 50'000;  // ns
  static constexpr std::size_t kBuckets = 20;

  struct PerCommand {
    std::array<Counter, kResults> batches;
    std::array<Counter, kOutcomes> keys;
    Counter bytes;  // of values that were read, or stored
    Counter nanoseconds;
    std::array<Counter, kBuckets> durations;
  };

  // A batch that is complete, and whose caller does not know yet.
  void count(const Batch& batch, Result result, std::chrono::nanoseconds took) noexcept;
  const PerCommand& of(Command command) const noexcept {
    return commands_[static_cast<std::size_t>(command)];
  }

  Counter retries;     // keys that were queued again because their connection was lost
  Counter reconnects;  // connections made in place of an earlier one
  Counter stalls;      // connections given up because no byte moved

 private:
  std::array<PerCommand, 4> commands_;  // get, set, exists, unlink
};

Stats::Result result_of(Code code) noexcept;

}  // namespace fastkv
