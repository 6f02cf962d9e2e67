// Redis Cluster's arithmetic: which slot a key is in, which node serves a slot, which error replies
// send a key elsewhere
// (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/). Knows no node's
// address, no socket and no batch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace fastkv {

inline constexpr std::size_t kSlots = 16384;

// CRC16-XMODEM of the key, or of what stands between its first "{" and the next "}", if anything.
std::uint16_t key_slot(std::string_view key) noexcept;

// For each slot the number of whatever serves it, given by who made the map. Immutable.
class SlotMap {
 public:
  static constexpr std::uint16_t kNobody = 0xffff;

  // `owners[i]` serves slot i; slots beyond its end are nobody's.
  explicit SlotMap(std::span<const std::uint16_t> owners) noexcept;

  std::uint16_t owner(std::string_view key) const noexcept { return owners_[key_slot(key)]; }

 private:
  std::array<std::uint16_t, kSlots> owners_;
};

// Whether an error reply says nothing about its key, but where to ask for it, or to ask again:
// MOVED, ASK, TRYAGAIN, CLUSTERDOWN, MASTERDOWN, of a replica that lags, and LOADING, of a node
// that comes back. The command was not run.
bool redirects(std::string_view error) noexcept;

}  // namespace fastkv
