// What any client can get from a server: blocking threads with a connection each, which know every
// reply's length beforehand and parse nothing. Reads the replies into a batch's memory, as a client
// must, or sends it from there.
//
// usage: ceiling HOST|tls:HOST|/unix.sock PORT PREFIX KEYS VALUE_BYTES
// Keys are PREFIX0 ... Then a command a line on stdin, each answered by "seconds cpu_seconds":
//   get    THREADS WINDOW RANGE OFF_GRID BATCHES   RANGE 0: plain GET; else GETRANGE by so many
//                                                  bytes, OFF_GRID 1: in fastkv's order
//   set    THREADS WINDOW BATCHES
//   exists THREADS DEPTH  BATCHES
// WINDOW: value bytes on their way on a connection; at least one request always is.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr long kSlack = 1 << 12;  // after each value: room for the framing of replies
constexpr long kEnd = 2048;       // see fastkv_ext/cpp/ranged_value.hpp

[[noreturn]] void fail(const char* what) {
  std::perror(what);
  std::exit(1);
}

int dial(const std::string& host, int port) {
  if (host[0] == '/') {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    host.copy(address.sun_path, sizeof address.sun_path - 1);
    if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address)) fail("connect");
    return fd;
  }
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  ::inet_pton(AF_INET, host.c_str(), &address.sin_addr);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address)) fail("connect");
  const int one = 1;
  ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

// A connection, with TLS or without.
class Link {
 public:
  Link(const std::string& host, int port) {
    const bool secure = host.starts_with("tls:");
    fd_ = dial(secure ? host.substr(4) : host, port);
    if (!secure) return;
    // Whom it talks to is not the point here. Large reads, as fastkv does.
    static SSL_CTX* const context = SSL_CTX_new(TLS_client_method());
    SSL_CTX_set_read_ahead(context, 1);
    SSL_CTX_set_default_read_buffer_len(context, 64 << 10);
    ssl_ = SSL_new(context);
    SSL_set_fd(ssl_, fd_);
    if (SSL_connect(ssl_) != 1) fail("SSL_connect");
  }

  void send(const char* data, std::size_t size) {
    while (size > 0) {
      const ssize_t sent =
          ssl_ ? SSL_write(ssl_, data, static_cast<int>(size)) : ::send(fd_, data, size, 0);
      if (sent <= 0) fail("send");
      data += sent;
      size -= static_cast<std::size_t>(sent);
    }
  }

  void send(std::span<iovec> parts) {
    if (ssl_) {
      for (const iovec& part : parts) send(static_cast<const char*>(part.iov_base), part.iov_len);
      return;
    }
    while (!parts.empty()) {
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      ssize_t sent = ::sendmsg(fd_, &message, 0);
      if (sent < 0) fail("sendmsg");
      while (!parts.empty() && sent >= static_cast<ssize_t>(parts[0].iov_len)) {
        sent -= static_cast<ssize_t>(parts[0].iov_len);
        parts = parts.subspan(1);
      }
      if (parts.empty()) return;
      parts[0].iov_base = static_cast<char*>(parts[0].iov_base) + sent;
      parts[0].iov_len -= static_cast<std::size_t>(sent);
    }
  }

  long receive_some(char* data, long size) {
    const ssize_t got = ssl_ ? SSL_read(ssl_, data, static_cast<int>(size))
                             : ::recv(fd_, data, static_cast<std::size_t>(size), 0);
    if (got <= 0) fail("recv");
    return got;
  }

  void receive(char* data, long size) {
    while (size > 0) {
      const long got = receive_some(data, size);
      data += got;
      size -= got;
    }
  }

 private:
  int fd_ = -1;  // both for as long as the program runs
  SSL* ssl_ = nullptr;
};

std::string bulk(const std::string& argument) {
  return "$" + std::to_string(argument.size()) + "\r\n" + argument + "\r\n";
}

struct Bench {
  std::string host;
  int port;
  std::string prefix;
  long keys;
  long size;
  char* memory = nullptr;
  std::vector<Link> links;  // kept, so that TCP has found its buffer sizes

  std::string key(long i) const { return prefix + std::to_string(i % keys); }
  char* value(long i) const { return memory + (i % keys) * (size + kSlack); }

  void connect(std::size_t threads) {
    while (links.size() < threads) links.emplace_back(host, port);
  }

  struct Part {
    long first;
    long bytes;
  };
  std::vector<Part> parts(long range, bool off_grid) const {
    std::vector<Part> out;
    long end = size;
    long at = 0;
    if (off_grid) {
      out.push_back({end -= kEnd, kEnd});
      out.push_back({0, at = std::min(end, range + kEnd)});
    }
    for (; at < end; at += range) out.push_back({at, std::min(range, end - at)});
    return out;
  }

  void get(Link& link, std::atomic<long>& next, long total, long window, long range,
           bool off_grid) {
    const auto pieces = range > 0 ? parts(range, off_grid) : std::vector<Part>{{0, size}};
    struct Due {
      char* to;
      long bytes;
    };
    std::deque<Due> due;
    long outstanding = 0;
    long current = -1;
    std::size_t piece = pieces.size();
    for (;;) {
      std::string requests;
      while (due.empty() || outstanding < window) {
        if (piece == pieces.size()) {
          current = next++;
          if (current >= total) break;
          piece = 0;
        }
        const Part part = pieces[piece++];
        const std::string name = bulk(key(current));
        if (range == 0) {
          requests += "*2\r\n$3\r\nGET\r\n" + name;
        } else {
          requests += "*4\r\n$8\r\nGETRANGE\r\n" + name + bulk(std::to_string(part.first)) +
                      bulk(std::to_string(part.first + part.bytes - 1));
        }
        const long framing = 5 + static_cast<long>(std::to_string(part.bytes).size());
        due.push_back({value(current) + part.first, part.bytes + framing});
        outstanding += part.bytes;
      }
      link.send(requests.data(), requests.size());
      if (due.empty()) return;
      const Due front = due.front();
      due.pop_front();
      link.receive(front.to, front.bytes);
      outstanding -= front.bytes;
    }
  }

  void set(Link& link, std::atomic<long>& next, long total, long window) {
    long unanswered = 0;
    char replies[4096];
    long partial = 0;
    const auto answer = [&] {
      partial += link.receive_some(replies, sizeof replies);
      unanswered -= partial / 5;  // +OK\r\n
      partial %= 5;
    };
    for (long i; (i = next++) < total;) {
      while (unanswered > 0 && (unanswered + 1) * size > window) answer();
      std::string head = "*3\r\n$3\r\nSET\r\n" + bulk(key(i)) + "$" + std::to_string(size) + "\r\n";
      char end[] = "\r\n";
      iovec parts[] = {
          {head.data(), head.size()}, {value(i), static_cast<std::size_t>(size)}, {end, 2}};
      link.send(parts);
      ++unanswered;
    }
    while (unanswered > 0) answer();
  }

  void exists(Link& link, std::atomic<long>& next, long total, long depth) {
    std::vector<char> replies(static_cast<std::size_t>(depth) * 4);  // :1\r\n
    for (;;) {
      const long first = next.fetch_add(depth);
      const long count = std::min(depth, total - first);
      if (count <= 0) return;
      std::string requests;
      for (long i = first; i < first + count; ++i) {
        requests += "*2\r\n$6\r\nEXISTS\r\n" + bulk(key(i));
      }
      link.send(requests.data(), requests.size());
      link.receive(replies.data(), count * 4);
    }
  }
};

double cpu_seconds() {
  rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](timeval t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  Bench bench{argv[1], std::atoi(argv[2]), argv[3], std::atol(argv[4]), std::atol(argv[5])};
  const auto bytes = static_cast<std::size_t>(bench.keys * (bench.size + kSlack));
  void* const memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  bench.memory = static_cast<char*>(memory);
  for (std::size_t i = 0; i < bytes / 8; ++i) {  // incompressible enough, and paged in
    reinterpret_cast<std::uint64_t*>(memory)[i] = i * 0x9e3779b97f4a7c15u;
  }
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string command;
    std::size_t threads;
    long window;
    words >> command >> threads >> window;
    long range = 0;
    bool off_grid = false;
    if (command == "get") words >> range >> off_grid;
    long batches = 0;
    words >> batches;
    if (!words) return 2;
    bench.connect(threads);
    std::atomic<long> next{0};
    const long total = batches * bench.keys;
    const double cpu = cpu_seconds();
    const auto start = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> running;
      for (std::size_t i = 0; i < threads; ++i) {
        running.emplace_back([&, &link = bench.links[i]] {
          if (command == "get") bench.get(link, next, total, window, range, off_grid);
          if (command == "set") bench.set(link, next, total, window);
          if (command == "exists") bench.exists(link, next, total, window);
        });
      }
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    std::printf("%.6f %.6f\n", took.count(), cpu_seconds() - cpu);
    std::fflush(stdout);
  }
}
