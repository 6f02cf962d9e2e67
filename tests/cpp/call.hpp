// A call of an engine, one batch, and what a server answers to it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "check.hpp"
#include "engine.hpp"
#include "peer.hpp"

constexpr std::size_t kValueBytes = 3000;
// One connection for lookups and one for values, or one for all.
constexpr fastkv::Window kWindow{1 << 20, 1024, 0};

struct Call {
  Call(fastkv::Command command, std::size_t keys, const std::string& name = "k",
       std::size_t bytes = kValueBytes)
      : batch(std::make_shared<fastkv::Batch>(command)), memory(keys, std::string(bytes, 'v')) {
    for (std::string& value : memory) {
      batch->add_key(name);
      if (command != fastkv::Command::get && command != fastkv::Command::set) continue;
      batch->add_segment(value.data(), value.size());
      batch->end_value();
    }
  }
  void submit(fastkv::Engine& engine, double seconds = 0) {
    id = next_id++;
    CHECK(engine.submit(batch, id, queue, retry(0), seconds).ok());
  }
  fastkv::Code wait(int milliseconds = 20'000) {
    wait_for(*queue, 1, milliseconds);
    return batch->status().code;
  }

  std::shared_ptr<fastkv::Batch> batch;
  std::shared_ptr<fastkv::CompletionQueue> queue = std::make_shared<fastkv::CompletionQueue>();
  std::vector<std::string> memory;
  std::uint64_t id = 0;
};

inline std::optional<std::string> answer(const std::vector<std::string>& words) {
  if (words[0] == "GET") return bulk(std::string(kValueBytes, 'w'));
  return words[0] == "SET" ? "+OK\r\n" : ":1\r\n";
}
