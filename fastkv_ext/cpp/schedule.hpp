// Which operation runs next: the accepted batches, a queue for each priority, retries, deadlines.
// Workers pull from it; callers and the connector thread push. Moves no bytes and owns no thread.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "batch.hpp"
#include "fd.hpp"
#include "inbox.hpp"
#include "stats.hpp"

namespace fastkv {

// What a worker has to say to whoever writes a log.
struct Notice {
  enum class Kind : std::uint8_t { connection_lost, idle_connection_lost, ranges_refused };
  Kind kind = Kind::connection_lost;
  std::string text;
};

class Schedule {
 public:
  // Values of half of `range_bytes` and more are read in ranges; 0: none is.
  Schedule(std::size_t workers, std::vector<PrioritySet> lane_priorities, std::uint64_t range_bytes,
           std::shared_ptr<Stats> stats);
  ~Schedule();

  // --- callers ---
  Status submit(const std::shared_ptr<Batch>& batch, std::uint64_t id,
                std::shared_ptr<CompletionQueue> queue, std::shared_ptr<const RetryPolicy> retry,
                std::optional<Clock::time_point> deadline);
  // Ends a batch early; it completes as soon as no worker can touch its memory any more. False if
  // it was complete already.
  bool abandon(std::uint64_t id, const Status& why) noexcept;
  // No connection that was asked for before carries anything new.
  void retire_connections();
  // No batch is accepted any more, and those accepted are abandoned.
  void close(const Status& why) noexcept;
  // After close(), and when no worker runs any more: until others have told of all they gave up.
  void wait_until_empty();
  std::size_t batches() const;
  struct Gauges {
    std::size_t connections = 0;                    // that are open
    std::array<std::size_t, kPriorities> queued{};  // keys that no connection has taken yet
  };
  Gauges gauges() const;

  // --- the connector thread ---
  int connect_event() const noexcept { return connect_event_.fd(); }
  void wake_connector() noexcept;
  std::optional<std::uint32_t> take_connect_request() noexcept;  // a lane
  std::vector<Notice> take_notices();
  void connected(std::uint32_t lane);
  // What is queued for a priority that no connection serves fails, unless it came only after the
  // last try had begun (its id is above `newest`): it is worth a try of its own.
  void connect_failed(std::uint32_t lane, std::uint64_t newest, const Status& why,
                      Clock::duration delay);

  // --- workers ---
  struct Run {  // operations [first, first + count) of one batch; count is 0 if there are none
    Batch* batch = nullptr;  // stays alive until its operations are finished
    std::uint32_t first = 0;
    std::uint32_t count = 0;
    std::shared_ptr<RangedValue> joined;  // the operation is to help with this; null: to begin
    Clock::time_point retry_at{};         // of none: ask again then, if not before
    Clock::time_point silent_since{};     // of one that came back: see requeue()
  };
  // At most a fair share of what is queued, so that the tail of a batch is spread over all lanes.
  // Nothing for a lane of an old generation. While there are lookups or retrieves, and for a while
  // after, one large store is on its way at a time: however many connections send, the server is
  // one, and each of them would have it read megabytes before it looks at the next request. A store
  // that is overdue comes before retrieves, or retrieves without end would starve it; then it is
  // their turn, or stores that are given up one after the other, each with its connection, would
  // starve them.
  //
  // A store that is given up in the middle ends its connection. So those that had no answer since
  // `silent`, whatever they were on, and the others go on connections of their own: `mixes` says
  // which a lane may take.
  enum class Mixes : std::uint8_t { any_store, silent_stores, other_stores };
  Run pull(PrioritySet priorities, std::uint64_t generation, std::size_t max_requests,
           std::uint64_t max_bytes, Clock::time_point now, Mixes mixes = Mixes::any_store,
           Clock::time_point silent = Clock::time_point::min());
  bool has_work(PrioritySet priorities) const noexcept;
  // Somebody may wait for a lookup or a retrieve.
  bool urgent(Clock::time_point now) const noexcept { return now < urgent_until_.load(); }
  // Stores have waited for so long that one may stand behind what a connection reads.
  bool stores_overdue(Clock::time_point now) const noexcept;
  // A large value that a lane has begun: idle ones may help(), once it is open. With a snapshot,
  // only those that lead to the same server for certain: two servers of one name may hold two
  // versions, and nobody touches either. `server` is empty as long as it is not known.
  void offer(Batch& batch, std::uint32_t index, const std::shared_ptr<RangedValue>& ranges,
             std::uint32_t lane, const std::string& server);
  void identified(std::uint32_t lane, const std::string& server);
  // Whether the server answers at once: it has, to a request on an idle connection, since the last
  // connection was made.
  void answered_at_once() noexcept { near_ = true; }
  bool near() const noexcept { return near_; }
  // What is known of the server's allocator, if anything. The first worker that needs it asks.
  bool first_to_ask_allocator() noexcept { return !allocator_asked_.exchange(true); }
  void pays_for_replies() noexcept { replies_cost_ = true; }
  bool replies_cost() const noexcept { return replies_cost_; }
  void wake_helpers() noexcept;
  // A hint whether there is an offer, and whether one is worth a new connection.
  bool wants_help(PrioritySet priorities) const noexcept;
  bool worth_connecting();
  bool worth_identifying();
  Run help(std::uint64_t generation, const std::string& server);
  // An operation that came back: queues it again if the batch's policy allows another attempt after
  // `why`. `sent`: the server may have seen it. `counted`: it uses up an attempt. `silent_since`:
  // if its connection was dropped for others' sake, when that last said something; of several such
  // losses in a row the first counts. If false, the worker must answer or fail it.
  bool requeue(Batch& batch, std::uint32_t index, bool sent, bool counted, Code why,
               Clock::time_point silent_since = {}) noexcept;
  void fail(Batch& batch, const Status& why) noexcept;
  // An operation of an abandoned batch was sent, must not be repeated, and is not answered.
  void doubt(Batch& batch) noexcept;
  void finish(Batch& batch, std::size_t operations) noexcept;  // that were pulled
  // Somebody may sleep who can carry what worker `from` was woken for and could not.
  void pass_on(std::size_t from) noexcept;
  // Returns the generation that the new connection will be of.
  std::uint64_t request_connection(std::uint32_t lane);
  std::uint64_t generation() const;
  void lost(std::uint32_t lane) noexcept;
  // Deadlines and delayed attempts are watched by one worker, the first.
  std::optional<Clock::time_point> next_due() const;
  void run_due(Clock::time_point now);
  void worker_died(std::string_view why) noexcept;
  // The connector will read it, unless there is no memory for it.
  void note(Notice::Kind kind, std::string_view text) noexcept;
  Stats& stats() noexcept { return *stats_; }

  std::size_t workers() const noexcept { return inboxes_.size(); }
  Inbox& inbox(std::size_t worker) noexcept { return *inboxes_[worker]; }
  Inbox& inbox_of_lane(std::uint32_t lane) noexcept { return *inboxes_[lane % inboxes_.size()]; }
  std::uint32_t lanes() const noexcept { return static_cast<std::uint32_t>(lanes_.size()); }
  PrioritySet lane_priorities(std::uint32_t lane) const noexcept { return lanes_[lane]; }

  // Held while the set of open sockets changes, and across fork: a child finds them in order.
  std::mutex& fork_mutex() noexcept { return fork_mutex_; }
  // When no worker runs any more.
  void close_fds() noexcept;
  void close_fds_after_fork(bool in_order) noexcept;

 private:
  void count_down(Batch& batch, std::size_t operations) noexcept;
  void came_back(Priority priority, std::size_t operations) noexcept;
  void drop_offers_locked(const Batch* of) noexcept;
  void enqueue_locked(Batch& batch, std::size_t operations);
  Clock::time_point silent_since_locked(Priority priority) const noexcept;
  Run take_locked(Priority priority, std::size_t max_requests, std::uint64_t max_bytes);
  void go_again_locked(Batch& batch, std::uint32_t index);
  // Abandons a batch, unless it is: puts it before those in `abandoned`, which let_go() must be
  // given, without the lock.
  void abandon_locked(const std::shared_ptr<Batch>& batch, const Status& why,
                      std::shared_ptr<Batch>& abandoned) noexcept;
  void let_go(std::shared_ptr<Batch> abandoned) noexcept;
  bool served_locked(Priority priority) const noexcept;
  std::size_t lanes_serving(Priority priority) const noexcept;
  PrioritySet with_work() const noexcept;
  // Up to `most` workers, from number `first` on, that serve one of `priorities`.
  void wake_sleepers(PrioritySet priorities, std::size_t first, std::size_t most) noexcept;

  // immutable after start
  const std::vector<PrioritySet> lanes_;
  const std::uint64_t range_bytes_;
  // Shared: a later engine of the same client goes on counting, and it is read after our end.
  const std::shared_ptr<Stats> stats_;
  std::vector<std::unique_ptr<Inbox>> inboxes_;

  std::mutex fork_mutex_;
  mutable std::mutex mutex_;
  EventFd connect_event_;  // signalled, cleared and closed under mutex_
  // guarded by mutex_
  std::uint64_t generation_ = 0;  // counts retire_connections
  Status refusal_;                // not ok: no batch is accepted any more
  // Shared with the Python object that reads the outcomes after completion.
  std::unordered_map<std::uint64_t, std::shared_ptr<Batch>> accepted_;
  std::size_t completing_ = 0;  // not accepted_ any more, and not on their queues yet
  std::condition_variable emptied_;
  std::array<std::deque<Batch*>, kPriorities> queues_;
  std::multimap<Clock::time_point, std::uint64_t> deadlines_;
  struct Delayed {
    Batch* batch = nullptr;
    std::uint32_t index = 0;
  };
  std::multimap<Clock::time_point, Delayed> delayed_;
  struct Offer {
    Batch* batch = nullptr;  // alive as long as somebody reads the value
    std::uint32_t index = 0;
    std::weak_ptr<RangedValue> ranges;
    std::uint32_t lane = 0;
    std::string server;
  };
  std::vector<Offer> offers_;
  std::vector<std::uint32_t> connect_requests_;
  std::vector<Notice> notices_;
  std::vector<bool> connected_;  // by lane
  bool loads_turn_ = false;      // a store went before them, where either might have

  // Operations queued, by priority. Written under mutex_; read without it as a hint whether pull
  // is worth the lock (see Inbox::asleep).
  std::array<std::atomic<std::size_t>, kPriorities> queued_{};
  std::atomic<std::size_t> offered_{0};            // offers_.size(), likewise
  std::atomic<Clock::time_point> urgent_until_{};  // written under mutex_
  // Stores are queued since then, or one was pulled; or none is on its way, written without mutex_:
  // a later value of another thread's may win, and is as good.
  std::atomic<Clock::time_point> stores_since_{};
  std::atomic<bool> near_{false};
  std::atomic<bool> allocator_asked_{false};
  std::atomic<bool> replies_cost_{false};
  std::atomic<std::size_t> stores_out_{0};  // stores that were pulled and are not finished
};

}  // namespace fastkv
