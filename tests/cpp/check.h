// Checks that go on after a failure, and the sum of them as the exit status.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

namespace checks {

inline int passed = 0, failed = 0;

inline bool check(bool holds, const std::string& text, const char* file, int line) {
  if (holds) {
    ++passed;
  } else if (++failed <= 20) {
    std::printf("%s:%d: failed: %s\n", file, line, text.c_str());
  }
  return holds;
}

// The message of the exception that `body` ends with, or "".
template <class Body>
std::string message_of(const Body& body) {
  try {
    body();
  } catch (const std::exception& exception) {
    return exception.what();
  }
  return "";
}

inline int report(const char* name) {
  std::printf("%s: %d checks passed, %d failed\n", name, passed, failed);
  return failed > 0 || passed == 0 ? 1 : 0;
}

}  // namespace checks

#define CHECK(condition, text) checks::check((condition), (text), __FILE__, __LINE__)
