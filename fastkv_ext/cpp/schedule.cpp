#include "schedule.hpp"

#include <algorithm>
#include <new>
#include <utility>

namespace fastkv {
namespace {

// Stores hold back for so long after the last lookup or retrieve, and then this much may be on its
// way, or one value.
constexpr auto kUrgent = std::chrono::milliseconds(200);
constexpr std::uint64_t kUrgentStoreBytes = std::uint64_t{256} << 10;
// Without end, loads would starve stores: one has its turn so often. And so long they wait for one
// before them that gets no answer.
constexpr auto kStoreTurn = std::chrono::milliseconds(10);
constexpr auto kStorePatience = std::chrono::milliseconds(250);

// Whether the caller of a batch that ended so might send it again, to another node, say. Then it
// must not look so if an operation may have been done.
bool may_be_sent_again(Code code) noexcept {
  return code == Code::connection_lost || code == Code::stalled || code == Code::connect_failed ||
         code == Code::closed;
}

// More than these at once say nothing new.
constexpr std::size_t kMostNotices = 64;

}  // namespace

Schedule::Schedule(std::size_t workers, std::vector<PrioritySet> lane_priorities,
                   std::uint64_t range_bytes, std::shared_ptr<Stats> stats)
    : lanes_(std::move(lane_priorities)),
      range_bytes_(range_bytes),
      stats_(std::move(stats)),
      connected_(lanes_.size(), false) {
  for (std::size_t i = 0; i < workers; ++i) inboxes_.push_back(std::make_unique<Inbox>());
  connect_requests_.reserve(lanes_.size());  // each of them asks once
  for (std::uint32_t lane = 0; lane < lanes_.size(); ++lane) {
    inbox_of_lane(lane).priorities |= lanes_[lane];
  }
}

Schedule::~Schedule() {
  // What was left for workers that had ended: each holds itself.
  for (std::size_t i = 0; i < inboxes_.size(); ++i) {
    while (inboxes_[i]->take_abandoned(i)) {
    }
  }
}

// --- callers -----------------------------------------------------------------------------------

Status Schedule::submit(const std::shared_ptr<Batch>& batch, std::uint64_t id,
                        std::shared_ptr<CompletionQueue> queue,
                        std::shared_ptr<const RetryPolicy> retry,
                        std::optional<Clock::time_point> deadline) {
  const std::size_t operations = batch->size();
  const Priority priority = batch->priority();
  batch->id_ = id;
  batch->queue_ = std::move(queue);
  batch->retry_ = std::move(retry);
  batch->submitted_ = Clock::now();
  batch->deadline_ = deadline;
  batch->prepare_outcomes();
  batch->unfinished_ = operations;
  if (batch->command() == Command::get) {
    batch->range_bytes_ = range_bytes_;  // another engine may have refused it before
    batch->range_failures_.assign(operations, 0);
  }
  batch->links_.resize(inboxes_.size());
  // Whatever its end needs is there before it is accepted, or it is not.
  batch->queue_->expect();
  if (operations == 0) {
    batch->queue_->push(id);
    return {};
  }
  try {
    std::lock_guard lock(mutex_);
    if (!refusal_.ok()) {
      batch->queue_->forget();
      return refusal_;
    }
    const auto accepted = accepted_.emplace(id, batch).first;
    auto due = deadlines_.end();
    try {
      if (deadline) due = deadlines_.emplace(*deadline, id);
      enqueue_locked(*batch, operations);
    } catch (...) {
      if (due != deadlines_.end()) deadlines_.erase(due);
      accepted_.erase(accepted);
      throw;
    }
  } catch (...) {
    batch->queue_->forget();
    throw;
  }
  wake_sleepers(priority_bit(priority), 0, operations);
  // The first worker must look at its clock again.
  if (deadline) inbox(0).wake();
  return {};
}

bool Schedule::abandon(std::uint64_t id, const Status& why) noexcept {
  std::shared_ptr<Batch> abandoned;
  {
    std::lock_guard lock(mutex_);
    const auto it = accepted_.find(id);
    if (it == accepted_.end()) return false;
    abandon_locked(it->second, why, abandoned);
  }
  let_go(std::move(abandoned));
  return true;
}

void Schedule::retire_connections() {
  {
    std::lock_guard lock(mutex_);
    ++generation_;
  }
  for (const auto& inbox : inboxes_) inbox->wake();
}

void Schedule::close(const Status& why) noexcept {
  std::shared_ptr<Batch> abandoned;
  {
    std::lock_guard lock(mutex_);
    if (refusal_.ok()) refusal_ = why;
    for (const auto& [id, batch] : accepted_) abandon_locked(batch, why, abandoned);
  }
  let_go(std::move(abandoned));
}

void Schedule::wait_until_empty() {
  std::unique_lock lock(mutex_);
  emptied_.wait(lock, [this] { return accepted_.empty() && completing_ == 0; });
}

std::size_t Schedule::batches() const {
  std::lock_guard lock(mutex_);
  return accepted_.size();
}

Schedule::Gauges Schedule::gauges() const {
  std::lock_guard lock(mutex_);
  Gauges gauges;
  gauges.connections =
      static_cast<std::size_t>(std::count(connected_.begin(), connected_.end(), true));
  std::copy(queued_.begin(), queued_.end(), gauges.queued.begin());
  return gauges;
}

void Schedule::enqueue_locked(Batch& batch, std::size_t operations) {
  const auto priority = static_cast<std::size_t>(batch.priority());
  if (batch.priority() == Priority::store && queued_[priority] == 0) stores_since_ = Clock::now();
  if (!batch.queued_) {
    // What comes back was here before: others would go before it each time that it fails.
    if (batch.again_.empty()) {
      queues_[priority].push_back(&batch);
    } else {
      queues_[priority].push_front(&batch);
    }
  }
  batch.queued_ = true;
  queued_[priority] += operations;
}

void Schedule::go_again_locked(Batch& batch, std::uint32_t index) {
  batch.again_.push_back(index);
  try {
    enqueue_locked(batch, 1);
  } catch (...) {
    batch.again_.pop_back();
    throw;
  }
}

// Drops what no worker has pulled.
void Schedule::abandon_locked(const std::shared_ptr<Batch>& batch, const Status& why,
                              std::shared_ptr<Batch>& abandoned) noexcept {
  if (batch->abandoned_) return;
  batch->abandoned_ = true;
  if (batch->status_.ok()) batch->status_ = why;
  batch->dropped_ = batch->size() - batch->cursor_ + batch->again_.size();
  batch->cursor_ = batch->size();
  batch->again_.clear();
  // Before the workers are told to let go: nobody may join afterwards.
  drop_offers_locked(batch.get());
  const auto priority = static_cast<std::size_t>(batch->priority());
  if (batch->queued_) std::erase(queues_[priority], batch.get());
  batch->queued_ = false;
  queued_[priority] -= batch->dropped_;
  if (std::exchange(batch->delayed_, 0) > 0) {
    batch->dropped_ += std::erase_if(
        delayed_, [&](const auto& entry) { return entry.second.batch == batch.get(); });
  }
  batch->next_abandoned_ = std::exchange(abandoned, batch);
}

// Tells the workers to let go of the rest.
void Schedule::let_go(std::shared_ptr<Batch> abandoned) noexcept {
  while (const auto batch = std::move(abandoned)) {
    abandoned = std::move(batch->next_abandoned_);
    for (std::size_t i = 0; i < inboxes_.size(); ++i) inboxes_[i]->abandon(batch, i);
    if (batch->dropped_ > 0) count_down(*batch, batch->dropped_);
  }
}

// --- the connector thread ----------------------------------------------------------------------

std::optional<std::uint32_t> Schedule::take_connect_request() noexcept {
  // The lock comes first: a connector that was in the middle of a connect may outlive close_fds(),
  // and must not read from a descriptor that is somebody else's by then.
  std::lock_guard lock(mutex_);
  connect_event_.clear();
  if (connect_requests_.empty()) return std::nullopt;
  const std::uint32_t lane = connect_requests_.front();
  connect_requests_.erase(connect_requests_.begin());
  return lane;
}

std::vector<Notice> Schedule::take_notices() {
  std::lock_guard lock(mutex_);
  return std::exchange(notices_, {});
}

void Schedule::wake_connector() noexcept {
  std::lock_guard lock(mutex_);
  connect_event_.signal();
}

void Schedule::connected(std::uint32_t lane) {
  std::lock_guard lock(mutex_);
  connected_[lane] = true;
  near_ = false;  // it may lead elsewhere
}

void Schedule::connect_failed(std::uint32_t lane, std::uint64_t newest, const Status& why,
                              Clock::duration delay) {
  std::shared_ptr<Batch> stranded;
  bool served = false;
  {
    std::lock_guard lock(mutex_);
    for (std::size_t p = 0; p < kPriorities; ++p) {
      const auto priority = static_cast<Priority>(p);
      if ((lanes_[lane] & priority_bit(priority)) == 0) continue;
      if (served_locked(priority)) {
        served = true;
        continue;
      }
      for (std::size_t i = 0; i < queues_[p].size();) {
        const std::uint64_t id = queues_[p][i]->id_;
        if (id > newest) {
          ++i;
        } else {
          abandon_locked(accepted_.at(id), why, stranded);  // takes it out of the queue
        }
      }
    }
  }
  let_go(std::move(stranded));
  // With nobody else to serve it, a later batch wants to be told at once, as redis-py would.
  std::lock_guard lock(fork_mutex_);
  inbox_of_lane(lane).post(ConnectFailed{lane, served ? delay : Clock::duration{}});
  // What is left may have waited for this lane while others slept.
  wake_sleepers(with_work(), 0, inboxes_.size());
}

bool Schedule::served_locked(Priority priority) const noexcept {
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (connected_[i] && (lanes_[i] & priority_bit(priority)) != 0) return true;
  }
  return false;
}

// --- workers -----------------------------------------------------------------------------------

std::size_t Schedule::lanes_serving(Priority priority) const noexcept {
  return static_cast<std::size_t>(std::count_if(lanes_.begin(), lanes_.end(), [&](PrioritySet set) {
    return (set & priority_bit(priority)) != 0;
  }));
}

PrioritySet Schedule::with_work() const noexcept {
  PrioritySet found = 0;
  for (std::size_t p = 0; p < kPriorities; ++p) {
    if (queued_[p] > 0) found |= priority_bit(static_cast<Priority>(p));
  }
  return found;
}

bool Schedule::has_work(PrioritySet priorities) const noexcept {
  return (with_work() & priorities) != 0;
}

bool Schedule::stores_overdue(Clock::time_point now) const noexcept {
  return has_work(priority_bit(Priority::store)) && now - stores_since_.load() >= kStoreTurn;
}

Schedule::Run Schedule::pull(PrioritySet priorities, std::uint64_t generation,
                             std::size_t max_requests, std::uint64_t max_bytes,
                             Clock::time_point now, Mixes mixes, Clock::time_point silent) {
  constexpr PrioritySet kStores = priority_bit(Priority::store);
  std::lock_guard lock(mutex_);
  if (generation != generation_) return {};
  // Also if this lane may not carry it, because of the stores that it does: then no more of them.
  if ((with_work() & ~kStores) != 0) urgent_until_ = now + kUrgent;
  if (mixes != Mixes::any_store && (priorities & with_work() & kStores) != 0) {
    const auto since = silent_since_locked(Priority::store);
    const bool is_silent = since != Clock::time_point{} && since <= silent;
    if (is_silent != (mixes == Mixes::silent_stores)) {
      // With loads without end it would never be free for the others.
      if (mixes == Mixes::silent_stores && stores_overdue(now)) return {};
      priorities = without(priorities, Priority::store);
    }
  }
  const bool stores_asked = (priorities & with_work() & kStores) != 0;
  // One that gets no answer must not hold the others back for ever.
  const bool one_out = stores_out_ > 0 && now - stores_since_.load() < kStorePatience;
  const bool stores_may = stores_asked && !(urgent(now) && one_out);
  const bool loads_asked = (priorities & with_work() & ~kStores) != 0;
  if (loads_asked && (!stores_may || !stores_overdue(now) || loads_turn_)) {
    if (stores_asked) loads_turn_ = false;
    const bool lookups = (priorities & with_work() & priority_bit(Priority::lookup)) != 0;
    return take_locked(lookups ? Priority::lookup : Priority::retrieve, max_requests, max_bytes);
  }
  if (stores_may) {
    if (loads_asked) loads_turn_ = true;
    stores_since_ = now;
    if (urgent(now)) max_bytes = std::min(max_bytes, kUrgentStoreBytes);
    return take_locked(Priority::store, max_requests, max_bytes);
  }
  if (!stores_asked) return {};
  return {.retry_at = std::min(urgent_until_.load(), stores_since_.load() + kStorePatience)};
}

// Of what take_locked() takes next.
Clock::time_point Schedule::silent_since_locked(Priority priority) const noexcept {
  const Batch& batch = *queues_[static_cast<std::size_t>(priority)].front();
  if (batch.again_.empty() || batch.past_.empty()) return {};
  return batch.past_[batch.again_.back()].silent_since;
}

// Of a queue that is not empty.
Schedule::Run Schedule::take_locked(Priority priority, std::size_t max_requests,
                                    std::uint64_t max_bytes) {
  const auto p = static_cast<std::size_t>(priority);
  Batch& batch = *queues_[p].front();
  Run run{.batch = &batch, .silent_since = silent_since_locked(priority)};
  if (!batch.again_.empty()) {
    run.first = batch.again_.back();
    run.count = 1;
    batch.again_.pop_back();
  } else {
    const std::size_t lanes = lanes_serving(priority);
    const std::size_t share = (queued_[p] + lanes - 1) / lanes;
    const std::size_t most =
        std::min({max_requests, std::max<std::size_t>(share, 1), batch.size() - batch.cursor_});
    run.first = static_cast<std::uint32_t>(batch.cursor_);
    for (std::uint64_t bytes = 0; run.count < most && (run.count == 0 || bytes < max_bytes);) {
      bytes += batch.value_bytes(run.first + run.count);
      ++run.count;
    }
    batch.cursor_ += run.count;
  }
  queued_[p] -= run.count;
  if (priority == Priority::store) stores_out_ += run.count;
  if (batch.again_.empty() && batch.cursor_ == batch.size()) {
    queues_[p].pop_front();
    batch.queued_ = false;
  }
  return run;
}

void Schedule::offer(Batch& batch, std::uint32_t index, const std::shared_ptr<RangedValue>& ranges,
                     std::uint32_t lane, const std::string& server) {
  {
    std::lock_guard lock(mutex_);
    if (batch.abandoned_) return;  // the worker is told next
    drop_offers_locked(nullptr);
    offers_.push_back({&batch, index, ranges, lane, server});
    offered_ = offers_.size();
  }
  // If others must wait until its WATCH is answered, the worker says when.
  if (ranges->worth_joining()) wake_helpers();
}

void Schedule::identified(std::uint32_t lane, const std::string& server) {
  {
    std::lock_guard lock(mutex_);
    for (Offer& offer : offers_) {
      if (offer.lane == lane) offer.server = server;
    }
  }
  wake_helpers();
}

// Those that are over, and those of one batch.
void Schedule::drop_offers_locked(const Batch* of) noexcept {
  std::erase_if(offers_, [&](const Offer& offer) {
    const auto ranges = offer.ranges.lock();
    return !ranges || ranges->exhausted() || offer.batch == of;
  });
  offered_ = offers_.size();
}

void Schedule::wake_helpers() noexcept {
  wake_sleepers(priority_bit(Priority::retrieve), 0, inboxes_.size());
}

bool Schedule::wants_help(PrioritySet priorities) const noexcept {
  return offered_ > 0 && (priorities & priority_bit(Priority::retrieve)) != 0;
}

bool Schedule::worth_connecting() {
  std::lock_guard lock(mutex_);
  drop_offers_locked(nullptr);
  return std::any_of(offers_.begin(), offers_.end(), [](const Offer& offer) {
    const auto ranges = offer.ranges.lock();
    return ranges && ranges->worth_joining();
  });
}

bool Schedule::worth_identifying() {
  std::lock_guard lock(mutex_);
  return std::any_of(offers_.begin(), offers_.end(), [](const Offer& offer) {
    const auto ranges = offer.ranges.lock();
    return ranges && ranges->snapshot() && !ranges->exhausted();
  });
}

Schedule::Run Schedule::help(std::uint64_t generation, const std::string& server) {
  std::lock_guard lock(mutex_);
  if (generation != generation_) return {};
  drop_offers_locked(nullptr);
  for (const Offer& offer : offers_) {
    auto ranges = offer.ranges.lock();
    if (!ranges) continue;
    if (ranges->snapshot() && (server.empty() || offer.server != server)) continue;
    if (ranges->join()) {
      return {offer.batch, offer.index, 1, std::move(ranges)};
    }
  }
  return {};
}

bool Schedule::requeue(Batch& batch, std::uint32_t index, bool sent, bool counted, Code why,
                       Clock::time_point silent_since) noexcept try {
  // Once it is queued, another worker may complete it.
  const Priority priority = batch.priority();
  std::chrono::duration<double> delay{0};
  {
    std::lock_guard lock(mutex_);
    if (batch.abandoned_ || (sent && !batch.repeatable_)) return false;
    constexpr Clock::time_point kNotSilent{};
    if (batch.past_.empty() && (counted || silent_since != kNotSilent)) {
      batch.past_.resize(batch.size());
    }
    if (!batch.past_.empty()) {
      Clock::time_point& since = batch.past_[index].silent_since;
      if (silent_since == kNotSilent || since == kNotSilent) since = silent_since;
    }
    if (counted) {
      const RetryPolicy& policy = *batch.retry_;
      if (!(why == Code::stalled ? policy.stalled : policy.connection_lost)) return false;
      const std::uint32_t attempts = ++batch.past_[index].attempts;
      if (policy.retries >= 0 && attempts > policy.retries) return false;
      if (!policy.delays.empty()) {
        delay = policy.delays[std::min<std::size_t>(attempts, policy.delays.size()) - 1];
      }
      stats_->retries.add();
    }
    if (delay.count() > 0) {
      delayed_.emplace(Clock::now() + std::chrono::duration_cast<Clock::duration>(delay),
                       Delayed{&batch, index});
      ++batch.delayed_;
    } else {
      go_again_locked(batch, index);
    }
  }
  came_back(priority, 1);
  if (delay.count() > 0) {
    inbox(0).wake();  // it must look at its clock again
  } else {
    wake_sleepers(priority_bit(priority), 0, inboxes_.size());
  }
  return true;
} catch (const std::bad_alloc&) {
  return false;  // before it was queued
}

void Schedule::fail(Batch& batch, const Status& why) noexcept {
  {
    std::lock_guard lock(mutex_);
    const bool first = batch.status_.ok();
    if (first || (why.code == Code::unknown_outcome && may_be_sent_again(batch.status_.code))) {
      batch.status_ = why;
    }
  }
  finish(batch, 1);
}

void Schedule::doubt(Batch& batch) noexcept {
  std::lock_guard lock(mutex_);
  if (may_be_sent_again(batch.status_.code)) batch.status_.code = Code::unknown_outcome;
}

void Schedule::finish(Batch& batch, std::size_t operations) noexcept {
  came_back(batch.priority(), operations);
  count_down(batch, operations);
}

void Schedule::came_back(Priority priority, std::size_t operations) noexcept {
  if (priority != Priority::store) return;
  if (stores_out_.fetch_sub(operations) > operations) return;
  stores_since_ = std::max(stores_since_.load(), Clock::now());  // the others have their turn
  // Whoever was refused one may sleep, and be the only one with room.
  if (has_work(priority_bit(Priority::store))) {
    wake_sleepers(priority_bit(Priority::store), 0, inboxes_.size());
  }
}

void Schedule::count_down(Batch& batch, std::size_t operations) noexcept {
  // Release: our outcomes. Acquire: those of the workers that finished before us.
  if (batch.unfinished_.fetch_sub(operations, std::memory_order_acq_rel) != operations) return;
  std::shared_ptr<Batch> done;
  {
    std::lock_guard lock(mutex_);
    const auto it = accepted_.find(batch.id_);
    done = std::move(it->second);
    accepted_.erase(it);
    ++completing_;
    if (const auto& deadline = done->deadline_) {
      const auto [first, last] = deadlines_.equal_range(*deadline);
      for (auto at = first; at != last; ++at) {
        if (at->second == done->id_) {
          deadlines_.erase(at);
          break;
        }
      }
    }
  }
  stats_->count(*done, result_of(done->status_.code), Clock::now() - done->submitted_);
  done->queue_->push(done->id_);
  std::lock_guard lock(mutex_);
  --completing_;
  if (accepted_.empty() && completing_ == 0) emptied_.notify_all();
}

void Schedule::wake_sleepers(PrioritySet priorities, std::size_t first, std::size_t most) noexcept {
  for (std::size_t i = first; i < inboxes_.size() && most > 0; ++i) {
    if ((inboxes_[i]->priorities & priorities) == 0) continue;
    if (!inboxes_[i]->asleep.exchange(false)) continue;
    inboxes_[i]->wake();
    --most;
  }
}

// Only upwards, or two workers that can both do nothing would wake each other for ever.
void Schedule::pass_on(std::size_t from) noexcept {
  wake_sleepers(with_work(), from + 1, 1);
}

std::uint64_t Schedule::request_connection(std::uint32_t lane) {
  std::lock_guard lock(mutex_);
  connect_requests_.push_back(lane);
  connect_event_.signal();
  return generation_;
}

std::uint64_t Schedule::generation() const {
  std::lock_guard lock(mutex_);
  return generation_;
}

void Schedule::lost(std::uint32_t lane) noexcept {
  std::lock_guard lock(mutex_);
  connected_[lane] = false;
}

std::optional<Clock::time_point> Schedule::next_due() const {
  std::lock_guard lock(mutex_);
  std::optional<Clock::time_point> next;
  if (!deadlines_.empty()) next = deadlines_.begin()->first;
  if (!delayed_.empty() && (!next || delayed_.begin()->first < *next)) {
    next = delayed_.begin()->first;
  }
  return next;
}

void Schedule::run_due(Clock::time_point now) {
  const Status why{Code::timed_out, {}};
  std::shared_ptr<Batch> late;
  PrioritySet released = 0;
  {
    std::lock_guard lock(mutex_);
    while (!delayed_.empty() && delayed_.begin()->first <= now) {
      const auto [batch, index] = delayed_.begin()->second;
      go_again_locked(*batch, index);
      delayed_.erase(delayed_.begin());
      --batch->delayed_;
      released |= priority_bit(batch->priority());
    }
    while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
      // A batch may be on its way out already; then it is not accepted_ any more.
      const auto it = accepted_.find(deadlines_.begin()->second);
      if (it != accepted_.end()) abandon_locked(it->second, why, late);
      deadlines_.erase(deadlines_.begin());
    }
  }
  if (released != 0) wake_sleepers(released, 0, inboxes_.size());
  let_go(std::move(late));
}

void Schedule::worker_died(std::string_view why) noexcept {
  close({Code::internal_error, why});
}

void Schedule::note(Notice::Kind kind, std::string_view text) noexcept try {
  std::lock_guard lock(mutex_);
  if (notices_.size() >= kMostNotices) return;
  notices_.push_back({kind, std::string(text)});
  connect_event_.signal();
} catch (const std::bad_alloc&) {
  return;  // a line of a log less
}

void Schedule::close_fds() noexcept {
  for (const auto& inbox : inboxes_) inbox->close();
  std::lock_guard lock(mutex_);
  connect_event_.close();
}

void Schedule::close_fds_after_fork(bool in_order) noexcept {
  for (const auto& inbox : inboxes_) inbox->close_after_fork(in_order);
  connect_event_.close();
}

}  // namespace fastkv
