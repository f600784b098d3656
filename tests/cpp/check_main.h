// CHECK for the C++ self tests: counts failures, prints the first ones, and check_result() is what
// main() returns.
#pragma once

#include <cstdio>

namespace kd_test {

inline int failures = 0;

inline void fail(const char* file, int line, const char* text) {
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, text);
}

inline int check_result(const char* name) {
  std::printf("%s: %s (%d failures)\n", name, failures ? "FAILED" : "ok", failures);
  return failures ? 1 : 0;
}

}  // namespace kd_test

#define CHECK(condition)                                               \
  do {                                                                 \
    if (!(condition)) ::kd_test::fail(__FILE__, __LINE__, #condition); \
  } while (0)

// With two numbers to look at when it fails.
#define CHECK_SHOW(condition, a, b)                                                       \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      ::kd_test::fail(__FILE__, __LINE__, #condition);                                    \
      if (::kd_test::failures <= 20) {                                                    \
        std::fprintf(stderr, "    %s = %.9g, %s = %.9g\n", #a, double(a), #b, double(b)); \
      }                                                                                   \
    }                                                                                     \
  } while (0)
