// A non-blocking byte stream to a peer. Knows nothing of RESP. The one place where EINTR, EAGAIN
// and end of stream are told apart.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <span>

#include "fd.hpp"
#include "status.hpp"

namespace fastkv {

// Whether a connection between these addresses stays on one machine, as far as they tell.
bool on_one_machine(const sockaddr_storage& ours, const sockaddr_storage& theirs) noexcept;

class Stream {
 public:
  // ok with bytes == 0: nothing can be moved now, wait for the descriptor. A count below what was
  // asked for is normal. connection_lost: the peer closed or reset.
  struct Moved {
    std::size_t bytes = 0;
    Status status;
  };

  virtual ~Stream() = default;
  virtual int fd() const noexcept = 0;
  virtual Moved read(std::span<const iovec> into) noexcept = 0;
  virtual Moved write(std::span<const iovec> from) noexcept = 0;
  // At least so many bytes will come: the descriptor need not be readable before some are there.
  virtual void expect(std::size_t /*bytes*/) noexcept {}
  // What comes is sent on this machine, and whoever sends it spends his own time on waking us; and
  // the socket holds enough to do without us for a while.
  virtual bool is_woken_by_peer() const noexcept { return false; }
  // The processor on which what came last was sent, bytes or an acknowledgement, if that was one of
  // this machine's; -1: unknown.
  virtual int sender_cpu() const noexcept { return -1; }
  // There may be more to read, or a failure to tell, though the descriptor is not readable.
  virtual bool holds_bytes() const noexcept { return false; }
  // A read waits until the descriptor takes bytes, or a write until some come: whatever happens to
  // the descriptor, try both again.
  virtual bool crossed() const noexcept { return false; }
  // For a child after fork: gives the descriptor back, the parent's connection lives on.
  virtual void close_after_fork() noexcept = 0;

 protected:
  static constexpr const char* kClosedByServer = "Connection closed by server.";
  // Throws std::system_error.
  static void make_non_blocking(int fd);
  // TCP over the loopback.
  static bool is_local(int fd) noexcept;
  // See sender_cpu(), for one that is local.
  static int incoming_cpu(int fd) noexcept;
  // What errno means for a stream.
  static Moved failed(const char* doing) noexcept;
};

// TCP or unix socket.
class SocketStream final : public Stream {
 public:
  // Takes over a connected socket. Throws std::system_error if it cannot be made non-blocking.
  explicit SocketStream(UniqueFd socket);
  // Shuts the connection down, so that it ends even if a forked child still holds the socket.
  ~SocketStream() override;

  int fd() const noexcept override { return socket_.get(); }
  Moved read(std::span<const iovec> into) noexcept override;
  Moved write(std::span<const iovec> from) noexcept override;
  void expect(std::size_t bytes) noexcept override;
  bool is_woken_by_peer() const noexcept override { return is_local_; }
  int sender_cpu() const noexcept override { return is_local_ ? incoming_cpu(fd()) : -1; }
  void close_after_fork() noexcept override { socket_.reset(); }

 private:
  UniqueFd socket_;
  bool waits_for_many_ = false;  // TCP: SO_RCVLOWAT has an effect
  int low_water_ = 1;
  bool is_local_ = false;
};

}  // namespace fastkv
