// A long link on one machine: a TCP proxy to 127.0.0.1. Each direction of each connection delivers
// a byte DELAY seconds after it came, and no faster than RATE bytes per second, as one flow of a
// cloud network does.
//
// usage: link PORT DELAY RATE; prints the port that it listens on, and ends with its stdin.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kChunk = 64 << 10;

struct Link {
  std::chrono::duration<double> delay;
  double rate;
  // What is on its way: as much as the link delivers within its delay, and two chunks.
  std::size_t room() const { return static_cast<std::size_t>(rate * delay.count()) + 2 * kChunk; }
};

struct Packet {
  Clock::time_point due;
  std::vector<char> data;  // empty: the end
};

// One direction of one connection.
void carry(int from, int to, const Link& link) {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Packet> queue;
  std::size_t queued = 0;
  std::jthread delivering([&] {
    Clock::time_point free_at{};
    for (;;) {
      Packet packet;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return !queue.empty(); });
        packet = std::move(queue.front());
        queue.pop_front();
        queued -= packet.data.size();
      }
      changed.notify_all();
      const std::chrono::duration<double> takes(static_cast<double>(packet.data.size()) /
                                                link.rate);
      free_at = std::max(free_at, packet.due) + std::chrono::duration_cast<Clock::duration>(takes);
      std::this_thread::sleep_until(free_at);
      std::size_t at = 0;
      while (at < packet.data.size()) {
        const ssize_t sent =
            ::send(to, packet.data.data() + at, packet.data.size() - at, MSG_NOSIGNAL);
        if (sent <= 0) break;
        at += static_cast<std::size_t>(sent);
      }
      if (packet.data.empty() || at < packet.data.size()) {
        ::shutdown(to, SHUT_WR);
        ::shutdown(from, SHUT_RD);
        if (packet.data.empty()) return;
      }
    }
  });
  for (;;) {
    std::vector<char> data(kChunk);
    const ssize_t got = ::recv(from, data.data(), data.size(), 0);
    data.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
    const bool end = data.empty();
    {
      std::unique_lock lock(mutex);
      changed.wait(lock, [&] { return queued < link.room(); });
      queued += data.size();
      queue.push_back({Clock::now() + std::chrono::duration_cast<Clock::duration>(link.delay),
                       std::move(data)});
    }
    changed.notify_all();
    if (end) return;
  }
}

int open_socket() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  const int one = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const Link link{std::chrono::duration<double>(std::atof(argv[2])), std::atof(argv[3])};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int listener = open_socket();
  socklen_t size = sizeof address;
  if (::bind(listener, reinterpret_cast<sockaddr*>(&address), size) || ::listen(listener, 64) ||
      ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size)) {
    std::perror("listen");
    return 1;
  }
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
  std::thread([] {
    char byte;
    while (::read(0, &byte, 1) > 0) {
    }
    std::_Exit(0);
  }).detach();
  address.sin_port = htons(static_cast<std::uint16_t>(std::atoi(argv[1])));
  for (;;) {
    const int near = ::accept(listener, nullptr, nullptr);
    if (near < 0) return 1;
    const int one = 1;
    ::setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    std::thread([near, address, &link] {
      const int far = open_socket();
      if (!::connect(far, reinterpret_cast<const sockaddr*>(&address), sizeof address)) {
        std::jthread back([&] { carry(far, near, link); });
        carry(near, far, link);
      }
      ::close(far);
      ::close(near);
    }).detach();
  }
}
