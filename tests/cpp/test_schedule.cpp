// The schedule without workers: what is pulled, what may go again, what is due. One thread.
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.hpp"
#include "drain.hpp"
#include "schedule.hpp"

using namespace fastkv;
using namespace std::chrono_literals;

namespace {

const Clock::time_point kNow = Clock::now();

struct Fixture {
  explicit Fixture(std::vector<PrioritySet> lanes = {kLookups, kValues, kValues})
      : schedule(2, std::move(lanes), 0, std::make_shared<Stats>()) {}

  std::shared_ptr<Batch> submit(Command command, std::size_t keys, RetryPolicy policy = {},
                                std::optional<Clock::time_point> deadline = {},
                                bool repeatable = true) {
    auto batch = std::make_shared<Batch>(command);
    for (std::size_t i = 0; i < keys; ++i) {
      batch->add_key("k");
      if (command != Command::get && command != Command::set) continue;
      batch->add_segment(nullptr, kBytes);
      batch->end_value();
    }
    if (!repeatable) batch->forbid_repeat();
    CHECK(schedule
              .submit(batch, ++id, queue, std::make_shared<const RetryPolicy>(std::move(policy)),
                      deadline)
              .ok());
    return batch;
  }
  Schedule::Run pull(PrioritySet priorities, std::size_t requests = 100,
                     std::uint64_t bytes = 1 << 30, Clock::time_point now = kNow) {
    return schedule.pull(priorities, schedule.generation(), requests, bytes, now);
  }

  static constexpr std::size_t kBytes = 1000;
  Schedule schedule;
  std::shared_ptr<CompletionQueue> queue = std::make_shared<CompletionQueue>();
  std::uint64_t id = 0;
};

using Ids = std::vector<std::uint64_t>;

}  // namespace

TEST(the_highest_class_that_a_lane_serves_goes_first_and_each_operation_once) {
  Fixture f;
  const auto store = f.submit(Command::set, 3);
  const auto unlink = f.submit(Command::unlink, 1);
  const auto get = f.submit(Command::get, 2);
  const auto exists = f.submit(Command::exists, 5);
  auto run = f.pull(kLookups);
  CHECK(run.batch == exists.get() && run.first == 0 && run.count == 5);
  CHECK(f.pull(kLookups).count == 0);
  run = f.pull(kValues);
  CHECK(run.batch == get.get() && run.first == 0 && run.count == 1);  // a share of two lanes
  run = f.pull(kValues);
  CHECK(run.batch == get.get() && run.first == 1 && run.count == 1);
  run = f.pull(kValues);
  CHECK(run.batch == store.get() && run.count == 2);
  CHECK(f.pull(kValues).count == 0);  // one at a time, now that somebody reads
  f.schedule.finish(*store, 2);
  CHECK(f.pull(kValues).batch == store.get());
  f.schedule.finish(*store, 1);
  CHECK(f.pull(kValues).batch == unlink.get());
  CHECK(!f.schedule.has_work(kLookups | kValues));
  CHECK(drain(*f.queue) == Ids{1});
}

TEST(a_store_that_has_waited_long_goes_before_loads) {
  Fixture f;
  const auto store = f.submit(Command::set, 3);
  const auto get = f.submit(Command::get, 100);
  const auto late = Clock::now() + 1s;
  CHECK(!f.schedule.stores_overdue(kNow) && f.schedule.stores_overdue(late));
  CHECK(f.pull(kValues).batch == get.get());
  CHECK(f.pull(kValues, 1, 1 << 30, late).batch == store.get());
  CHECK(f.pull(kValues, 1, 1 << 30, late).batch == get.get());
  // One that gets no answer counts for a while only.
  CHECK(f.pull(kValues, 1, 1 << 30, late + 1s).batch == store.get());
  f.schedule.finish(*store, 2);
  CHECK(f.pull(kValues, 1, 1 << 30, late + 1s).batch == get.get());  // it had its turn
  CHECK(f.pull(kValues, 1, 1 << 30, late + 2s).batch == store.get());
  CHECK(!f.schedule.stores_overdue(late + 3s));
}

TEST(after_a_store_that_went_first_it_is_the_loads_turn) {
  Fixture f;
  const auto store = f.submit(Command::set, 3, {.retries = -1});
  const auto get = f.submit(Command::get, 1);
  const auto late = Clock::now() + 1s;
  CHECK(f.pull(kValues, 1, 1 << 30, late).batch == store.get());
  CHECK(f.schedule.requeue(*store, 0, true, false, Code::cancelled));
  // Overdue again, before the next connection is there.
  CHECK(f.pull(kValues, 1, 1 << 30, late + 1s).batch == get.get());
  f.submit(Command::get, 1);
  CHECK(f.pull(kValues, 1, 1 << 30, late + 2s).batch == store.get());
}

TEST(whoever_is_refused_a_store_is_told_when_to_ask_again) {
  Fixture f;
  const auto store = f.submit(Command::set, 2);
  const auto get = f.submit(Command::get, 1);
  CHECK(f.pull(kValues).batch == get.get());
  CHECK(f.pull(kValues).batch == store.get());
  const auto refused = f.pull(kValues);
  CHECK(refused.count == 0 && refused.retry_at > kNow && refused.retry_at <= kNow + 1s);
  CHECK(f.pull(kValues, 1, 1 << 30, refused.retry_at).batch == store.get());
}

TEST(no_more_is_pulled_than_there_is_room_for_but_one_always_is) {
  Fixture f({kLookups | kValues});
  f.submit(Command::get, 20);
  CHECK(f.pull(kValues, 3).count == 3);
  CHECK(f.pull(kValues, 100, 2 * Fixture::kBytes).count == 2);
  CHECK(f.pull(kValues, 100, 1).count == 1);
  CHECK(f.pull(kValues).count == 14);
}

TEST(a_retired_connection_pulls_no_more) {
  Fixture f;
  const std::uint64_t old = f.schedule.generation();
  f.submit(Command::get, 2);
  f.schedule.retire_connections();
  CHECK(f.schedule.pull(kValues, old, 100, 1 << 30, kNow).count == 0);
  CHECK(f.pull(kValues).count == 1);
}

TEST(what_comes_back_goes_again_as_often_as_its_policy_says) {
  Fixture f;
  const auto batch = f.submit(Command::exists, 1, {.retries = 2});
  for (int attempt = 0; attempt < 2; ++attempt) {
    CHECK(f.pull(kLookups).count == 1);
    CHECK(f.schedule.requeue(*batch, 0, true, true, Code::connection_lost));
    CHECK(f.schedule.requeue(*batch, 0, true, false, Code::closed));  // costs no attempt
    CHECK(f.pull(kLookups).count == 1);
  }
  CHECK(f.pull(kLookups).count == 1);
  CHECK(!f.schedule.requeue(*batch, 0, true, true, Code::connection_lost));
}

TEST(stalls_and_losses_are_reasons_of_their_own) {
  for (const bool stalled : {false, true}) {
    Fixture f;
    const auto batch = f.submit(Command::exists, 2,
                                {.retries = 5, .connection_lost = !stalled, .stalled = stalled});
    CHECK(f.pull(kLookups).count == 2);
    CHECK(f.schedule.requeue(*batch, 0, true, true, Code::stalled) == stalled);
    CHECK(f.schedule.requeue(*batch, 1, true, true, Code::connection_lost) != stalled);
  }
}

TEST(what_must_not_be_repeated_goes_again_only_if_nothing_of_it_was_sent) {
  Fixture f;
  const auto batch = f.submit(Command::set, 1, {.retries = -1}, {}, false);
  CHECK(f.pull(kValues).count == 1);
  CHECK(f.schedule.requeue(*batch, 0, false, true, Code::connection_lost));
  CHECK(f.pull(kValues).count == 1);
  CHECK(!f.schedule.requeue(*batch, 0, true, true, Code::connection_lost));
}

TEST(the_next_attempt_waits_for_its_delay) {
  Fixture f;
  const auto batch = f.submit(Command::exists, 1, {.retries = -1, .delays = {10s, 20s}});
  for (const auto delay : {10s, 20s, 20s}) {
    CHECK(f.pull(kLookups).count == 1);
    CHECK(f.schedule.requeue(*batch, 0, true, true, Code::connection_lost));
    CHECK(f.pull(kLookups).count == 0);
    const auto left = *f.schedule.next_due() - Clock::now();
    CHECK(left > delay - 5s && left <= delay);
    f.schedule.run_due(Clock::now());
    CHECK(f.pull(kLookups).count == 0);
    f.schedule.run_due(Clock::now() + delay);
    CHECK(!f.schedule.next_due());
  }
  CHECK(f.pull(kLookups).count == 1);
}

TEST(what_comes_back_tells_since_when_it_gets_no_answer_until_it_is_answered_or_counted) {
  Fixture f;
  const auto batch = f.submit(Command::exists, 1, {.retries = -1});
  const auto silent_since = [&] {
    const auto run = f.pull(kLookups);
    CHECK(run.count == 1);
    return run.silent_since;
  };
  constexpr Clock::time_point kNever{};
  CHECK(silent_since() == kNever);
  CHECK(f.schedule.requeue(*batch, 0, true, false, Code::stalled, kNow));
  CHECK(silent_since() == kNow);
  CHECK(f.schedule.requeue(*batch, 0, true, false, Code::cancelled, kNow + 1s));
  CHECK(silent_since() == kNow);
  CHECK(f.schedule.requeue(*batch, 0, true, true, Code::stalled));
  CHECK(silent_since() == kNever);
  CHECK(f.schedule.requeue(*batch, 0, true, false, Code::stalled, kNow + 2s));
  CHECK(silent_since() == kNow + 2s);
  CHECK(f.schedule.requeue(*batch, 0, true, false, Code::ok));  // torn, say
  CHECK(silent_since() == kNever);
}

TEST(stores_that_get_no_answer_go_with_their_like_and_all_have_their_turn) {
  using Mixes = Schedule::Mixes;
  Fixture f;
  const auto silent = f.submit(Command::set, 1);
  const auto pull = [&](Mixes mixes, Clock::time_point now = kNow) {
    return f.schedule.pull(kValues, f.schedule.generation(), 1, 1 << 30, now, mixes, kNow - 2s);
  };
  CHECK(pull(Mixes::silent_stores).count == 0);
  CHECK(pull(Mixes::other_stores).batch == silent.get());
  CHECK(f.schedule.requeue(*silent, 0, true, false, Code::stalled, kNow - 1s));
  CHECK(pull(Mixes::silent_stores).count == 0);  // it was not for so long
  CHECK(pull(Mixes::other_stores).batch == silent.get());
  CHECK(f.schedule.requeue(*silent, 0, true, true, Code::stalled) == false);  // no attempt is left
  f.schedule.finish(*silent, 1);
  const auto store = f.submit(Command::set, 2, {.retries = 1});
  CHECK(pull(Mixes::any_store).batch == store.get());
  CHECK(f.schedule.requeue(*store, 0, true, false, Code::stalled, kNow - 2s));
  CHECK(pull(Mixes::other_stores).count == 0);
  CHECK(pull(Mixes::silent_stores).batch == store.get());
  CHECK(pull(Mixes::silent_stores).count == 0);
  const auto get = f.submit(Command::get, 2);
  CHECK(pull(Mixes::silent_stores).batch == get.get());
  // Then it is to be idle soon, and take any.
  const auto late = Clock::now() + 1s;
  CHECK(pull(Mixes::silent_stores, late).count == 0);
  CHECK(pull(Mixes::any_store, late).batch == store.get());
}

TEST(a_batch_that_was_given_up_is_never_queued_again) {
  for (const bool delayed : {false, true}) {
    Fixture f;
    RetryPolicy policy{.retries = -1};
    if (delayed) policy.delays = {1s};
    const auto batch = f.submit(Command::exists, 3, policy);
    CHECK(f.pull(kLookups, 2).count == 2);
    CHECK(f.schedule.requeue(*batch, 0, true, true, Code::connection_lost));
    CHECK(f.schedule.abandon(1, {Code::cancelled, {}}));
    CHECK(drain(*f.queue).empty());  // one is with a worker
    CHECK(!f.schedule.requeue(*batch, 1, true, true, Code::connection_lost));
    f.schedule.finish(*batch, 1);
    CHECK(drain(*f.queue) == Ids{1});
    CHECK(batch->status().code == Code::cancelled && f.schedule.batches() == 0);
    CHECK(f.pull(kLookups).count == 0 && !f.schedule.next_due());
    CHECK(!f.schedule.abandon(1, {Code::cancelled, {}}));
  }
}

TEST(nobody_joins_a_value_whose_batch_was_given_up) {
  Fixture f;
  const auto given_up = f.submit(Command::get, 1);
  const auto other = f.submit(Command::get, 1);
  CHECK(f.pull(kValues).count == 1 && f.pull(kValues).count == 1);
  const auto ranges = std::make_shared<RangedValue>(1 << 20, 1 << 14, false);
  const auto others = std::make_shared<RangedValue>(1 << 20, 1 << 14, false);
  f.schedule.offer(*given_up, 0, ranges, 1, {});
  f.schedule.offer(*other, 0, others, 1, {});
  // Before any worker was told, and its part of the value is spoilt.
  CHECK(f.schedule.abandon(1, {Code::timed_out, {}}));
  CHECK(f.schedule.help(f.schedule.generation(), {}).batch == other.get());
  f.schedule.offer(*given_up, 0, ranges, 1, {});
  CHECK(f.schedule.help(f.schedule.generation(), {}).batch == other.get());
  f.schedule.finish(*given_up, 1);
  f.schedule.finish(*other, 1);
}

TEST(a_deadline_ends_a_batch_and_is_forgotten_with_it) {
  Fixture f;
  const auto late = f.submit(Command::exists, 1, {}, kNow + 1s);
  const auto timely = f.submit(Command::exists, 1, {}, kNow + 2s);
  CHECK(f.schedule.next_due() == kNow + 1s);
  f.schedule.run_due(kNow + 1s);
  CHECK(drain(*f.queue) == Ids{1} && late->status().code == Code::timed_out);
  CHECK(f.schedule.next_due() == kNow + 2s);
  CHECK(f.pull(kLookups).batch == timely.get());
  f.schedule.finish(*timely, 1);
  CHECK(drain(*f.queue) == Ids{2} && timely->status().ok());
  CHECK(!f.schedule.next_due());
}

TEST(what_no_connection_serves_fails_with_the_connect_and_later_batches_get_a_try) {
  Fixture f;
  f.schedule.connected(1);
  f.submit(Command::get, 1);
  const auto old = f.submit(Command::exists, 1);
  const auto later = f.submit(Command::exists, 1);
  f.schedule.connect_failed(0, 2, {Code::connect_failed, "refused"}, 1s);
  CHECK(drain(*f.queue) == Ids{2} && old->status().code == Code::connect_failed);
  CHECK(f.pull(kLookups).batch == later.get());
  f.schedule.connect_failed(2, 3, {Code::connect_failed, "refused"}, 1s);
  CHECK(drain(*f.queue).empty());  // lane 1 will do it
  f.schedule.lost(1);
  f.schedule.connect_failed(2, 3, {Code::connect_failed, "refused"}, 1s);
  CHECK(drain(*f.queue) == Ids{1});
}

TEST(what_another_schedule_has_refused_is_read_as_this_one_reads) {
  Fixture f;  // nothing in ranges
  Schedule other(1, {kValues}, 100, std::make_shared<Stats>());
  const auto batch = std::make_shared<Batch>(Command::get);
  batch->add_key("k");
  batch->add_segment(nullptr, 1 << 20);
  batch->end_value();
  const auto policy = std::make_shared<const RetryPolicy>();
  other.close({Code::closed, {}});
  CHECK(!other.submit(batch, 1, f.queue, policy, {}).ok());
  CHECK(f.schedule.submit(batch, 1, f.queue, policy, {}).ok());
  CHECK(!batch->in_ranges(0));
  f.schedule.close({Code::closed, {}});
}

int main(int count, char** names) {
  return check::run(count, names);
}
