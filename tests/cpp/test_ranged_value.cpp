// The ranges of a value: each byte once, for one reader as for several threads.
#include <algorithm>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "check.hpp"
#include "ranged_value.hpp"

using namespace fastkv;

namespace {

void check_cover(std::vector<RangedValue::Range> ranges, std::uint64_t bytes) {
  std::sort(ranges.begin(), ranges.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  std::uint64_t at = 0;
  for (const auto& range : ranges) {
    CHECK(range.first == at && range.bytes > 0);
    at += range.bytes;
    CHECK(range.to_end == (at == bytes));
  }
  CHECK(at == bytes);
}

}  // namespace

TEST(ranges_cover_each_byte_once_and_begin_with_the_end) {
  std::mt19937 random(1);
  for (int round = 0; round < 10'000; ++round) {
    const std::uint64_t bytes = RangedValue::kEndBytes + 1 + random() % 100'000;
    const std::uint64_t range_bytes = 1 + random() % 50'000;
    for (const bool in_parts : {false, true}) {
      RangedValue value(bytes, range_bytes, false, in_parts);
      std::vector<RangedValue::Range> ranges;
      while (const auto range = value.claim()) {
        CHECK(!range->to_end || ranges.empty());
        CHECK(in_parts || range->bytes <= range_bytes + range_bytes / 2 + RangedValue::kEndBytes);
        ranges.push_back(*range);
      }
      CHECK(value.exhausted());
      check_cover(ranges, bytes);
    }
  }
}

TEST(parts_are_equal_at_least_two_and_half_a_range_at_most) {
  constexpr std::uint64_t kRange = std::uint64_t{512} << 10;
  constexpr std::uint64_t kPage = 4096;
  std::mt19937 random(1);
  for (int round = 0; round < 10'000; ++round) {
    const std::uint64_t bytes = kRange / 2 + random() % (4 * kRange - kRange / 2);
    CHECK(RangedValue::is_small(bytes, kRange));
    RangedValue value(bytes, kRange, false, true);
    CHECK(value.in_parts());
    CHECK(value.claim()->to_end);
    const std::uint64_t part = value.claim()->bytes - RangedValue::kEndBytes;
    CHECK(part <= kRange / 2);
    std::uint64_t parts = 1;
    std::uint64_t last = 0;
    while (const auto range = value.claim()) {
      CHECK(range->first % kPage == RangedValue::kEndBytes && range->bytes <= part);
      last = range->bytes;
      ++parts;
    }
    const std::uint64_t fewest = (bytes - RangedValue::kEndBytes + kRange / 2 - 1) / (kRange / 2);
    CHECK(parts == std::max<std::uint64_t>(fewest, 2));
    CHECK(last + parts * kPage + RangedValue::kEndBytes >= part);
  }
  CHECK(!RangedValue::is_small(4 * kRange, kRange));
}

TEST(a_rest_of_up_to_half_a_range_belongs_to_the_one_before_it) {
  constexpr std::uint64_t kRange = 1000;
  constexpr std::uint64_t kAround = 2 * RangedValue::kEndBytes;
  for (std::uint64_t whole = 1; whole < 5; ++whole) {
    for (const std::uint64_t rest : {0, 1, 500, 501, 999}) {
      RangedValue value(kAround + whole * kRange + rest, kRange, false);
      std::vector<std::uint64_t> got;
      while (const auto range = value.claim()) got.push_back(range->bytes);
      std::vector<std::uint64_t> expected(whole, kRange);
      expected[0] += RangedValue::kEndBytes;
      if (rest > kRange / 2) {
        expected.push_back(rest);
      } else {
        expected.back() += rest;
      }
      expected.insert(expected.begin(), RangedValue::kEndBytes);
      CHECK(got == expected);
    }
  }
}

TEST(large_ranges_but_the_first_do_not_begin_on_the_page_grid) {
  RangedValue value(std::uint64_t{32} << 20, std::uint64_t{512} << 10, false);
  CHECK(value.claim()->to_end);
  CHECK(value.claim()->first == 0);
  while (const auto range = value.claim()) CHECK(range->first % 4096 == RangedValue::kEndBytes);
}

TEST(threads_that_claim_at_once_get_different_ranges) {
  for (int round = 0; round < 200; ++round) {
    RangedValue value(1'000'000, 1000, false);
    std::vector<std::vector<RangedValue::Range>> got(4);
    {
      std::vector<std::jthread> threads;
      for (auto& mine : got) {
        threads.emplace_back([&] {
          while (const auto range = value.claim()) mine.push_back(*range);
        });
      }
    }
    std::vector<RangedValue::Range> all;
    for (const auto& mine : got) all.insert(all.end(), mine.begin(), mine.end());
    check_cover(all, 1'000'000);
  }
}

TEST(what_is_spoiled_is_claimed_no_more_and_the_first_reason_counts) {
  RangedValue value(100'000, 1000, false);
  CHECK(value.join());
  CHECK(value.claim().has_value());
  value.spoil(Outcome::torn);
  value.lose({Code::stalled, "late"}, true);
  CHECK(!value.claim() && value.exhausted() && !value.join());
  CHECK(!value.leave() && value.leave());
  CHECK(value.outcome() == Outcome::torn);
}

TEST(nobody_joins_a_value_whose_last_reader_has_left) {
  RangedValue value(100'000, 1000, false);
  CHECK(value.leave());
  CHECK(!value.join());
}

int main(int count, char** names) {
  return check::run(count, names);
}
