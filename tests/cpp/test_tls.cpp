// TlsStream against OpenSSL's own server at the other end of a socket pair, or behind a relay that
// cuts the bytes of the wire anywhere.
#include <openssl/evp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"
#include "tls.hpp"

using namespace fastkv;

namespace {

struct Pair {
  UniqueFd client;
  UniqueFd server;
};

Pair make_pair() {
  int ends[2];
  CHECK(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

std::string random_bytes(std::size_t size) {
  static std::mt19937_64 random(7);
  std::string bytes(size, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

// Trusted by nobody.
SSL_CTX* server_context() {
  static SSL_CTX* const context = [] {
    EVP_PKEY* const key = EVP_EC_gen("P-256");
    X509* const certificate = X509_new();
    X509_set_version(certificate, X509_VERSION_3);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    X509_sign(certificate, key, EVP_sha256());
    SSL_CTX* const made = SSL_CTX_new(TLS_server_method());
    SSL_CTX_use_certificate(made, certificate);
    SSL_CTX_use_PrivateKey(made, key);
    X509_free(certificate);
    EVP_PKEY_free(key);
    return made;
  }();
  return context;
}

// A blocking server; its thread runs `serve` after the handshake.
class Server {
 public:
  Server(UniqueFd socket, std::function<void(SSL*)> serve) {
    thread_ = std::thread([socket = std::move(socket), serve = std::move(serve)] {
      const std::unique_ptr<SSL, void (*)(SSL*)> ssl(SSL_new(server_context()), SSL_free);
      SSL_set_fd(ssl.get(), socket.get());
      if (SSL_accept(ssl.get()) == 1) serve(ssl.get());
    });
  }
  ~Server() { thread_.join(); }

 private:
  std::thread thread_;
};

void send_all(SSL* ssl, std::string_view bytes) {
  if (!bytes.empty()) CHECK(SSL_write(ssl, bytes.data(), static_cast<int>(bytes.size())) > 0);
}

std::string receive(SSL* ssl, std::size_t size) {
  std::string bytes(size, '\0');
  for (std::size_t at = 0; at < size;) {
    const int count = SSL_read(ssl, bytes.data() + at, static_cast<int>(size - at));
    if (count <= 0) return bytes.substr(0, at);
    at += static_cast<std::size_t>(count);
  }
  return bytes;
}

TlsSettings settings() {
  TlsSettings made;
  made.server_name = "localhost";
  made.wants_certificate = made.check_server_name = false;
  made.cipher_suites = "TLS_AES_128_GCM_SHA256";
  return made;
}

void wait(const TlsStream& stream, short usual) {
  const auto other = static_cast<short>((POLLIN | POLLOUT) & ~usual);
  pollfd entry{stream.fd(), stream.crossed() ? other : usual, 0};
  CHECK(::poll(&entry, 1, 10'000) == 1);  // else it hangs
}

std::unique_ptr<TlsStream> connect(UniqueFd socket, const TlsSettings& how = settings()) {
  auto stream = make_tls_stream(socket.get(), how);
  for (;;) {
    const auto moved = stream->handshake();
    if (!moved.status.ok()) throw std::runtime_error(moved.status.detail);
    if (moved.bytes == 1) return stream;
    wait(*stream, POLLIN);
  }
}

// Reads into pieces of odd sizes, until so many bytes are there or the stream fails.
struct Got {
  std::string bytes;
  Status status;
};
Got read_all(TlsStream& stream, std::size_t size) {
  static std::mt19937 random(3);
  Got got{std::string(size, '\0'), {}};
  for (std::size_t at = 0; at < size;) {
    std::vector<iovec> into;
    std::size_t offered = at;
    while (into.size() < 3 && offered < size) {
      const std::size_t piece = std::min<std::size_t>(1 + random() % 40'000, size - offered);
      into.push_back({got.bytes.data() + offered, piece});
      offered += piece;
    }
    const auto moved = stream.read(into);
    if (!moved.status.ok()) {
      got.bytes.resize(at);
      got.status = moved.status;
      return got;
    }
    at += moved.bytes;
    if (moved.bytes == 0) {
      CHECK(!stream.holds_bytes());
      wait(stream, POLLIN);
    }
  }
  return got;
}

void write_all(TlsStream& stream, const std::vector<std::string_view>& pieces) {
  std::size_t total = 0;
  for (const auto piece : pieces) total += piece.size();
  for (std::size_t sent = 0; sent < total;) {
    std::vector<iovec> from;
    std::size_t skip = sent;
    for (const auto piece : pieces) {
      const std::size_t skipped = std::min(skip, piece.size());
      skip -= skipped;
      from.push_back({const_cast<char*>(piece.data()) + skipped, piece.size() - skipped});
    }
    const auto moved = stream.write(from);
    if (!moved.status.ok()) throw std::runtime_error(moved.status.detail);
    sent += moved.bytes;
    if (moved.bytes == 0) wait(stream, POLLOUT);
  }
}

// Passes bytes on in pieces of odd sizes, until both ends have closed.
class Relay {
 public:
  Relay(UniqueFd a, UniqueFd b) : a_(std::move(a)), b_(std::move(b)) {
    there_ = std::thread([this] { pass(a_.get(), b_.get()); });
    back_ = std::thread([this] { pass(b_.get(), a_.get()); });
  }
  ~Relay() {
    there_.join();
    back_.join();
  }

 private:
  static void pass(int from, int to) {
    std::mt19937 random(5);
    char bytes[5000];
    for (;;) {
      const ssize_t count = ::recv(from, bytes, 1 + random() % sizeof bytes, 0);
      if (count <= 0 || ::send(to, bytes, static_cast<std::size_t>(count), MSG_NOSIGNAL) < 0) break;
    }
    ::shutdown(to, SHUT_WR);
  }

  UniqueFd a_;
  UniqueFd b_;
  std::thread there_;
  std::thread back_;
};

}  // namespace

TEST(bytes_that_are_cut_anywhere_arrive_in_order) {
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    const std::string there = random_bytes(3'000'000);
    const std::string back = random_bytes(2'000'000);
    Pair near = make_pair();
    Pair far = make_pair();
    std::string received;
    {
      const Relay relay(std::move(near.server), std::move(far.client));
      const Server server(std::move(far.server), [&](SSL* ssl) {
        received = receive(ssl, there.size());
        for (std::size_t at = 0; at < back.size();) {
          const auto piece = std::string_view(back).substr(at, 1 + at % 20'000);
          send_all(ssl, piece);
          at += piece.size();
        }
      });
      auto how = settings();
      how.min_version = how.max_version = version;
      const auto stream = connect(std::move(near.client), how);
      write_all(*stream, {std::string_view(there).substr(0, 17),
                          std::string_view(there).substr(17, 1'000'000),
                          std::string_view(there).substr(1'000'017)});
      CHECK(read_all(*stream, back.size()).bytes == back);
    }
    CHECK(received == there);
  }
}

TEST(small_pieces_are_one_record) {
  Pair pair = make_pair();
  int first = 0;
  {
    const Server server(std::move(pair.server), [&](SSL* ssl) {
      char bytes[100];
      first = SSL_read(ssl, bytes, sizeof bytes);
    });
    const auto stream = connect(std::move(pair.client));
    write_all(*stream, {"*3 SET key", "", "value", "\r\n"});
  }
  CHECK(first == 17);
}

TEST(a_peer_that_does_not_read_takes_a_part_and_the_rest_later) {
  const std::string bytes = random_bytes(4'000'000);
  Pair pair = make_pair();
  std::string received;
  Pair gate = make_pair();
  {
    const Server server(std::move(pair.server), [&](SSL* ssl) {
      char go;
      CHECK(::recv(gate.server.get(), &go, 1, 0) == 1);
      received = receive(ssl, bytes.size());
    });
    const auto stream = connect(std::move(pair.client));
    std::size_t sent = 0;
    for (;;) {
      const iovec rest{const_cast<char*>(bytes.data()) + sent, bytes.size() - sent};
      const auto moved = stream->write({&rest, 1});
      CHECK(moved.status.ok());
      sent += moved.bytes;
      if (moved.bytes == 0) break;
    }
    CHECK(sent > 0 && sent < bytes.size());
    // Fewer bytes than the record that waits: it goes on waiting.
    const iovec few{const_cast<char*>(bytes.data()) + sent, 1};
    CHECK(stream->write({&few, 1}).bytes == 0);
    CHECK(::send(gate.client.get(), "x", 1, 0) == 1);
    write_all(*stream, {std::string_view(bytes).substr(sent)});
  }
  CHECK(received == bytes);
}

TEST(what_the_descriptor_does_not_show_is_told) {
  const std::string bytes = random_bytes(100'000);
  Pair pair = make_pair();
  const Server server(std::move(pair.server), [&](SSL* ssl) {
    send_all(ssl, bytes);
    receive(ssl, 1);  // until the other end has closed
  });
  const auto stream = connect(std::move(pair.client));
  std::string got(10, '\0');
  const iovec into{got.data(), got.size()};
  std::size_t count = 0;
  while (count == 0) {
    wait(*stream, POLLIN);
    count = stream->read({&into, 1}).bytes;
  }
  CHECK(count == 10 && got == bytes.substr(0, 10));
  CHECK(stream->holds_bytes());
  CHECK(read_all(*stream, bytes.size() - 10).bytes == bytes.substr(10));
  const iovec more{got.data(), 1};
  CHECK(stream->read({&more, 1}).bytes == 0);
  CHECK(!stream->holds_bytes());
}

TEST(every_end_of_a_connection_is_told_after_the_bytes_before_it) {
  const std::string bytes = random_bytes(50'000);
  enum class End : std::uint8_t { close_notify, abrupt, in_a_record, garbage };
  for (const End end : {End::close_notify, End::abrupt, End::in_a_record, End::garbage}) {
    Pair pair = make_pair();
    const int raw = pair.server.get();
    const Server server(std::move(pair.server), [&](SSL* ssl) {
      send_all(ssl, bytes);
      // A header of a record of 100 bytes, and some of them; or of a record there is not.
      const char cut[] = "\x17\x03\x03\x00\x64....";
      const char garbage[] = "\xff\xff\xff\xff\xff....";
      if (end == End::close_notify) SSL_shutdown(ssl);
      if (end == End::in_a_record) ::send(raw, cut, 9, MSG_NOSIGNAL);
      if (end == End::garbage) ::send(raw, garbage, 9, MSG_NOSIGNAL);
    });
    const auto stream = connect(std::move(pair.client));
    const Got got = read_all(*stream, bytes.size() + 1);
    CHECK(got.bytes == bytes);
    CHECK(got.status.code == Code::connection_lost);
    CHECK((got.status.detail == "Connection closed by server.") == (end != End::garbage));
    CHECK(!got.status.detail.empty());
    CHECK(stream->holds_bytes());  // a failure, for as long as it is asked
    char byte;
    const iovec into{&byte, 1};
    CHECK(stream->read({&into, 1}).status.detail == got.status.detail);
  }
}

TEST(a_peer_that_speaks_no_tls_is_an_error) {
  Pair pair = make_pair();
  CHECK(::send(pair.server.get(), "-ERR unknown command\r\n", 22, 0) == 22);
  std::string why;
  try {
    connect(std::move(pair.client));
  } catch (const std::runtime_error& error) {
    why = error.what();
  }
  CHECK(why == "[SSL: WRONG_VERSION_NUMBER] wrong version number.");
}

TEST(new_keys_in_the_middle_are_no_stall) {
  const std::string bytes = random_bytes(500'000);
  for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
    Pair pair = make_pair();
    std::string received;
    {
      const Server server(std::move(pair.server), [&](SSL* ssl) {
        for (int i = 0; i < 3; ++i) {
          // TLS 1.2 handshakes anew while both sides want to send.
          if (version == TLS1_2_VERSION) {
            CHECK(SSL_renegotiate(ssl) == 1);
          } else {
            CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
          }
          CHECK(SSL_do_handshake(ssl) == 1);
          received += receive(ssl, 1000);
          send_all(ssl, bytes);
        }
      });
      auto how = settings();
      how.min_version = how.max_version = version;
      const auto stream = connect(std::move(pair.client), how);
      const std::string request(1000, 'r');
      for (int i = 0; i < 3; ++i) {
        write_all(*stream, {request});
        CHECK(read_all(*stream, bytes.size()).bytes == bytes);
      }
    }
    CHECK(received == std::string(3000, 'r'));
  }
}

// As a server that is careful: whoever loads and stores much is given new keys in between.
TEST(new_keys_under_load_change_no_answer) {
  constexpr std::size_t kKeys = 12;
  const std::string value = random_bytes(100'000);
  Pair pair = make_pair();
  {
    const Server server(std::move(pair.server), [&](SSL* ssl) {
      std::string in;
      char chunk[20'000];
      for (int count = 0; (count = SSL_read(ssl, chunk, sizeof chunk)) > 0;) {
        in.append(chunk, static_cast<std::size_t>(count));
        while (const auto words = take_request(in)) {
          const bool right = (*words)[0] == "GET" || (*words)[2] == value;
          const std::string reply = (*words)[0] == "GET" ? bulk(value)
                                    : right              ? "+OK\r\n"
                                                         : "-ERR\r\n";
          for (std::size_t at = 0; at < reply.size(); at += 30'000) {
            CHECK(SSL_key_update(ssl, SSL_KEY_UPDATE_REQUESTED) == 1);
            send_all(ssl, std::string_view(reply).substr(at, 30'000));
          }
        }
      }
    });
    Engine engine(1, 1, Window{64 * 1024, 64, 0});
    pollfd entry{engine.connect_event(), POLLIN, 0};
    auto queue = std::make_shared<CompletionQueue>();
    std::vector<std::string> memory(2 * kKeys, value);
    std::vector<std::shared_ptr<Batch>> batches;
    for (const Command command : {Command::get, Command::set}) {
      const std::size_t first = batches.size() * kKeys;
      batches.push_back(std::make_shared<Batch>(command));
      for (std::size_t i = first; i < first + kKeys; ++i) {
        if (command == Command::get) memory[i].assign(value.size(), '\xa5');
        batches.back()->add_key("k");
        batches.back()->add_segment(memory[i].data(), memory[i].size());
        batches.back()->end_value();
      }
      engine.submit(batches.back(), next_id++, queue, retry(0), 0);
    }
    CHECK(::poll(&entry, 1, 10'000) == 1);
    const auto lane = engine.take_connect_request();
    CHECK(lane.has_value());
    engine.adopt(*lane, connect(std::move(pair.client)), 10, 0);
    wait_for(*queue, batches.size());
    for (const auto& batch : batches) {
      CHECK(batch->status().ok());
      for (std::size_t i = 0; i < kKeys; ++i) CHECK(batch->outcome(i) == Outcome::hit);
    }
    for (const std::string& bytes : memory) CHECK(bytes == value);
    engine.close();
  }
}

TEST(what_a_forked_child_closes_says_nothing_to_the_peer) {
  Pair pair = make_pair();
  Pair gate = make_pair();
  const int raw = pair.server.get();
  const UniqueFd parents(::dup(pair.client.get()));
  ssize_t said = 0;
  int why = 0;
  {
    const Server server(std::move(pair.server), [&](SSL*) {
      char bytes[100];
      CHECK(::recv(gate.server.get(), bytes, 1, 0) == 1);
      said = ::recv(raw, bytes, sizeof bytes, MSG_DONTWAIT);
      why = errno;
    });
    connect(std::move(pair.client))->close_after_fork();
    CHECK(::send(gate.client.get(), "x", 1, 0) == 1);
  }
  CHECK(said == -1 && why == EAGAIN);  // neither an alert nor the end
}

int main(int count, char** names) {
  ::signal(SIGPIPE, SIG_IGN);  // OpenSSL writes without MSG_NOSIGNAL; workers block all signals
  return check::run(count, names);
}
