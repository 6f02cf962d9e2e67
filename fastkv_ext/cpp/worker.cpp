#include "worker.hpp"

#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <ctime>
#include <exception>
#include <new>
#include <string_view>
#include <system_error>
#include <utility>

namespace fastkv {
namespace {

// What one connection may read, or write, before the others have a turn.
constexpr std::size_t kTurnBytes = std::size_t{1} << 20;
// Of a store, in one system call, while somebody waits for a lookup or a retrieve: what lies in the
// server's socket is read before the next request is. Without need it would halve the rate of SETs.
constexpr std::size_t kUrgentWrite = std::size_t{512} << 10;
// What somebody waits, in silence, for a reply that is not his: to an operation that another has
// given up, or to a health check. Then the connection is taken for dead, as redis-py takes each
// whose caller has timed out.
constexpr auto kDoubtPatience = std::chrono::seconds(1);
// Without a stall time-out: what had no answer for so long goes apart from those who give up.
constexpr auto kSilence = std::chrono::seconds(5);
// To be woken costs a server on this machine more than it costs us to wake up by ourselves: on a
// virtual one 25 us of its one thread, time and again. So while much is on its way from it, nothing
// is there yet, and the last wait for so much was shorter than this, we wait for the clock first.
constexpr auto kNap = std::chrono::microseconds(50);
// More than comes during a nap, so that no server runs out of requests meanwhile.
constexpr std::uint64_t kNapBytes = std::uint64_t{512} << 10;
// With 256 KiB on their way, a connection to a server so far away still carries 10 Gbit/s.
constexpr auto kNearRoundTrip = std::chrono::microseconds(200);
// To fall asleep and be woken takes longer than a small value from a server that answers at once,
// 10 us and more on a virtual machine. So for so long we look for it first.
constexpr auto kLook = std::chrono::microseconds(20);
// More than that takes longer.
constexpr std::uint64_t kLookBytes = std::uint64_t{128} << 10;
// The kernel likes to run whom it wakes where the one ran that woke it. Server and worker wake each
// other, so over the loopback they may come to share one processor while another idles: for 50 ms
// and more on a virtual machine, where one that is halted counts as taken, and at half the speed.
// So a worker leaves if it finds so often in a row that it runs where the server does. (Once says
// little: what came last may be the kernel's acknowledgement of what we send, from here.)
constexpr int kSharedLooks = 3;
// It costs 30 to 50 us, and has to be worth that: not before the work has lasted for so long ...
constexpr auto kLeaveAfter = std::chrono::microseconds(400);
// ... and so soon again only if the last time helped for as long as kHelped.
constexpr auto kLeavePause = std::chrono::microseconds(100);
constexpr auto kMaxLeavePause = 16 * kLeavePause;
constexpr auto kHelped = std::chrono::microseconds(500);
// Between two connections for the sake of others' values, if the first had done nothing.
constexpr auto kHelpPause = std::chrono::seconds(1);
// Of a worker's own requests.
constexpr std::uint32_t kHealthTicket = 0;
constexpr std::uint32_t kServerTicket = 1;
constexpr std::uint32_t kAllocatorTicket = 2;
// INFO server has less than 2 KiB, INFO memory less than 3.
constexpr std::size_t kInfoBytes = std::size_t{8} << 10;

constexpr const char* kNoMemory = "out of memory";

// Whether a nap ends when it should, or at the next tick of the kernel, which may be 10 ms away.
bool clock_is_fine() noexcept {
  timespec tick{};
  return ::clock_getres(CLOCK_MONOTONIC, &tick) == 0 &&
         std::chrono::seconds(tick.tv_sec) + std::chrono::nanoseconds(tick.tv_nsec) < kNap;
}

// Moves this thread to another processor; from then on it may run on this one again.
void leave_cpu(int cpu) noexcept {
  cpu_set_t before;
  if (::sched_getaffinity(0, sizeof before, &before) < 0) return;
  cpu_set_t others = before;
  CPU_CLR(static_cast<unsigned>(cpu), &others);
  // Who has pinned us to one gets that.
  if (CPU_COUNT(&others) == 0 || ::sched_setaffinity(0, sizeof others, &others) < 0) return;
  // The kernel remembers what was asked for: all of them, so that we follow when a container is
  // given more, unless somebody had asked for less.
  cpu_set_t all;
  std::memset(&all, 0xff, sizeof all);
  cpu_set_t after;
  if (::sched_setaffinity(0, sizeof all, &all) < 0 ||
      ::sched_getaffinity(0, sizeof after, &after) < 0 || !CPU_EQUAL(&after, &before)) {
    ::sched_setaffinity(0, sizeof before, &before);
  }
}

}  // namespace

Worker::Worker(std::size_t index, Schedule& schedule, Window window)
    : index_(index),
      schedule_(schedule),
      window_(window),
      can_nap_(clock_is_fine()),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (!epoll_) throw std::system_error(errno, std::generic_category(), "epoll_create1");
  epoll_event event{.events = EPOLLIN, .data = {.ptr = nullptr}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, schedule_.inbox(index_).fd(), &event) < 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
  for (std::uint32_t number = 0; number < schedule_.lanes(); ++number) {
    if (number % schedule_.workers() != index_) continue;
    auto lane = std::make_unique<Lane>();
    lane->number = number;
    lane->priorities = schedule_.lane_priorities(number);
    lanes_.push_back(std::move(lane));
  }
}

void Worker::start() {
  // Signals are for the threads of the application.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread(&Worker::run, this);
  } catch (...) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void Worker::join() {
  if (thread_.joinable()) thread_.join();
}

void Worker::run() noexcept {
  ::pthread_setname_np(::pthread_self(), "fastkv-worker");
  ::prctl(PR_SET_TIMERSLACK, 1UL);  // or naps would take twice as long
  const auto end = [this](const Status& why) {
    if (const auto joined = std::exchange(carried_.joined, nullptr)) {
      joined->lose(why, false);
      if (!joined->leave()) carried_.count = 0;  // the other readers will find out
    }
    for (; carried_.count > 0; --carried_.count) schedule_.fail(*carried_.batch, why);
    for (const auto& lane : lanes_) {
      if (lane->state != State::connected) continue;
      settle(*lane);  // what was complete when something threw
      if (lane->stream) lose(*lane, why, false);
    }
    flush_finished();
    std::lock_guard lock(schedule_.fork_mutex());
    letter_ = {};  // with connections that came too late
  };
  try {
    loop();
    // close() abandoned every batch before it stopped us: nothing is queued again.
    end({Code::closed, {}});
  } catch (const std::exception& error) {
    schedule_.worker_died(error.what());
    end({Code::internal_error, error.what()});
  } catch (...) {
    schedule_.worker_died("unknown exception in a worker");
    end({Code::internal_error, {}});
  }
}

void Worker::loop() {
  Inbox& inbox = schedule_.inbox(index_);
  std::array<epoll_event, 64> events;
  bool woken = false;
  for (;;) {
    // What lies in OpenSSL's memory makes no socket readable.
    turn_again_ =
        std::any_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->reads_on; });
    flush_finished();  // before new work: somebody waits for it
    now_ = Clock::now();
    // From here on whoever queues work wakes us: see Inbox::asleep.
    inbox.asleep = true;
    stores_held_until_.reset();
    for (const auto& lane : lanes_) feed(*lane);
    // We were woken for one of them, perhaps, and have no room for that. A store that is held back
    // is so for everybody.
    const auto left =
        stores_held_until_ ? without(inbox.priorities, Priority::store) : inbox.priorities;
    if (woken && schedule_.has_work(left)) schedule_.pass_on(index_);
    // Writing may have lost a connection, or completed something by a reply that came meanwhile.
    const int timeout = turn_again_ ? 0 : next_timeout();
    const auto look = [&](int milliseconds) {
      return ::epoll_wait(epoll_.get(), events.data(), events.size(), milliseconds);
    };
    const bool idle = std::all_of(lanes_.begin(), lanes_.end(),
                                  [](const auto& lane) { return lane->session.requests() == 0; });
    if (idle) {
      shared_cpu_.reset();
    } else if (shared_cpu_) {
      leave_cpu(*std::exchange(shared_cpu_, std::nullopt));  // the server has something to do
    }
    const bool may_nap = timeout != 0 && naps_are_fine();
    int count = 0;
    if (may_nap && waits_are_short_) {
      count = look(0);
      if (count == 0) std::this_thread::sleep_for(kNap);
    } else if (timeout != 0 && is_soon_answered()) {
      const auto until = Clock::now() + kLook;
      do {
        count = look(0);
        if (count == 0) std::this_thread::yield();  // to the server, perhaps
      } while (count == 0 && Clock::now() < until);
    }
    if (count == 0) {
      const auto from = may_nap ? Clock::now() : now_;
      count = look(timeout);
      if (may_nap) waits_are_short_ = Clock::now() - from < kNap;
    }
    if (count < 0 && errno != EINTR) {
      throw std::system_error(errno, std::generic_category(), "epoll_wait");
    }
    inbox.asleep = false;
    now_ = Clock::now();
    if (idle) leave_at_ = std::max(leave_at_, now_ + kLeaveAfter);
    woken = false;
    for (const auto& lane : lanes_) {
      if (lane->reads_on) receive(*lane);
    }
    for (int i = 0; i < count; ++i) {
      const epoll_event& event = events[static_cast<std::size_t>(i)];
      auto* const lane = static_cast<Lane*>(event.data.ptr);
      if (!lane) {
        woken = true;
        continue;
      }
      if (lane->stream &&
          ((event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0 || lane->stream->crossed())) {
        const bool values = lane->session.outstanding_bytes() > 0;
        receive(*lane);
        if (values) look_at_cpu(*lane);
      }
      if (lane->stream && (event.events & EPOLLOUT) != 0) transmit(*lane);
    }
    if (woken && !handle_messages()) return;
    check_stalls();
    if (index_ == 0) schedule_.run_due(now_);
  }
}

// False: stop.
bool Worker::handle_messages() {
  Inbox& inbox = schedule_.inbox(index_);
  const bool letter_came = inbox.look();
  if (letter_came) {
    // Only then: a fork holds the mutex, and may wait for somebody who waits for us.
    std::lock_guard lock(schedule_.fork_mutex());
    letter_ = inbox.take();
  }
  while (const auto batch = inbox.take_abandoned(index_)) abandon(*batch);
  if (!letter_came) return true;
  for (Message& message : letter_.messages) {
    if (auto* adopted = std::get_if<Adopt>(&message)) {
      adopt(*lane_of(adopted->lane), std::move(*adopted));
    } else if (const auto* failed = std::get_if<ConnectFailed>(&message)) {
      Lane& lane = *lane_of(failed->lane);
      lane.state = State::absent;
      lane.retry_at = now_ + failed->delay;
    }
  }
  return !letter_.stop;
}

void Worker::adopt(Lane& lane, Adopt&& message) {
  epoll_event event{.events = EPOLLIN, .data = {.ptr = &lane}};
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, message.stream->fd(), &event) < 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
  {
    std::lock_guard lock(schedule_.fork_mutex());
    lane.stream = std::move(message.stream);
  }
  lane.state = State::connected;
  lane.fresh = true;
  lane.server_asked = false;
  lane.server.clear();
  if (std::exchange(lane.reconnects, true)) schedule_.stats().reconnects.add();
  lane.checking = lane.polls_write = lane.reads_on = false;
  lane.asked_idle = false;
  lane.stall_timeout = message.stall_timeout;
  lane.health_interval = message.health_interval;
  lane.progress = now_;
}

void Worker::receive(Lane& lane) {
  receive_some(lane);
  if (!lane.stream) return;
  lane.stream->expect(lane.session.sure_bytes());
  lane.reads_on = lane.stream->holds_bytes();
  if (lane.reads_on) turn_again_ = true;
  if (lane.stream->crossed()) poll_as_needed(lane);
}

void Worker::receive_some(Lane& lane) {
  for (std::size_t total = 0; total < kTurnBytes;) {
    const auto target = lane.session.prepare_read();
    std::size_t room = 0;
    for (const iovec& part : target) room += part.iov_len;
    const auto moved = lane.stream->read(target);
    if (!moved.status.ok()) return lose(lane, moved.status, true);
    if (moved.bytes == 0) return;
    lane.closed_at_once = false;
    if (std::exchange(lane.asked_idle, false) && now_ - lane.progress <= kNearRoundTrip) {
      schedule_.answered_at_once();
    }
    lane.progress = now_;
    const Status status = lane.session.commit_read(moved.bytes);
    settle(lane);
    if (!lane.stream) return;  // a reply said that the connection must go
    if (!status.ok()) return lose(lane, status, status.code != Code::closed);
    // A short read emptied the socket; the next would only say EAGAIN. So would one after the
    // last reply.
    if (moved.bytes < room || lane.session.requests() == 0) return;
    total += moved.bytes;
  }
}

void Worker::transmit(Lane& lane) {
  const bool urgent = lane.session.stores() > 0 && schedule_.urgent(now_);
  const std::size_t turn = urgent ? kUrgentWrite : kTurnBytes;
  for (std::size_t total = 0; total < turn && lane.session.has_unsent();) {
    const auto source = lane.session.prepare_write(urgent ? turn - total : SIZE_MAX);
    const auto moved = lane.stream->write(source);
    if (!moved.status.ok()) {
      // The peer may have said why before it closed; what it answered still counts.
      receive(lane);
      if (lane.stream) lose(lane, moved.status, true);
      return;
    }
    if (moved.bytes == 0) break;
    if (!lane.session.awaits_reply()) lane.progress = now_;
    lane.session.commit_write(moved.bytes);
    total += moved.bytes;
  }
  poll_as_needed(lane);
}

void Worker::poll_as_needed(Lane& lane) {
  const bool poll_write = lane.session.has_unsent() || lane.stream->crossed();
  if (poll_write == lane.polls_write) return;
  epoll_event event{.events = EPOLLIN, .data = {.ptr = &lane}};
  if (poll_write) event.events |= EPOLLOUT;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, lane.stream->fd(), &event) < 0) {
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
  }
  lane.polls_write = poll_write;
}

// Hands what the session completed to its batches. Takes no memory that it cannot do without: each
// of them is counted once, whatever happens.
void Worker::settle(Lane& lane) noexcept {
  Status drop;
  for (Completed& completed : lane.session.completed()) {
    const bool refused = completed.outcome == Outcome::refused;
    if (!completed.ticket.owner) {
      if (completed.ticket.index == kServerTicket) {
        learn_server(lane, completed);
        continue;
      }
      if (completed.ticket.index == kAllocatorTicket) {
        learn_allocator(completed);
        continue;
      }
      lane.checking = false;
      if (refused && drop.ok()) drop = {Code::connection_lost, std::move(completed.error)};
      continue;
    }
    auto& batch = *static_cast<Batch*>(completed.ticket.owner);
    const std::uint32_t index = completed.ticket.index;
    if (refused && batch.retried_by_policy(completed.error)) {
      if (drop.ok()) drop = {Code::connection_lost, completed.error};
      // A master that was demoted is so for all connections to it: the next attempt is for a new
      // one.
      if (completed.error.starts_with("READONLY ")) schedule_.retire_connections();
      // An error reply says that the command did not run, so even a conditional SET may go again.
      if (schedule_.requeue(batch, index, false, true, Code::connection_lost)) continue;
    }
    if (completed.outcome == Outcome::lost) {
      const auto& ranges = *completed.ranges;
      give_back(lane, completed.ticket, true, ranges.loss_counted(), ranges.loss());
      continue;
    }
    if (completed.outcome == Outcome::torn || completed.outcome == Outcome::misfit) {
      batch.note_range_failure(index, completed.outcome);
      // If not, the batch was abandoned, and has a status.
      if (!schedule_.requeue(batch, index, false, false, Code::ok)) {
        schedule_.fail(batch, {Code::internal_error, kNoMemory});
      }
      continue;
    }
    if (completed.outcome == Outcome::hit || completed.outcome == Outcome::miss) {
      batch.answer(index, completed.outcome);
    } else if (!batch.answer(std::move(completed))) {
      schedule_.fail(batch, {Code::internal_error, kNoMemory});
      continue;
    }
    finished(&batch);
  }
  lane.session.completed().clear();
  if (lane.session.take_news()) {
    turn_again_ = true;
    schedule_.wake_helpers();
  }
  if (const std::string line = lane.session.take_refusal(); !line.empty()) {
    schedule_.note(Notice::Kind::ranges_refused, line);
  }
  if (!drop.ok()) lose(lane, drop, true);
}

// Gives a lane with room what the schedule has for it.
void Worker::feed(Lane& lane) {
  const bool fresh = std::exchange(lane.fresh, false);
  if (lane.state == State::connected && lane.session.requests() == 0 &&
      lane.generation != schedule_.generation()) {
    lose(lane, {Code::closed, {}}, false);
  }
  if (lane.state == State::connected && lane.session.pumping()) {
    lane.session.pump(load_window(lane));
    settle(lane);
    if (lane.stream && !lane.polls_write) transmit(lane);
  }
  const bool has_work = schedule_.has_work(lane.priorities);
  const auto may_help = [&] {
    return !lane.session.ranges_refused() && schedule_.wants_help(lane.priorities);
  };
  if (!has_work && !may_help()) return;
  const bool idle = lane.session.requests() == 0;
  // The server may have closed an idle connection since epoll was asked. That is no loss yet, and
  // must not use up an attempt; redis-py looks before each command, too. One that closes each
  // connection at once must not have us connect for ever.
  if (lane.state == State::connected && idle && !(fresh && lane.closed_at_once)) {
    receive(lane);
    lane.closed_at_once |= fresh && lane.state != State::connected;
  }
  if (lane.state == State::absent && now_ >= lane.retry_at &&
      (has_work || (now_ >= lane.help_at && schedule_.worth_connecting()))) {
    lane.state = State::requested;
    lane.generation = schedule_.request_connection(lane.number);
  }
  if (lane.state != State::connected || lane.checking) return;
  if (lane.session.owes_given_up()) return;  // others may be quicker, see is_in_doubt
  Session& session = lane.session;
  if (lane.kept_from != Clock::time_point::max() && !session.holds_returned()) {
    lane.kept_from = Clock::time_point::max();
    lane.waited = {};
  }
  if (idle && lane.health_interval.count() > 0 && now_ - lane.progress > lane.health_interval) {
    lane.checking = true;
    session.push({.command = Command::ping, .ticket = {nullptr, kHealthTicket}});
    lane.progress = now_;
    transmit(lane);
    return;
  }
  bool fed = false;
  while (!session.pumping() && session.requests() < window_.requests) {
    const bool stores_only =
        session.stores() > 0 || !schedule_.has_work(without(lane.priorities, Priority::store));
    const std::uint64_t window = stores_only ? window_.bytes : load_window(lane);
    const std::uint64_t outstanding = session.outstanding_bytes();
    // One more than is being moved, however large, or the round trip would show.
    if (outstanding >= window && session.requests() >= 2) break;
    PrioritySet priorities = lane.priorities;
    // What is wanted soon must not stand behind a store.
    if (session.stores() > 0) {
      priorities = without(priorities, Priority::retrieve);
      // Nor would they ever have their turn here if another store went behind that one.
      if (schedule_.has_work(without(lane.priorities, Priority::store))) {
        priorities = without(priorities, Priority::store);
      }
    }
    if (session.requests() > session.stores() && !schedule_.stores_overdue(now_)) {
      priorities = without(priorities, Priority::store);
    }
    auto mixes = Schedule::Mixes::any_store;
    if (session.stores() > 0) mixes = Schedule::Mixes::other_stores;
    if (now_ >= lane.kept_from) mixes = Schedule::Mixes::silent_stores;
    carried_ =
        schedule_.pull(priorities, lane.generation, window_.requests - session.requests(),
                       window - std::min(window, outstanding), now_, mixes, now_ - silence(lane));
    if (carried_.count == 0) {
      if (carried_.retry_at > now_) stores_held_until_ = carried_.retry_at;
      break;
    }
    fed = true;
    carry(lane);
  }
  if (session.requests() == 0 && may_help()) {
    carried_ = schedule_.help(lane.generation, lane.server);
    fed |= carried_.count > 0;
    carry(lane);
    if (session.requests() == 0 && !lane.server_asked && schedule_.worth_identifying()) {
      ask_server(lane);
      fed = true;
    }
  }
  if (!fed) return;
  // Others may have read all of a value between our joining it and our first claim.
  settle(lane);
  if (!lane.stream) return;
  if (idle) {
    lane.progress = now_;
    lane.asked_idle = true;
  }
  // Otherwise epoll says when the socket takes more.
  if (!lane.polls_write) transmit(lane);
}

// Pushes what was pulled.
void Worker::carry(Lane& lane) {
  while (carried_.count > 0) {
    const std::uint32_t index = carried_.first;
    Operation operation = carried_.batch->operation(index, schedule_.replies_cost());
    if (carried_.joined) {
      operation.ranges = carried_.joined;
      operation.helping = true;
    } else if (operation.ranges && lane.session.read_whole()) {
      operation.ranges = nullptr;
    }
    operation.returned = carried_.silent_since != Clock::time_point{};
    const bool offered = operation.ranges && !operation.helping && operation.ranges->divisible();
    if (offered && operation.ranges->snapshot() && !lane.server_asked) ask_server(lane);
    if (operation.ranges && window_.fits_allocator && carried_.batch->is_small(index) &&
        schedule_.first_to_ask_allocator()) {
      ask_allocator(lane);
    }
    lane.session.push(operation);
    if (operation.returned) {
      lane.kept_from = std::min(lane.kept_from, carried_.silent_since + silence(lane));
      lane.waited = std::max(lane.waited, now_ - carried_.silent_since);
    }
    // From here on it is the session's, and until here ours: whatever throws, it is ended once.
    carried_.joined = nullptr;
    ++carried_.first;
    --carried_.count;
    // There was room for all of the run, and the next must not be pushed before this is asked for.
    lane.session.pump(carried_.count > 0 ? UINT64_MAX : load_window(lane));
    if (offered) {
      schedule_.offer(*carried_.batch, index, operation.ranges, lane.number, lane.server);
    }
  }
}

std::uint64_t Worker::load_window(const Lane& lane) const noexcept {
  if (!schedule_.near() || window_.near_load_bytes == 0) return window_.bytes;
  // Parts are shorter than ranges, and twice as many bytes made the server pay again. But who has
  // chosen a window gets it.
  const bool default_window = window_.near_load_bytes < window_.bytes;
  const bool half = default_window && lane.session.pumping_parts();
  return half ? (window_.near_load_bytes + 1) / 2 : window_.near_load_bytes;
}

void Worker::ask_allocator(Lane& lane) {
  allocator_reply_.resize(kInfoBytes);
  allocator_target_ = {reinterpret_cast<std::byte*>(allocator_reply_.data()), kInfoBytes};
  lane.session.push({.command = Command::memory,
                     .ticket = {nullptr, kAllocatorTicket},
                     .value = {&allocator_target_, 1}});
}

// The C library's gives memory back to the system as soon as the free end of the heap is twice as
// long as the largest block that was ever freed. For values of half a megabyte that is the replies
// that four connections wait for, so that each is written to new pages: 100,000 page faults a GB.
void Worker::learn_allocator(const Completed& reply) noexcept {
  const std::string_view info(
      allocator_reply_.data(),
      reply.outcome == Outcome::hit ? static_cast<std::size_t>(reply.actual_bytes) : 0);
  if (info.find("\nmem_allocator:libc\r") != std::string_view::npos) schedule_.pays_for_replies();
  allocator_reply_ = {};
}

// Which server is at the other end: of one name there may be several.
void Worker::ask_server(Lane& lane) {
  lane.server_asked = true;
  lane.server_reply.resize(kInfoBytes);
  lane.server_target = {reinterpret_cast<std::byte*>(lane.server_reply.data()), kInfoBytes};
  lane.session.push({.command = Command::server,
                     .ticket = {nullptr, kServerTicket},
                     .value = {&lane.server_target, 1}});
}

// Without an answer, for lack of permission or memory, say, the lane shares no snapshots.
void Worker::learn_server(Lane& lane, const Completed& reply) noexcept try {
  if (reply.outcome == Outcome::hit) {
    lane.server_reply.resize(static_cast<std::size_t>(reply.actual_bytes));
    constexpr std::string_view kField = "\nrun_id:";
    if (const auto at = lane.server_reply.find(kField); at != std::string::npos) {
      const auto begin = at + kField.size();
      lane.server = lane.server_reply.substr(begin, lane.server_reply.find('\r', begin) - begin);
    }
  }
  lane.server_reply = {};
  if (lane.server.empty()) return;
  turn_again_ = true;
  schedule_.identified(lane.number, lane.server);
} catch (const std::bad_alloc&) {
  lane.server.clear();
}

// Drops the connection. Its operations go back to the queue as far as their policy allows.
// `counted`: the loss is the connection's fault, and uses up an attempt of each.
void Worker::lose(Lane& lane, const Status& why, bool counted) noexcept {
  turn_again_ = true;
  // Some proxies hang up on what they do not know. It was our question, and the only one.
  counted &= !lane.session.asks_memory();
  if (why.code == Code::stalled && counted) schedule_.stats().stalls.add();
  if (counted) {
    const bool idle = lane.session.requests() == 0;
    schedule_.note(idle ? Notice::Kind::idle_connection_lost : Notice::Kind::connection_lost,
                   why.detail);
  }
  // Closing alone would not do, if a forked child still holds the socket.
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, lane.stream->fd(), nullptr);
  {
    std::lock_guard lock(schedule_.fork_mutex());
    lane.stream.reset();
  }
  lane.state = State::absent;
  lane.checking = lane.polls_write = lane.reads_on = false;
  schedule_.lost(lane.number);
  const auto& lost = lane.session.reset(why, counted);
  if (lost.empty()) lane.help_at = now_ + kHelpPause;
  // Each goes before those that were not asked for yet: the oldest last.
  for (auto it = lost.rbegin(); it != lost.rend(); ++it) {
    give_back(lane, it->ticket, it->sent, counted && it->counted, why);
  }
  // Who only helped to read what was lost here need not wait for its own server any more.
  schedule_.wake_helpers();
}

void Worker::give_back(const Lane& lane, const Ticket& ticket, bool sent, bool counted,
                       const Status& why) noexcept {
  auto& batch = *static_cast<Batch*>(ticket.owner);
  if (why.code == Code::protocol_error && counted) return schedule_.fail(batch, why);
  const auto silent_since = counted ? Clock::time_point{} : lane.progress;
  if (schedule_.requeue(batch, ticket.index, sent, counted, why.code, silent_since)) return;
  if (sent && !batch.repeatable()) {
    schedule_.fail(batch, {Code::unknown_outcome, why.detail});
  } else {
    schedule_.fail(batch, why);
  }
}

void Worker::abandon(Batch& batch) noexcept {
  // Counted operations of the batch must be out before its last ones are.
  flush_finished();
  for (const auto& lane : lanes_) {
    if (lane->state != State::connected) continue;
    const auto abandoned = lane->session.abandon(&batch);
    if (abandoned.released == 0) continue;
    if (!abandoned.usable) lose(*lane, {Code::cancelled, {}}, false);
    if (abandoned.sent && !batch.repeatable()) schedule_.doubt(batch);
    schedule_.finish(batch, abandoned.released);
  }
}

void Worker::finished(Batch* batch) noexcept {
  turn_again_ = true;
  if (batch != finished_batch_) {
    flush_finished();
    finished_batch_ = batch;
  }
  ++finished_count_;
}

void Worker::flush_finished() noexcept {
  if (finished_count_ == 0) return;
  schedule_.finish(*std::exchange(finished_batch_, nullptr), std::exchange(finished_count_, 0));
}

// --- clock -------------------------------------------------------------------------------------

int Worker::next_timeout() const {
  std::optional<Clock::time_point> next;
  const auto consider = [&next](Clock::time_point at) {
    if (!next || at < *next) next = at;
  };
  for (const auto& lane : lanes_) {
    if (lane->state == State::connected && lane->session.requests() > 0 &&
        lane->stall_timeout.count() > 0) {
      consider(lane->progress + lane->stall_timeout);
    }
    if (is_in_doubt(*lane)) consider(lane->progress + doubt_patience(*lane));
    if (lane->state == State::absent && lane->retry_at > now_ &&
        schedule_.has_work(lane->priorities)) {
      consider(lane->retry_at);
    }
  }
  if (stores_held_until_) consider(*stores_held_until_);
  if (index_ == 0) {
    if (const auto due = schedule_.next_due()) consider(*due);
  }
  if (!next) return -1;
  if (*next <= now_) return 0;
  // Rounded up, or the loop would spin through the last millisecond.
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(*next - now_).count();
  return static_cast<int>(std::min<std::int64_t>(left, 60'000));
}

// Whether to sleep for kNap costs nobody more than that: values are on their way, many bytes of
// them and all from this machine. Stores would leave the server's socket empty, and who waits for a
// lookup wants it at once.
bool Worker::naps_are_fine() const noexcept {
  if (!can_nap_) return false;
  std::uint64_t bytes = 0;
  for (const auto& lane : lanes_) {
    if (lane->state != State::connected || lane->session.requests() == 0) continue;
    const std::uint64_t outstanding = lane->session.outstanding_bytes();
    if (outstanding == 0 || lane->session.stores() > 0 || !lane->stream->is_woken_by_peer()) {
      return false;
    }
    bytes += outstanding;
  }
  return bytes >= kNapBytes;
}

// Whether a small value is on its way, and nothing larger. Not for lookups alone: they come as one
// burst, and looking would take a tenth of their rate.
bool Worker::is_soon_answered() const noexcept {
  if (!schedule_.near()) return false;
  std::uint64_t bytes = 0;
  for (const auto& lane : lanes_) {
    if (lane->state == State::connected) bytes += lane->session.outstanding_bytes();
  }
  return bytes > 0 && bytes < kLookBytes;
}

// When something has come of a value, or the answer to a store. Lookups are sent all the time while
// others are answered, so they would tell nothing: see kSharedLooks.
void Worker::look_at_cpu(const Lane& lane) noexcept {
  const int server = lane.stream ? lane.stream->sender_cpu() : -1;
  if (server < 0) return;
  if (server != ::sched_getcpu()) {
    shared_looks_ = 0;
    shared_cpu_.reset();
    apart_at_ = now_;
    return;
  }
  if (++shared_looks_ < kSharedLooks || now_ < leave_at_) return;
  shared_looks_ = 0;
  shared_cpu_ = server;
  const bool helped = apart_at_ - left_at_ >= kHelped;
  leave_pause_ = std::clamp<Clock::duration>(helped ? kLeavePause : 2 * leave_pause_, kLeavePause,
                                             kMaxLeavePause);
  left_at_ = now_;
  leave_at_ = now_ + leave_pause_;
}

// What has waited in vain elsewhere waits here for as long again: a server that is slow answers at
// last, and nobody stays on a dead connection.
Clock::duration Worker::doubt_patience(const Lane& lane) noexcept {
  const bool returned = lane.waited > kDoubtPatience && lane.session.holds_returned();
  return returned ? lane.waited : kDoubtPatience;
}

// After which the lane's operations are silent in the sense of Schedule::pull().
Clock::duration Worker::silence(const Lane& lane) noexcept {
  return lane.stall_timeout.count() > 0 ? lane.stall_timeout : kSilence;
}

// Whether the connection, if it says nothing, is to be taken for dead: see kDoubtPatience.
bool Worker::is_in_doubt(const Lane& lane) const noexcept {
  if (lane.state != State::connected) return false;
  const Session& session = lane.session;
  if (lane.stall_timeout.count() > 0 && now_ >= lane.kept_from && session.holds_returned()) {
    return false;
  }
  if (!lane.checking && !session.owes_nobody()) return false;
  // Its caller would be told that nobody knows what became of it, for another's sake.
  if (session.holds_unrepeatable()) return false;
  return session.waited_for() || schedule_.has_work(lane.priorities);
}

void Worker::check_stalls() {
  const auto is_late = [this](const Lane& lane) {
    return lane.stall_timeout.count() > 0 && now_ - lane.progress >= lane.stall_timeout;
  };
  const auto is_dead = [this](const Lane& lane) {
    return now_ - lane.progress >= doubt_patience(lane) && is_in_doubt(lane);
  };
  for (const auto& lane : lanes_) {
    if (lane->state != State::connected || lane->session.requests() == 0) continue;
    if (!is_late(*lane) && !is_dead(*lane)) continue;
    receive(*lane);  // a few bytes may be there, see Stream::expect
    if (!lane->stream) continue;
    const bool late = is_late(*lane);
    if (!late && !is_dead(*lane)) continue;
    const bool writing = !lane->session.awaits_reply();
    lose(*lane,
         {Code::stalled, writing ? "Timeout writing to socket" : "Timeout reading from socket"},
         late);
  }
}

Worker::Lane* Worker::lane_of(std::uint32_t number) noexcept {
  const auto it = std::find_if(lanes_.begin(), lanes_.end(),
                               [&](const auto& lane) { return lane->number == number; });
  return it->get();
}

void Worker::close_fds_after_fork(bool in_order) noexcept {
  epoll_.reset();
  if (in_order) letter_.close_after_fork();
  for (const auto& lane : lanes_) {
    if (lane->stream) lane->stream->close_after_fork();
  }
}

}  // namespace fastkv
