// What a stream knows about the way to its peer.
#include "stream.hpp"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cstring>
#include <string>
#include <utility>

#include "check.hpp"

using namespace fastkv;

namespace {

// A connection over TCP to a listener at this address of ours, with the accepted end.
struct Pair {
  explicit Pair(const char* address) {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    CHECK(::inet_pton(AF_INET, address, &at.sin_addr) == 1);
    const UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(::bind(listener.get(), reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    CHECK(::listen(listener.get(), 1) == 0);
    socklen_t size = sizeof at;
    CHECK(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&at), &size) == 0);
    ours = UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(::connect(ours.get(), reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    theirs = UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    CHECK(theirs.get() >= 0);
  }
  UniqueFd ours;
  UniqueFd theirs;
};

std::string congestion_control(int fd) {
  char name[16] = {};
  socklen_t size = sizeof name;
  CHECK(::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0);
  return {name, ::strnlen(name, sizeof name)};
}

}  // namespace

TEST(tcp_that_stays_on_this_machine_is_known_and_not_paced) {
  for (const char* address : {"127.0.0.1", "127.0.1.1"}) {  // that one connects from 127.0.0.1
    Pair pair(address);
    const SocketStream stream(std::move(pair.ours));
    CHECK(stream.is_woken_by_peer());
    CHECK(congestion_control(stream.fd()) == "reno");
  }
}

TEST(nobody_naps_at_a_unix_socket) {
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const UniqueFd peer(ends[1]);
  CHECK(!SocketStream(UniqueFd(ends[0])).is_woken_by_peer());
}

TEST(a_peer_that_has_gone_already_is_found_out_by_reading) {
  Pair pair("127.0.0.1");
  const linger at_once{.l_onoff = 1, .l_linger = 0};
  ::setsockopt(pair.theirs.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  pair.theirs.reset();  // a reset, on which the kernel forgets the peer's address
  SocketStream stream(std::move(pair.ours));
  CHECK(!stream.is_woken_by_peer());
  char byte = 0;
  const iovec into{&byte, 1};
  CHECK(stream.read({&into, 1}).status.code == Code::connection_lost);
}

int main() {
  return check::run_all();
}
