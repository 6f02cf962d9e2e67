// What has completed on a queue, all at once.
#pragma once

#include <cstdint>
#include <vector>

#include "completion_queue.hpp"

inline std::vector<std::uint64_t> drain(fastkv::CompletionQueue& queue) {
  std::vector<std::uint64_t> ids;
  while (const auto id = queue.next()) ids.push_back(*id);
  return ids;
}
