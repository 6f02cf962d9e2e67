#include "slots.hpp"

#include <algorithm>

namespace fastkv {
namespace {

// [n][byte]: CRC16 of a byte and n zeros after it: polynomial 0x1021, from 0, nothing reflected.
constexpr std::array<std::array<std::uint16_t, 256>, 4> make_tables() {
  std::array<std::array<std::uint16_t, 256>, 4> tables{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned crc = byte << 8;
    for (auto& table : tables) {
      for (int bit = 0; bit < 8; ++bit) crc = (crc << 1) ^ ((crc & 0x8000) != 0 ? 0x11021u : 0u);
      table[byte] = static_cast<std::uint16_t>(crc);
    }
  }
  return tables;
}

constexpr auto kTables = make_tables();

// Four bytes a step: looked up one by one, each lookup would wait for the one before.
unsigned crc16(std::string_view bytes) noexcept {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  unsigned crc = 0;
  for (; bytes.size() >= 4; bytes.remove_prefix(4)) {
    crc = kTables[3][(crc >> 8) ^ at(0)] ^ kTables[2][(crc & 0xff) ^ at(1)] ^ kTables[1][at(2)] ^
          kTables[0][at(3)];
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    crc = ((crc << 8) & 0xffff) ^ kTables[0][(crc >> 8) ^ at(i)];
  }
  return crc;
}

}  // namespace

std::uint16_t key_slot(std::string_view key) noexcept {
  if (const std::size_t open = key.find('{'); open != std::string_view::npos) {
    const std::size_t close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1) {
      key = key.substr(open + 1, close - open - 1);
    }
  }
  return static_cast<std::uint16_t>(crc16(key) % kSlots);
}

SlotMap::SlotMap(std::span<const std::uint16_t> owners) noexcept {
  owners_.fill(kNobody);
  std::copy_n(owners.begin(), std::min(owners.size(), kSlots), owners_.begin());
}

bool redirects(std::string_view error) noexcept {
  return error.starts_with("MOVED ") || error.starts_with("ASK ") ||
         error.starts_with("TRYAGAIN") || error.starts_with("CLUSTERDOWN") ||
         error.starts_with("MASTERDOWN") || error.starts_with("LOADING ");
}

}  // namespace fastkv
