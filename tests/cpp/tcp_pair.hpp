// Both ends of a connection over TCP that stays on this machine.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include "check.hpp"
#include "fd.hpp"

struct TcpPair {
  // `address`: one of ours, that somebody connects to. `segment`: no more bytes at once; 0: any.
  explicit TcpPair(const char* address = "127.0.0.1", int segment = 0) {
    sockaddr_in at{};
    at.sin_family = AF_INET;
    CHECK(::inet_pton(AF_INET, address, &at.sin_addr) == 1);
    const fastkv::UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK(::bind(listener.get(), reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    CHECK(::listen(listener.get(), 1) == 0);
    socklen_t size = sizeof at;
    CHECK(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&at), &size) == 0);
    connected = fastkv::UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (segment > 0) {
      CHECK(::setsockopt(connected.get(), IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment) == 0);
    }
    CHECK(::connect(connected.get(), reinterpret_cast<sockaddr*>(&at), sizeof at) == 0);
    accepted = fastkv::UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    CHECK(accepted.get() >= 0);
    const int yes = 1;  // as servers do
    CHECK(::setsockopt(accepted.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes) == 0);
  }
  fastkv::UniqueFd connected;
  fastkv::UniqueFd accepted;
};
