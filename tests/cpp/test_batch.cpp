// One call over several nodes: parts of a batch, and what is left after each.
#include <cstdint>
#include <string>
#include <vector>

#include "batch.hpp"
#include "check.hpp"
#include "slots.hpp"

using namespace fastkv;

namespace {

using Indices = std::vector<std::uint32_t>;

std::string key_of(std::size_t i) {
  return "key" + std::to_string(i);
}

Completed refused(std::uint32_t index, const char* error) {
  return {.ticket = {nullptr, index}, .outcome = Outcome::refused, .error = error};
}

}  // namespace

TEST(parts_have_the_keys_and_the_memory_of_the_whole) {
  std::string memory(100, '.');
  Batch whole(Command::get);
  for (std::size_t i = 0; i < 10; ++i) {
    whole.add_key(key_of(i));
    auto* const at = memory.data() + 10 * i;
    whole.add_segment(at, i);
    whole.add_segment(at + i, 1);
    whole.end_value();
  }
  const auto part = whole.part({7, 2, 9});
  CHECK(part->size() == 3);
  CHECK(part->key(0) == "key7" && part->key(1) == "key2" && part->key(2) == "key9");
  CHECK(part->value_bytes(0) == 8 && part->value_bytes(1) == 3 && part->value_bytes(2) == 10);
  const Operation operation = part->operation(1);
  CHECK(operation.value.size() == 2 && !operation.asking);
  CHECK(operation.value[0].data == reinterpret_cast<std::byte*>(memory.data() + 20));
  CHECK(operation.value[1].data == reinterpret_cast<std::byte*>(memory.data() + 22));
  part->ask();
  CHECK(part->operation(1).asking);
}

TEST(keys_go_to_the_owners_of_their_slots) {
  Batch whole(Command::exists);
  std::vector<std::uint16_t> owners(kSlots);
  for (std::size_t slot = 0; slot < kSlots; ++slot) {
    owners[slot] = static_cast<std::uint16_t>(slot % 5 == 4 ? SlotMap::kNobody : slot % 5);
  }
  Indices all;
  for (std::uint32_t i = 0; i < 200; ++i) {
    whole.add_key(key_of(i));
    all.push_back(i);
  }
  const auto routed = whole.route(SlotMap(owners), all);
  CHECK(routed.size() == 5);
  std::size_t keys = 0;
  for (std::size_t owner = 0; owner < routed.size(); ++owner) {
    keys += routed[owner].size();
    for (const std::uint32_t index : routed[owner]) {
      CHECK(key_slot(key_of(index)) % 5 == owner);
    }
  }
  CHECK(keys == 200);
  CHECK(whole.route(SlotMap({}), all) == std::vector<Indices>{all});
  CHECK(key_slot("123456789") == 0x31c3);  // CRC16-XMODEM's check value, below 16384
  CHECK(key_slot("a{123456789}b{c}") == 0x31c3);
  CHECK(key_slot("{}123456789") != 0x31c3 && key_slot("{}a") != key_slot("{}b"));
  CHECK(key_slot("{123456789") != 0x31c3);
}

TEST(what_was_redirected_or_not_answered_is_left_and_the_rest_is_final) {
  Batch whole(Command::exists);
  for (std::size_t i = 0; i < 8; ++i) whole.add_key(key_of(i));
  // A batch that was never submitted has no outcomes; as the engine does it:
  const auto part = whole.part({7, 6, 5, 4, 3, 2, 1});
  Batch::Rest rest = whole.take(*part);
  CHECK(rest.unanswered == (Indices{7, 6, 5, 4, 3, 2, 1}) && rest.redirected.empty());
  part->prepare_outcomes();
  part->answer(0, Outcome::hit);
  part->answer(1, Outcome::miss);
  part->answer(refused(2, "MOVED 1 h:1"));
  part->answer(refused(3, "WRONGTYPE not a string"));
  part->answer(refused(4, "CLUSTERDOWN wait"));
  part->answer(refused(6, "ASK 1 h:1"));
  rest = whole.take(*part);
  CHECK(rest.unanswered == Indices{2});
  CHECK(rest.redirected.size() == 3);
  CHECK(rest.redirected[0].index == 5 && rest.redirected[0].error == "MOVED 1 h:1");
  CHECK(rest.redirected[1].index == 3 && rest.redirected[2].index == 1);
  CHECK(whole.outcome(7) == Outcome::hit && whole.outcome(6) == Outcome::miss);
  CHECK(whole.outcome(4) == Outcome::refused && whole.outcome(5) == Outcome::unanswered);
  CHECK(whole.failures().size() == 1 && whole.failures()[0].index == 4);
}

TEST(replies_that_redirect_are_told_from_those_that_answer) {
  for (const char* line : {"MOVED 1 h:1", "ASK 1 h:1", "TRYAGAIN later", "CLUSTERDOWN The cluster",
                           "MASTERDOWN Link with MASTER", "LOADING Redis is loading"}) {
    CHECK(redirects(line));
  }
  for (const char* line : {"", "MOVED", "ASKING", "ERR", "WRONGTYPE x", "moved 1"}) {
    CHECK(!redirects(line));
  }
}

int main(int count, char** names) {
  return check::run(count, names);
}
