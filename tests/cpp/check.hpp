// A test program is a main that calls functions whose names are sentences: all, or those it is told
// to. CHECK says where and what failed, and the program goes on to the next test and exits with 1.
#pragma once

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

// The tests with these names, or all; `--list` prints what there is.
inline int run(int count, char** names) {
  const std::vector<std::string> wanted(names + 1, names + count);
  const bool list = wanted == std::vector<std::string>{"--list"};
  int ran = 0;
  int failed = 0;
  for (const Test& test : tests()) {
    if (list) {
      std::puts(test.name);
      continue;
    }
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), test.name) == wanted.end()) {
      continue;
    }
    ++ran;
    try {
      test.run();
    } catch (const std::exception& error) {
      std::printf("FAILED %s: %s\n", test.name, error.what());
      ++failed;
    }
  }
  return failed == 0 && (list || ran > 0) ? 0 : 1;
}

inline void check(bool ok, const char* what, const char* file, int line) {
  if (!ok) throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

}  // namespace check

#define CHECK(condition) ::check::check((condition), #condition, __FILE__, __LINE__)
#define TEST(name)                                         \
  static void name();                                      \
  static const ::check::Register name##_test(#name, name); \
  static void name()
