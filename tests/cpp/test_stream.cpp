// What a stream knows about the way to its peer.
#include "stream.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <sys/socket.h>

#include <cstring>
#include <string>
#include <utility>

#include "check.hpp"
#include "tcp_pair.hpp"
#include "tls.hpp"

using namespace fastkv;

namespace {

sockaddr_storage address(const char* text) {
  sockaddr_storage made{};
  auto& four = reinterpret_cast<sockaddr_in&>(made);
  auto& six = reinterpret_cast<sockaddr_in6&>(made);
  made.ss_family = std::strchr(text, ':') ? AF_INET6 : AF_INET;
  void* const into = made.ss_family == AF_INET ? static_cast<void*>(&four.sin_addr)
                                               : static_cast<void*>(&six.sin6_addr);
  CHECK(::inet_pton(made.ss_family, text, into) == 1);
  return made;
}

bool same(const char* ours, const char* theirs) {
  return on_one_machine(address(ours), address(theirs));
}

bool use(int fd, const std::string& congestion_control) {
  return ::setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion_control.data(),
                      static_cast<socklen_t>(congestion_control.size())) == 0;
}

std::string congestion_control(int fd) {
  char name[16] = {};
  socklen_t size = sizeof name;
  CHECK(::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0);
  return {name, ::strnlen(name, sizeof name)};
}

}  // namespace

TEST(addresses_tell_whether_a_connection_stays_on_one_machine) {
  CHECK(same("127.0.0.1", "127.0.0.1"));
  CHECK(same("127.0.0.1", "127.0.1.1"));
  CHECK(same("10.1.2.3", "10.1.2.3"));
  CHECK(!same("10.1.2.3", "10.1.2.4"));
  CHECK(same("::1", "::1"));
  CHECK(same("fd00::1", "fd00::1"));
  CHECK(!same("fd00::1", "fd00::2"));
  CHECK(same("::ffff:127.0.0.1", "::ffff:127.0.1.1"));
  CHECK(!same("::ffff:10.1.2.3", "::ffff:10.1.2.4"));
  CHECK(!same("10.1.2.3", "::ffff:10.1.2.3"));
  sockaddr_storage local{};
  local.ss_family = AF_UNIX;
  CHECK(!on_one_machine(local, local));
}

TEST(tcp_that_stays_on_this_machine_is_known_and_not_held_back) {
  for (const char* where : {"127.0.0.1", "127.0.1.1"}) {
    TcpPair pair(where);
    const bool may_choose = use(pair.accepted.get(), "reno");
    const std::string before = congestion_control(pair.connected.get());
    const SocketStream stream(std::move(pair.connected));
    CHECK(stream.is_woken_by_peer());
    CHECK(congestion_control(stream.fd()) == (may_choose ? "reno" : before));
  }
}

TEST(short_segments_mean_a_network) {
  TcpPair pair("127.0.0.1", 1448);
  const std::string before = congestion_control(pair.connected.get());
  const SocketStream stream(std::move(pair.connected));
  CHECK(!stream.is_woken_by_peer());
  CHECK(congestion_control(stream.fd()) == before);
}

TEST(nobody_naps_at_a_unix_socket) {
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd peer(ends[1]);
  CHECK(!SocketStream(UniqueFd(ends[0])).is_woken_by_peer());
}

TEST(the_senders_processor_is_known_of_tcp_that_stays_on_this_machine) {
  cpu_set_t all;
  CHECK(::sched_getaffinity(0, sizeof all, &all) == 0);
  TcpPair pair;
  TcpPair network("127.0.0.1", 1448);
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  TlsSettings settings;
  settings.server_name = "127.0.0.1";
  const auto tls = make_tls_stream(pair.connected.get(), settings);
  const SocketStream tcp(std::move(pair.connected));
  const SocketStream far(std::move(network.connected));
  const SocketStream local{UniqueFd(ends[0])};
  const UniqueFd peer(ends[1]);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(static_cast<unsigned>(cpu), &all)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<unsigned>(cpu), &one);
    CHECK(::sched_setaffinity(0, sizeof one, &one) == 0);
    for (const int sender : {pair.accepted.get(), network.accepted.get(), peer.get()}) {
      CHECK(::send(sender, "x", 1, 0) == 1);
    }
    for (const int receiver : {tcp.fd(), far.fd(), local.fd()}) {
      pollfd entry{receiver, POLLIN, 0};
      CHECK(::poll(&entry, 1, 20'000) == 1);
      char byte = 0;
      CHECK(::recv(receiver, &byte, 1, 0) == 1);
    }
    CHECK(tcp.sender_cpu() == cpu);
    CHECK(tls->sender_cpu() == cpu);
    CHECK(far.sender_cpu() == -1);
    CHECK(local.sender_cpu() == -1);
  }
}

TEST(a_peer_that_has_gone_already_is_found_out_by_reading) {
  TcpPair pair;
  const linger at_once{.l_onoff = 1, .l_linger = 0};
  ::setsockopt(pair.accepted.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  pair.accepted.reset();  // a reset, on which the kernel forgets the peer's address
  pollfd entry{pair.connected.get(), POLLIN, 0};
  CHECK(::poll(&entry, 1, 20'000) == 1);
  SocketStream stream(std::move(pair.connected));
  char byte = 0;
  const iovec into{&byte, 1};
  CHECK(stream.read({&into, 1}).status.code == Code::connection_lost);
}

int main(int count, char** names) {
  return check::run(count, names);
}
