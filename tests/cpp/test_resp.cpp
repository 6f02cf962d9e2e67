// The codec alone: every sample whole, cut at every byte, and with bytes behind it.
#include <string>
#include <string_view>
#include <vector>

#include "check.hpp"
#include "resp.hpp"

using fastkv::ReplyHead;
using fastkv::ReplyParser;
using Found = ReplyParser::Found;
using Type = ReplyHead::Type;

namespace {

struct Sample {
  std::string_view bytes;
  Type type;
  std::int64_t value;
  std::string_view text;
};

const std::vector<Sample> kSamples = {
    {"+OK\r\n", Type::simple, 0, "OK"},
    {"+\r\n", Type::simple, 0, ""},
    {"-ERR x\r\n", Type::error, 0, "ERR x"},
    {"-\r\n", Type::error, 0, ""},
    {"-a\rb\r\n", Type::error, 0, "a\rb"},
    {":0\r\n", Type::integer, 0, ""},
    {":-1\r\n", Type::integer, -1, ""},
    {":9223372036854775807\r\n", Type::integer, 9223372036854775807, ""},
    {":-9223372036854775808\r\n", Type::integer, INT64_MIN, ""},
    {"$0\r\n", Type::bulk, 0, ""},
    {"$-1\r\n", Type::bulk, -1, ""},
    {"$536870912\r\n", Type::bulk, 536870912, ""},
    {"*-1\r\n", Type::array, -1, ""},
    {"*0\r\n", Type::array, 0, ""},
    {"*3\r\n", Type::array, 3, ""},
};

const std::vector<std::string_view> kMalformed = {
    "$-2\r\n",
    "$+5\r\n",
    "$5x\r\n",
    "$\r\n",
    "$05\r\n",
    "$ 5\r\n",
    "$-\r\n",
    ":\r\n",
    ":1.5\r\n",
    ":-0\r\n",
    "*-2\r\n",
    "*x\r\n",
    "_\r\n",
    "%1\r\n",
    ">2\r\n",
    "hello\r\n",
    "\r\n",
    "+a\nb\r\n",
    "+a\rb\r\n",
    "$99999999999999999999\r\n",
    ":9223372036854775808\r\n",
    "$000000000000000000000000000000000000001\r\n",
};

bool matches(const ReplyParser::Step& step, const Sample& sample) {
  return step.found == Found::head && step.head.type == sample.type &&
         step.head.value == sample.value && step.head.text == sample.text &&
         step.consumed == sample.bytes.size();
}

}  // namespace

TEST(a_whole_head_is_found_with_bytes_behind_it_or_without) {
  for (const Sample& sample : kSamples) {
    for (const std::string_view behind : {"", "\r", "\r\n", "$5\r\nhello\r\n"}) {
      const std::string bytes = std::string(sample.bytes) + std::string(behind);
      ReplyParser parser;
      CHECK(matches(parser.next(bytes), sample));
    }
  }
}

TEST(a_head_cut_at_every_byte_is_incomplete_until_its_last) {
  for (const Sample& sample : kSamples) {
    ReplyParser parser;
    for (std::size_t have = 0; have < sample.bytes.size(); ++have) {
      CHECK(parser.next(sample.bytes.substr(0, have)).found == Found::incomplete);
    }
    CHECK(matches(parser.next(sample.bytes), sample));
  }
}

TEST(what_is_no_resp2_is_malformed_however_it_is_cut) {
  for (const std::string_view bytes : kMalformed) {
    ReplyParser whole;
    CHECK(whole.next(bytes).found == Found::malformed);
    ReplyParser cut;
    Found found = Found::incomplete;
    for (std::size_t have = 1; have <= bytes.size() && found == Found::incomplete; ++have) {
      found = cut.next(bytes.substr(0, have)).found;
    }
    CHECK(found == Found::malformed);
  }
}

TEST(a_line_longer_than_the_limit_is_malformed_however_it_is_cut) {
  for (const std::size_t over : {0, 1, 2, 100}) {
    const std::string line = "-" + std::string(ReplyParser::kMaxLine - 1 + over, 'x') + "\r\n";
    const Found expected = over == 0 ? Found::head : Found::malformed;
    ReplyParser whole;
    CHECK(whole.next(line).found == expected);
    ReplyParser cut;
    Found found = Found::incomplete;
    for (std::size_t have = line.size() - 200; have <= line.size(); ++have) {
      found = cut.next(std::string_view(line).substr(0, have)).found;
      if (found != Found::incomplete) break;
    }
    CHECK(found == expected);
  }
}

TEST(requests_are_arrays_of_bulk_strings) {
  std::string out;
  fastkv::append_array_header(out, 2);
  fastkv::append_bulk(out, "GET");
  fastkv::append_bulk(out, std::string_view("a\0\r\n", 4));
  CHECK(out == std::string("*2\r\n$3\r\nGET\r\n$4\r\na\0\r\n\r\n", 23));
}

TEST(the_size_of_a_bulk_header_is_that_of_what_is_appended) {
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{9}, std::size_t{10}, std::size_t{99},
                                  std::size_t{1048576}, std::size_t{33554432}}) {
    std::string out;
    fastkv::append_bulk_header(out, bytes);
    CHECK(out.size() == fastkv::bulk_header_size(bytes));
  }
}

int main(int count, char** names) {
  return check::run(count, names);
}
