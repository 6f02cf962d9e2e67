#include "engine.hpp"

#include <algorithm>
#include <utility>

namespace fastkv {
namespace {

std::vector<PrioritySet> lane_priorities(std::size_t connections) {
  std::vector<PrioritySet> lanes(connections, kValues);
  if (connections == 1) {
    lanes[0] = kLookups | kValues;
  } else {
    lanes[0] = kLookups;
  }
  return lanes;
}

// More than 30 years are as good as for ever, and fit in nanoseconds.
Clock::duration to_duration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(std::min(seconds, 1e9)));
}

}  // namespace

Engine::Engine(std::size_t workers, std::size_t connections, Window window,
               std::shared_ptr<Stats> stats)
    : schedule_(workers, lane_priorities(connections), window.range_bytes, std::move(stats)) {
  for (std::size_t i = 0; i < workers; ++i) {
    workers_.push_back(std::make_unique<Worker>(i, schedule_, window));
  }
  try {
    for (const auto& worker : workers_) worker->start();
  } catch (...) {
    close();
    throw;
  }
}

Engine::~Engine() {
  close();
}

Status Engine::submit(const std::shared_ptr<Batch>& batch, std::uint64_t id,
                      std::shared_ptr<CompletionQueue> queue,
                      std::shared_ptr<const RetryPolicy> retry, double seconds) {
  std::optional<Clock::time_point> deadline;
  if (seconds > 0) deadline = Clock::now() + to_duration(seconds);
  return schedule_.submit(batch, id, std::move(queue), std::move(retry), deadline);
}

void Engine::cancel(std::uint64_t id) noexcept {
  schedule_.abandon(id, {Code::cancelled, {}});
}

void Engine::close() {
  std::lock_guard lock(close_mutex_);
  if (std::exchange(closed_, true)) return;
  schedule_.close({Code::closed, {}});
  for (std::size_t i = 0; i < workers_.size(); ++i) schedule_.inbox(i).stop();
  for (const auto& worker : workers_) worker->join();
  schedule_.wait_until_empty();  // somebody may be in the middle of a cancel
  schedule_.wake_connector();
}

void Engine::close_fds() {
  std::lock_guard lock(close_mutex_);
  std::lock_guard fork_lock(schedule_.fork_mutex());
  workers_.clear();
  schedule_.close_fds();
}

void Engine::retire_connections() {
  std::lock_guard lock(close_mutex_);
  if (!closed_) schedule_.retire_connections();
}

void Engine::adopt(std::uint32_t lane, UniqueFd socket, double stall_seconds,
                   double health_seconds) {
  adopt(lane, std::make_unique<SocketStream>(std::move(socket)), stall_seconds, health_seconds);
}

void Engine::adopt(std::uint32_t lane, std::unique_ptr<Stream> stream, double stall_seconds,
                   double health_seconds) {
  std::lock_guard lock(close_mutex_);
  if (closed_) return;
  schedule_.connected(lane);  // first, or the worker might lose it before
  try {
    std::lock_guard fork_lock(schedule_.fork_mutex());
    schedule_.inbox_of_lane(lane).post(
        Adopt{lane, std::move(stream), to_duration(stall_seconds), to_duration(health_seconds)});
  } catch (...) {
    schedule_.lost(lane);
    throw;
  }
}

void Engine::connect_failed(std::uint32_t lane, std::uint64_t newest, std::string_view why,
                            double delay_seconds) {
  schedule_.connect_failed(lane, newest, {Code::connect_failed, why}, to_duration(delay_seconds));
}

void Engine::close_fds_after_fork(bool in_order) noexcept {
  schedule_.close_fds_after_fork(in_order);
  for (const auto& worker : workers_) worker->close_fds_after_fork(in_order);
}

}  // namespace fastkv
