// What the emulator keeps: thread indices, the schedule, lanes, warps and barriers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/simt/fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local uint3 threadIdx{0, 0, 0};
inline thread_local uint3 blockIdx{0, 0, 0};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};
constexpr int warpSize = 32;

namespace simt {

using Stream = void*;

// What a launch is called and how large it is; errors quote all of it.
struct LaunchInfo {
  const char* kernel = "a kernel";
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic shared memory
  Stream stream = nullptr;
  std::string shape;  // free text for error messages, such as "N=4, V=32000"
};

// kAscending, kDescending: lanes and blocks by number. kShuffle: a new random order in every pass.
// kWarpAhead: a random warp runs as far as it can before another one moves.
enum class Order { kAscending, kDescending, kShuffle, kWarpAhead };

// "ascending", "descending", "shuffle" or "warp_ahead".
inline Order parse_order(const std::string& name) {
  if (name == "ascending") return Order::kAscending;
  if (name == "descending") return Order::kDescending;
  if (name == "shuffle") return Order::kShuffle;
  if (name == "warp_ahead") return Order::kWarpAhead;
  throw std::invalid_argument(
      "schedule order: expected ascending, descending, shuffle or warp_ahead, got " + name);
}

namespace host {

struct Schedule {
  Order order = Order::kAscending;
  uint64_t seed = 0;
};

// KDK_SIMT_ORDER=<order> or <order>:<seed>
inline Schedule parse_schedule(const char* text) {
  Schedule schedule;
  if (!text || !*text) return schedule;
  const std::string all(text);
  const size_t colon = all.find(':');
  schedule.order = parse_order(all.substr(0, colon));
  if (colon != std::string::npos) {
    schedule.seed = std::strtoull(all.c_str() + colon + 1, nullptr, 10);
  }
  return schedule;
}

inline Schedule& schedule() {
  static Schedule current = parse_schedule(std::getenv("KDK_SIMT_ORDER"));
  return current;
}

// Where a lane waits.
struct Site {
  const char* operation = "";
  const char* file = "";
  int line = 0;
};

inline std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(site.operation) + " (" + (slash ? slash + 1 : site.file) + ":" +
         std::to_string(site.line) + ")";
}

template <class Index>
std::string text_of_index(const Index& i) {
  std::ostringstream out;
  out << '(' << i.x << ',' << i.y << ',' << i.z << ')';
  return out.str();
}

// A warp operation: every lane leaves pointers to its operands (they live on its stack while it
// waits), and the last one to arrive calls `combine`, which writes the results of all.
struct WarpCall {
  uint32_t mask = 0;
  void (*combine)(struct WarpCall* calls, uint32_t present) = nullptr;  // calls[lane in warp]
  const void* in = nullptr;
  void* out = nullptr;
  int source = 0;  // the lane a shuffle reads
};

enum class LaneState : uint8_t { kReady, kAtBarrier, kInWarpOperation, kDone };

// One cp.async: `bytes` at `to`, of which the first `valid` come from `from` and the rest are zero.
struct AsyncCopy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint32_t valid;
};

struct Lane {
  Context context;
  LaneState state = LaneState::kDone;
  int barrier = 0;
  uint3 thread{};
  Site site;
  void* sanitizer_stack = nullptr;
  std::vector<AsyncCopy> copies;    // issued, not yet performed, oldest first
  std::vector<size_t> group_sizes;  // committed groups, oldest first
  size_t uncommitted = 0;
};

struct Warp {
  uint32_t waiting = 0;  // lanes inside a warp operation
  uint32_t done = 0;     // lanes that returned or never existed
  WarpCall calls[warpSize];
};

struct Barrier {
  int arrived = 0;
  int expected = 0;  // 0: every lane that has not returned
  int votes = 0;
  int last_votes = 0;
  int last_arrived = 0;
  Site site;
};

constexpr int kBarriers = 16;
// Blocks of a cooperative launch that fit at once: two on each of four multiprocessors.
constexpr uint64_t kResidentBlocks = 8;
// Rounds over all of them in which lanes only spin, after which it counts as a deadlock.
constexpr int kIdleRounds = 1000;
constexpr size_t kStaticSharedLimit = 48 << 10;
// 99 KiB is what every GPU from sm_86 on offers to a block; larger GPUs are asked for by
// set_shared_limit.
inline size_t& shared_limit() {
  static size_t bytes = 99 << 10;
  return bytes;
}

}  // namespace host
}  // namespace simt
