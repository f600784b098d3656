// A test binary in one header: TEST(name) { CHECK(...); } and a main that runs them all.
//
// The same sources run in the emulator (g++), under every schedule, and on a GPU (nvcc).
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "common/launch.h"

namespace test {

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
inline int& failures() {
  static int count = 0;
  return count;
}
struct Registration {
  Registration(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

inline void fail(const char* file, int line, const std::string& what) {
  ++failures();
  std::printf("%s:%d: %s\n", file, line, what.c_str());
}

// The message of the exception that fn throws; empty if it throws none.
template <class Fn>
std::string message_of(Fn&& fn) {
  try {
    fn();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// Memory that host and kernel both reach.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n, T value = T{}) : size_(n) {
#if defined(__CUDACC__)
    kd::check_cuda(cudaMallocManaged(&data_, n * sizeof(T)), "cudaMallocManaged");
#else
    data_ = new T[n];
#endif
    for (size_t i = 0; i < n; ++i) data_[i] = value;
  }
  ~Buffer() {
#if defined(__CUDACC__)
    cudaFree(data_);
#else
    delete[] data_;
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

template <class... Params, class... Args>
void run(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  simt::launch(simt::LaunchInfo{"test_kernel", grid, block, shared_bytes, nullptr, "N=1"}, kernel,
               args...);
#if defined(__CUDACC__)
  kd::check_cuda(cudaDeviceSynchronize(), "test_kernel");
#endif
}

// Calls fn once under each schedule of the emulator (once on a GPU).
template <class Fn>
void for_each_order(Fn&& fn) {
#if defined(__CUDACC__)
  fn();
#else
  const simt::host::Schedule before = simt::host::schedule();
  using simt::Order;
  for (Order order : {Order::kAscending, Order::kDescending, Order::kShuffle, Order::kWarpAhead}) {
    for (uint64_t seed = 0; seed < (order >= Order::kShuffle ? 3 : 1); ++seed) {
      simt::set_order(order, seed);
      fn();
    }
  }
  simt::set_order(before.order, before.seed);
#endif
}

}  // namespace test

#define TEST(name)                                                    \
  static void test_##name();                                          \
  static test::Registration registration_##name(#name, &test_##name); \
  static void test_##name()

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) test::fail(__FILE__, __LINE__, "CHECK(" #condition ") failed"); \
  } while (0)

#define CHECK_NEAR(value, expected, tolerance)                                                 \
  do {                                                                                         \
    const double got_ = static_cast<double>(value), want_ = static_cast<double>(expected);     \
    if (!(std::fabs(got_ - want_) <= (tolerance))) {                                           \
      test::fail(__FILE__, __LINE__,                                                           \
                 #value " = " + std::to_string(got_) + ", expected " + std::to_string(want_)); \
    }                                                                                          \
  } while (0)

// The statement throws, and the message holds `part`.
#define CHECK_THROWS(statement, part)                                                          \
  do {                                                                                         \
    const std::string message_ = test::message_of([&] { statement; });                         \
    if (message_.find(part) == std::string::npos) {                                            \
      test::fail(                                                                              \
          __FILE__, __LINE__,                                                                  \
          std::string("expected an error with \"") + (part) + "\", got \"" + message_ + "\""); \
    }                                                                                          \
  } while (0)

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const test::Case& one : test::cases()) {
    const int before = test::failures();
    const std::string thrown = test::message_of([&] { one.run(); });
    if (!thrown.empty()) test::fail(one.name, 0, "unexpected exception: " + thrown);
    std::printf("%s %s\n", test::failures() == before ? "ok  " : "FAIL", one.name);
  }
  return test::failures() ? 1 : 0;
}
