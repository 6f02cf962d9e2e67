// The native client of one server: a Schedule and the workers that serve it. Thread-safe. What it
// cannot do itself, connecting, it asks of a connector that sleeps on connect_event().
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "batch.hpp"
#include "completion_queue.hpp"
#include "schedule.hpp"
#include "stats.hpp"
#include "stream.hpp"
#include "worker.hpp"

namespace fastkv {

class Engine {
 public:
  // `connections` in all. One of them carries lookups only, unless it is the only one. Starts the
  // threads; throws std::system_error if the system has no descriptor or thread left.
  Engine(std::size_t workers, std::size_t connections, Window window,
         std::shared_ptr<Stats> stats = std::make_shared<Stats>());
  ~Engine();

  // `seconds`: for the whole batch, 0 for no limit.
  Status submit(const std::shared_ptr<Batch>& batch, std::uint64_t id,
                std::shared_ptr<CompletionQueue> queue, std::shared_ptr<const RetryPolicy> retry,
                double seconds);
  void cancel(std::uint64_t id) noexcept;
  // Idempotent. Every accepted batch has completed, and no thread runs, when it returns.
  void close();
  // Gives all descriptors back. After close(); a connector that is late finds nothing to do.
  void close_fds();
  // Lets every connection end once it is idle; the next batch opens new ones.
  void retire_connections();
  std::size_t batches() const { return schedule_.batches(); }
  Schedule::Gauges gauges() const { return schedule_.gauges(); }

  // The connector.
  int connect_event() const noexcept { return schedule_.connect_event(); }
  void wake_connector() noexcept { schedule_.wake_connector(); }
  std::optional<std::uint32_t> take_connect_request() noexcept {
    return schedule_.take_connect_request();
  }
  std::vector<Notice> take_notices() { return schedule_.take_notices(); }
  // Takes over a connected socket, or a stream, that has answered all that was sent on it. 0 s: no
  // limit.
  void adopt(std::uint32_t lane, UniqueFd socket, double stall_seconds, double health_seconds);
  void adopt(std::uint32_t lane, std::unique_ptr<Stream> stream, double stall_seconds,
             double health_seconds);
  void connect_failed(std::uint32_t lane, std::uint64_t newest, std::string_view why,
                      double delay_seconds);

  // fork() copies only the calling thread: the child may close its descriptors, no more. In order:
  // before_fork() was called, as it is not if nobody was told.
  void before_fork() { schedule_.fork_mutex().lock(); }
  void after_fork_in_parent() { schedule_.fork_mutex().unlock(); }
  void close_fds_after_fork(bool in_order) noexcept;

 private:
  Schedule schedule_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mutex close_mutex_;
  bool closed_ = false;  // guarded by close_mutex_
};

}  // namespace fastkv
