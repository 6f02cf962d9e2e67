// A worker does not share the processor that a server on its machine runs on.
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

#include "call.hpp"
#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

using namespace fastkv;

namespace {

std::atomic<int> pretended{0};  // where workers believe that they run
std::mutex mutex;
std::vector<cpu_set_t> wanted;  // of the system, in this order

cpu_set_t allowed() {
  cpu_set_t all;
  CHECK(::sched_getaffinity(0, sizeof all, &all) == 0);
  return all;
}

cpu_set_t only(int cpu) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(static_cast<unsigned>(cpu), &one);
  return one;
}

bool pin(const cpu_set_t& to) {
  return ::syscall(SYS_sched_setaffinity, 0, sizeof to, &to) == 0;
}

int first(const cpu_set_t& of) {
  int cpu = 0;
  while (!CPU_ISSET(static_cast<unsigned>(cpu), &of)) ++cpu;
  return cpu;
}

// What a worker wants of the system while servers that all run on `server` answer it.
std::vector<cpu_set_t> moves(Engine& engine, int server, const std::vector<Command>& commands,
                             bool tcp = true) {
  CHECK(pin(only(server)));  // whoever is started from here on is there, too
  Connector connector(engine, [](int, const auto& words) {
    // Long after the kernel has acknowledged the request, which it does where the worker runs.
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    return answer(words);
  });
  if (tcp) connector.use_tcp();
  for (int i = 0; i < 10; ++i) {
    for (const Command command : commands) {
      Call call(command, 2);  // it may leave while the second is on its way
      call.submit(engine);
      CHECK(call.wait() == Code::ok);
    }
  }
  std::lock_guard lock(mutex);
  return wanted;
}

}  // namespace

// In the place of the C library's.
extern "C" int sched_getcpu() noexcept {
  return pretended;
}

extern "C" int sched_setaffinity(pid_t thread, std::size_t size, const cpu_set_t* to) noexcept {
  std::lock_guard lock(mutex);
  wanted.push_back(*to);
  return static_cast<int>(::syscall(SYS_sched_setaffinity, thread, size, to));
}

TEST(who_shares_it_goes_elsewhere_and_may_come_back) {
  const cpu_set_t all = allowed();
  const int server = first(all);
  pretended = server;
  cpu_set_t others = all;
  CPU_CLR(static_cast<unsigned>(server), &others);
  for (const Command command : {Command::get, Command::set}) {
    wanted.clear();
    CHECK(pin(all));
    Engine engine(1, 2, kWindow);
    const auto made = moves(engine, server, {command});
    if (CPU_COUNT(&others) == 0) {  // a machine with one
      CHECK(made.empty());
      continue;
    }
    CHECK(made.size() >= 2 * 10 && made.size() % 2 == 0);
    for (std::size_t i = 0; i < made.size(); ++i) {
      CHECK(CPU_EQUAL(&made[i], i % 2 == 0 ? &others : &all));
    }
  }
}

TEST(who_runs_elsewhere_stays_there) {
  const int server = first(allowed());
  pretended = server + 1;
  Engine engine(1, 2, kWindow);
  CHECK(moves(engine, server, {Command::get, Command::set}).empty());
}

TEST(who_was_pinned_to_it_stays_there) {
  const int server = first(allowed());
  pretended = server;
  CHECK(pin(only(server)));
  Engine engine(1, 2, kWindow);
  CHECK(moves(engine, server, {Command::get, Command::set}).empty());
}

TEST(nobody_leaves_for_lookups) {
  const int server = first(allowed());
  pretended = server;
  Engine engine(1, 2, kWindow);
  CHECK(moves(engine, server, {Command::exists, Command::unlink}).empty());
}

TEST(unix_sockets_do_not_say_where_the_server_runs) {
  const int server = first(allowed());
  pretended = server;
  Engine engine(1, 2, kWindow);
  CHECK(moves(engine, server, {Command::get, Command::set}, false).empty());
}

int main(int count, char** names) {
  return check::run(count, names);
}
