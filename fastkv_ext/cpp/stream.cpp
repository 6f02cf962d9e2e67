#include "stream.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace fastkv {
namespace {

// More would leave the cache before it is read, less is not worth the call.
constexpr std::size_t kManyBytes = std::size_t{128} << 10;
constexpr std::size_t kFewBytes = std::size_t{16} << 10;

msghdr message(std::span<const iovec> parts) noexcept {
  msghdr header{};
  header.msg_iov = const_cast<iovec*>(parts.data());  // the kernel does not write to it
  header.msg_iovlen = parts.size();
  return header;
}

// Of one segment. No network's frames are so long, so it is the loopback's; addresses alone may
// deceive, where packets to a port of this machine are sent on to another.
constexpr int kLoopbackBytes = 9216;

}  // namespace

bool on_one_machine(const sockaddr_storage& ours, const sockaddr_storage& theirs) noexcept {
  if (ours.ss_family != theirs.ss_family) return false;
  // What connects to 127.0.1.1, which Debian calls itself, does so from 127.0.0.1.
  if (theirs.ss_family == AF_INET) {
    const auto& from = reinterpret_cast<const sockaddr_in&>(ours).sin_addr;
    const auto& to = reinterpret_cast<const sockaddr_in&>(theirs).sin_addr;
    return from.s_addr == to.s_addr || ntohl(to.s_addr) >> 24 == IN_LOOPBACKNET;
  }
  if (theirs.ss_family != AF_INET6) return false;
  const auto& from = reinterpret_cast<const sockaddr_in6&>(ours).sin6_addr;
  const auto& to = reinterpret_cast<const sockaddr_in6&>(theirs).sin6_addr;
  return std::memcmp(&from, &to, sizeof from) == 0 ||
         (IN6_IS_ADDR_V4MAPPED(&to) && to.s6_addr[12] == IN_LOOPBACKNET);
}

bool Stream::is_local(int fd) noexcept {
  sockaddr_storage ours{};
  sockaddr_storage theirs{};
  socklen_t size = sizeof ours;
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&ours), &size) < 0) return false;
  size = sizeof theirs;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&theirs), &size) < 0) return false;
  int segment = 0;
  size = sizeof segment;
  return on_one_machine(ours, theirs) &&
         ::getsockopt(fd, IPPROTO_TCP, TCP_MAXSEG, &segment, &size) == 0 &&
         segment > kLoopbackBytes;
}

// Over the loopback the sender does the receiver's part of TCP, too. Unix sockets do not say.
int Stream::incoming_cpu(int fd) noexcept {
  int cpu = -1;
  socklen_t size = sizeof cpu;
  return ::getsockopt(fd, SOL_SOCKET, SO_INCOMING_CPU, &cpu, &size) == 0 ? cpu : -1;
}

Stream::Moved Stream::failed(const char* doing) noexcept {
  const int error = errno;
  if (error == EAGAIN || error == EWOULDBLOCK) return {};
  try {
    return {
        0,
        {Code::connection_lost, std::string("Error ") + std::to_string(error) + " while " + doing +
                                    " socket. " + std::generic_category().message(error) + "."}};
  } catch (...) {
    return {0, {Code::connection_lost, {}}};
  }
}

void Stream::make_non_blocking(int fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags < 0 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0) {
    throw std::system_error(errno, std::generic_category(), "fcntl");
  }
}

SocketStream::SocketStream(UniqueFd socket) : socket_(std::move(socket)) {
  make_non_blocking(socket_.get());
  int domain = 0;
  socklen_t size = sizeof domain;
  ::getsockopt(socket_.get(), SOL_SOCKET, SO_DOMAIN, &domain, &size);
  waits_for_many_ = domain == AF_INET || domain == AF_INET6;
  is_local_ = is_local(socket_.get());
  // Where nothing can be congested, BBR, some systems' default, only holds segments back by a
  // timer: SETs of 1 and 4 MiB were 1.4 times as fast without. Every kernel has Reno, and most let
  // all use it.
  constexpr std::string_view kReno = "reno";
  if (is_local_) {
    ::setsockopt(socket_.get(), IPPROTO_TCP, TCP_CONGESTION, kReno.data(), kReno.size());
  }
}

SocketStream::~SocketStream() {
  if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
}

Stream::Moved SocketStream::read(std::span<const iovec> into) noexcept {
  msghdr header = message(into);
  for (;;) {
    const ssize_t count = ::recvmsg(socket_.get(), &header, 0);
    if (count > 0) return {static_cast<std::size_t>(count), {}};
    if (count == 0) return {0, {Code::connection_lost, kClosedByServer}};
    if (errno != EINTR) return failed("reading from");
  }
}

// Each wake-up costs us, and even more the server that must wake us. End of stream and errors wake
// in any case. A failure of setsockopt only costs what would have been saved.
void SocketStream::expect(std::size_t bytes) noexcept {
  if (!waits_for_many_) return;
  const int mark = bytes < kFewBytes ? 1 : static_cast<int>(std::min(bytes, kManyBytes));
  if (mark == low_water_) return;
  if (::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof mark) == 0) {
    low_water_ = mark;
  }
}

Stream::Moved SocketStream::write(std::span<const iovec> from) noexcept {
  msghdr header = message(from);
  for (;;) {
    const ssize_t count = ::sendmsg(socket_.get(), &header, MSG_NOSIGNAL);
    if (count >= 0) return {static_cast<std::size_t>(count), {}};
    if (errno != EINTR) return failed("writing to");
  }
}

}  // namespace fastkv
