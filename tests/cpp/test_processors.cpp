// A worker leaves the processor that a server on its machine runs on.
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

cpu_set_t set_of(std::initializer_list<int> cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int cpu : cpus) CPU_SET(static_cast<unsigned>(cpu), &set);
  return set;
}

cpu_set_t every() {
  cpu_set_t set;
  std::memset(&set, 0xff, sizeof set);
  return set;
}

// A system that has the processor of the servers, which is a real one, and three more.
struct System {
  std::mutex mutex;
  std::atomic<int> current{0};  // the one of every worker
  cpu_set_t present{};
  cpu_set_t affinity{};           // of every worker
  std::vector<cpu_set_t> wanted;  // what workers asked for, in this order
} fake;

// Where this thread, and those that it starts, run from now on.
int stay() {
  cpu_set_t allowed;
  CHECK(::syscall(SYS_sched_getaffinity, 0, sizeof allowed, &allowed) > 0);
  int cpu = 0;
  while (!CPU_ISSET(static_cast<unsigned>(cpu), &allowed)) ++cpu;
  const cpu_set_t one = set_of({cpu});
  CHECK(::syscall(SYS_sched_setaffinity, 0, sizeof one, &one) == 0);
  return cpu;
}

// What a worker that is on `current` and may be on `allowed`, counted from the servers' processor,
// wants of the system while they answer it.
std::vector<cpu_set_t> moves(int server, int current, const cpu_set_t& allowed,
                             const std::vector<Command>& commands, bool tcp = true) {
  fake.current = server + current;
  fake.present = set_of({server, server + 1, server + 2, server + 3});
  fake.affinity = allowed;
  fake.wanted.clear();
  Engine engine(1, 2, kWindow);
  Connector connector(engine, [](int, const auto& words) {
    // Long after the kernel has acknowledged the request, which it does where the worker runs.
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return answer(words);
  });
  if (tcp) connector.use_tcp();
  for (int i = 0; i < 5; ++i) {
    for (const Command command : commands) {
      Call call(command, 10);
      call.submit(engine);
      CHECK(call.wait() == Code::ok);
    }
  }
  std::lock_guard lock(fake.mutex);
  return fake.wanted;
}

}  // namespace

// In the place of the C library's.
extern "C" int sched_getcpu() noexcept {
  return fake.current;
}

extern "C" int sched_getaffinity(pid_t /*thread*/, std::size_t size, cpu_set_t* into) noexcept {
  std::lock_guard lock(fake.mutex);
  std::memcpy(into, &fake.affinity, size);
  return 0;
}

extern "C" int sched_setaffinity(pid_t /*thread*/, std::size_t /*size*/,
                                 const cpu_set_t* to) noexcept {
  std::lock_guard lock(fake.mutex);
  fake.wanted.push_back(*to);
  CPU_AND(&fake.affinity, to, &fake.present);
  return 0;
}

TEST(who_shares_it_goes_elsewhere_and_may_come_back) {
  const int server = stay();
  const cpu_set_t all = set_of({server, server + 1, server + 2, server + 3});
  const cpu_set_t others = set_of({server + 1, server + 2, server + 3});
  const cpu_set_t anywhere = every();
  for (const Command command : {Command::get, Command::set}) {
    const auto made = moves(server, 0, all, {command});
    CHECK(made.size() >= 2 * 5 && made.size() % 2 == 0);
    for (std::size_t i = 0; i < made.size(); ++i) {
      CHECK(CPU_EQUAL(&made[i], i % 2 == 0 ? &others : &anywhere));
    }
    CHECK(CPU_EQUAL(&fake.affinity, &all));
  }
}

TEST(who_may_be_on_some_only_stays_on_them) {
  const int server = stay();
  const cpu_set_t some = set_of({server, server + 1});
  const cpu_set_t other = set_of({server + 1});
  const auto made = moves(server, 0, some, {Command::get});
  CHECK(made.size() >= 3 * 5 && made.size() % 3 == 0);
  for (std::size_t i = 0; i < made.size(); i += 3) {
    CHECK(CPU_EQUAL(&made[i], &other));
    CHECK(CPU_EQUAL(&made[i + 2], &some));
  }
  CHECK(CPU_EQUAL(&fake.affinity, &some));
}

TEST(who_is_pinned_to_it_stays_there) {
  const int server = stay();
  CHECK(moves(server, 0, set_of({server}), {Command::get, Command::set}).empty());
}

TEST(who_runs_elsewhere_stays_there) {
  const int server = stay();
  const cpu_set_t all = set_of({server, server + 1, server + 2, server + 3});
  CHECK(moves(server, 1, all, {Command::get, Command::set}).empty());
}

TEST(nobody_leaves_for_lookups) {
  const int server = stay();
  const cpu_set_t all = set_of({server, server + 1, server + 2, server + 3});
  CHECK(moves(server, 0, all, {Command::exists, Command::unlink}).empty());
}

TEST(unix_sockets_do_not_say_where_the_server_runs) {
  const int server = stay();
  const cpu_set_t all = set_of({server, server + 1, server + 2, server + 3});
  CHECK(moves(server, 0, all, {Command::get, Command::set}, false).empty());
}

int main(int count, char** names) {
  return check::run(count, names);
}
