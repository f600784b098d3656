// The host emulator: runs the threads of a block as fibers, block after block.
//
// A lane (CUDA thread) runs until it meets a barrier or a warp operation. The scheduler makes
// passes over the lanes and resumes the ready ones in an order that the caller picks; code that is
// right gives the same answer in every order, code with a missing barrier does not. If a pass
// resumes nobody and lanes are left, that is a deadlock and is reported with who waits where.
//
// All state belongs to the host thread that launches, so several threads may launch at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/simt/state.h"

namespace simt::host {

class Engine {
 public:
  // The engine whose kernel runs on this host thread, or null.
  static Engine*& current() {
    static thread_local Engine* engine = nullptr;
    return engine;
  }

  static Engine& running(const char* what) {
    Engine* engine = current();
    if (!engine) throw std::logic_error(std::string(what) + " was called outside of a kernel");
    return *engine;
  }

  static Engine& of_thread() {
    static thread_local Engine engine;
    return engine;
  }

  void run(const LaunchInfo& info, void (*body)(void*), void* argument);
  // A cooperative launch: simt/cooperative.h.
  static void run_together(const LaunchInfo& info, void (*body)(void*), void* argument);

  // Blocks the calling lane until `expected` lanes (0: all live ones) have called it.
  // Returns how many of them voted true, and in *arrived how many there were.
  int barrier(int id, int expected, bool vote, bool wait, const Site& site, int* arrived = nullptr);
  void warp_operation(const WarpCall& call, const Site& site);
  void yield_lane(const Site& site) {
    lane().site = site;
    yielded_ = true;
    pause();
  }

  void* shared_variable(const void* key, size_t bytes, size_t alignment);
  void* dynamic_shared() const { return arena_ + kStaticArena; }
  size_t dynamic_bytes() const { return info_->shared_bytes; }
  bool is_shared(const void* pointer, size_t bytes) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= arena_ && p + bytes <= arena_ + arena_bytes_;
  }

  Lane& lane() { return lanes_[current_lane_]; }
  int lane_in_warp() const { return current_lane_ % warpSize; }

 private:
  // Static variables get gaps between them, so the arena is larger than the 48 KiB that count.
  static constexpr size_t kStaticArena = 128 << 10;
  static constexpr size_t kGap = 64;

  struct SharedVariable {
    const void* key;
    void* data;
  };
  struct Scope;

  void check(const LaunchInfo& info) const;
  void prepare_run(const LaunchInfo& info, void (*body)(void*), void* argument, uint64_t seed);
  void begin_block(unsigned linear_block);
  void end_block();
  // The other lanes stop where they are; nothing on their stacks is destroyed.
  void abandon() {
    for (int t = 0; t < threads_; ++t) stacks_[t].forget();
  }
  void run_block(unsigned linear_block);
  bool is_running() const { return live_ > 0 && !failed_; }
  void draw_order();
  bool run_pass();
  void resume(int id);
  void pause();
  void release(Barrier& barrier, int id);
  void complete_warp_call(Warp& warp, int first_lane, uint32_t mask);
  void lane_finished();
  void lane_failed(const char* what) {
    failed_ = true;
    error_ = ", thread " + text_of_index(threadIdx) + ": " + what;
  }
  std::string deadlock_text() const;
  static void lane_main();
  void prepare_arena();
  uint64_t random();
  template <class Vector>
  void shuffle(Vector& values);

  const LaunchInfo* info_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::vector<Lane> lanes_;
  std::vector<Stack> stacks_;
  std::vector<Warp> warps_;
  std::vector<int> order_;
  Barrier barriers_[kBarriers];
  Context scheduler_;
  void* scheduler_sanitizer_stack_ = nullptr;
  const void* scheduler_stack_bottom_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  std::vector<SharedVariable> shared_variables_;
  std::unique_ptr<char[]> arena_memory_;
  char* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  size_t static_bytes_ = 0;   // what nvcc would count
  size_t static_offset_ = 0;  // with the gaps
  int threads_ = 0;
  int live_ = 0;
  int current_lane_ = 0;
  uint3 block_{};
  uint64_t random_state_ = 0;
  std::string error_;
  bool failed_ = false;
  bool yielded_ = false;
  bool progressed_ = false;  // in this pass some lane did more than wait by __nanosleep
};

// ---- launch ------------------------------------------------------------------------------------

// The same limits a GPU has; there they are only an error code after the fact.
inline void Engine::check(const LaunchInfo& info) const {
  const auto fail = [&](const std::string& why) {
    throw std::runtime_error(std::string("kernel ") + info.kernel + ": " + why + ", grid " +
                             text_of_index(info.grid) + ", block " + text_of_index(info.block) +
                             (info.shape.empty() ? "" : ", " + info.shape));
  };
  const uint64_t threads = uint64_t{info.block.x} * info.block.y * info.block.z;
  if (current()) fail("a kernel was launched from inside a kernel");
  if (threads == 0 || threads > 1024 || info.block.z > 64) {
    fail("a block holds 1 to 1024 threads and at most 64 in z");
  }
  if (!info.grid.x || !info.grid.y || !info.grid.z) fail("the grid is empty");
  if (info.grid.x > 0x7fffffffu || info.grid.y > 65535 || info.grid.z > 65535) {
    fail("the grid is larger than (2^31 - 1, 65535, 65535)");
  }
  if (info.shared_bytes > shared_limit()) {
    fail("dynamic shared memory of " + std::to_string(info.shared_bytes) + " bytes is over " +
         std::to_string(shared_limit()));
  }
}

inline void Engine::prepare_run(const LaunchInfo& info, void (*body)(void*), void* argument,
                                uint64_t seed) {
  info_ = &info;
  body_ = body;
  argument_ = argument;
  threads_ = static_cast<int>(info.block.x * info.block.y * info.block.z);
  random_state_ = seed;
  while (static_cast<int>(stacks_.size()) < threads_) stacks_.emplace_back();
  if (static_cast<int>(lanes_.size()) < threads_) lanes_.resize(threads_);
  warps_.resize((threads_ + warpSize - 1) / warpSize);
  prepare_arena();
  blockDim = info.block;
  gridDim = info.grid;
}

// Kernels run while it lives.
struct Engine::Scope {
  explicit Scope(Engine* engine) { current() = engine; }
  ~Scope() { current() = nullptr; }
};

inline void Engine::run(const LaunchInfo& info, void (*body)(void*), void* argument) {
  check(info);
  prepare_run(info, body, argument, schedule().seed);
  Scope scope(this);

  const uint64_t blocks = uint64_t{info.grid.x} * info.grid.y * info.grid.z;
  const Order order = schedule().order;
  std::vector<uint32_t> sequence;
  if (order == Order::kShuffle || order == Order::kWarpAhead) {
    sequence.resize(blocks);
    std::iota(sequence.begin(), sequence.end(), 0u);
    shuffle(sequence);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    run_block(static_cast<unsigned>(!sequence.empty()             ? sequence[i]
                                    : order == Order::kDescending ? blocks - 1 - i
                                                                  : i));
  }
}

inline void Engine::run_block(unsigned linear) {
  begin_block(linear);
  while (is_running()) {
    if (!run_pass() && is_running()) {
      failed_ = true;
      error_ = deadlock_text();
    }
  }
  end_block();
}

inline void Engine::begin_block(unsigned linear) {
  blockIdx = {linear % gridDim.x, linear / gridDim.x % gridDim.y, linear / gridDim.x / gridDim.y};
  block_ = blockIdx;
  live_ = threads_;
  failed_ = false;
  error_.clear();
  for (Barrier& barrier : barriers_) barrier = Barrier{};
  for (size_t w = 0; w < warps_.size(); ++w) {
    const int present = threads_ - static_cast<int>(w) * warpSize;
    warps_[w].waiting = 0;
    warps_[w].done = present >= warpSize ? 0u : ~0u << present;
  }
  for (int t = 0; t < threads_; ++t) {
    Lane& lane = lanes_[t];
    const unsigned u = static_cast<unsigned>(t);
    lane.state = LaneState::kReady;
    lane.thread = {u % blockDim.x, u / blockDim.x % blockDim.y, u / blockDim.x / blockDim.y};
    lane.site = Site{};
    lane.sanitizer_stack = nullptr;
    lane.copies.clear();
    lane.group_sizes.clear();
    lane.uncommitted = 0;
    prepare(lane.context, stacks_[t], &Engine::lane_main);
  }

  // Shared memory holds NaN until somebody writes it, in every block anew.
  shared_variables_.clear();
  static_bytes_ = static_offset_ = 0;
#if KD_SIMT_ASAN
  __asan_unpoison_memory_region(arena_, arena_bytes_);
#endif
  std::memset(arena_ + kStaticArena, 0xFF, info_->shared_bytes);
#if KD_SIMT_ASAN
  __asan_poison_memory_region(arena_, kStaticArena);
  __asan_poison_memory_region(arena_ + kStaticArena + info_->shared_bytes,
                              arena_bytes_ - kStaticArena - info_->shared_bytes);
#endif
}

inline void Engine::end_block() {
#if KD_SIMT_ASAN
  __asan_unpoison_memory_region(arena_, arena_bytes_);
#endif
  if (failed_) {
    abandon();
    throw std::runtime_error(std::string("kernel ") + info_->kernel + ", block " +
                             text_of_index(block_) + error_ +
                             (info_->shape.empty() ? "" : "; " + info_->shape));
  }
}

// ---- scheduling --------------------------------------------------------------------------------

inline uint64_t Engine::random() {  // splitmix64
  uint64_t z = (random_state_ += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <class Vector>
void Engine::shuffle(Vector& values) {
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random() % i]);
}

inline void Engine::draw_order() {
  const Order order = schedule().order;
  if (order == Order::kWarpAhead) {
    order_.resize(warps_.size());
  } else {
    order_.resize(threads_);
  }
  std::iota(order_.begin(), order_.end(), 0);
  if (order == Order::kDescending) {
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = threads_ - 1 - static_cast<int>(i);
  }
  if (order == Order::kShuffle || order == Order::kWarpAhead) shuffle(order_);
}

// One pass over the lanes; false if nobody could run.
inline bool Engine::run_pass() {
  draw_order();
  bool moved = false;
  progressed_ = false;
  if (schedule().order != Order::kWarpAhead) {
    for (int id : order_) {
      if (lanes_[id].state != LaneState::kReady) continue;
      moved = true;
      resume(id);
      if (failed_) return true;
    }
    return moved;
  }
  for (int warp : order_) {
    const int end = std::min(threads_, (warp + 1) * warpSize);
    for (bool again = true; again;) {
      again = false;
      for (int id = warp * warpSize; id < end; ++id) {
        if (lanes_[id].state != LaneState::kReady) continue;
        moved = true;
        resume(id);
        again |= !yielded_;  // a warp that only spins lets the others go on
        if (failed_) return true;
      }
    }
  }
  return moved;
}

inline void Engine::resume(int id) {
  Lane& lane = lanes_[id];
  current_lane_ = id;
  threadIdx = lane.thread;
  yielded_ = false;
#if KD_SIMT_ASAN
  __sanitizer_start_switch_fiber(&scheduler_sanitizer_stack_, stacks_[id].bottom(), Stack::kBytes);
#endif
  switch_context(scheduler_, lane.context);
#if KD_SIMT_ASAN
  __sanitizer_finish_switch_fiber(scheduler_sanitizer_stack_, nullptr, nullptr);
#endif
  progressed_ |= !yielded_;
}

// Back to the scheduler; returns when the lane is resumed.
inline void Engine::pause() {
  Lane& self = lane();
#if KD_SIMT_ASAN
  const bool last = self.state == LaneState::kDone;
  __sanitizer_start_switch_fiber(last ? nullptr : &self.sanitizer_stack, scheduler_stack_bottom_,
                                 scheduler_stack_bytes_);
#endif
  switch_context(self.context, scheduler_);
#if KD_SIMT_ASAN
  __sanitizer_finish_switch_fiber(self.sanitizer_stack, nullptr, nullptr);
#endif
}

inline void Engine::lane_main() {
  Engine& engine = *current();
#if KD_SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack_bottom_,
                                  &engine.scheduler_stack_bytes_);
#endif
  // The last switch leaves this frame for good: nothing in it may own memory.
  try {
    engine.body_(engine.argument_);
  } catch (const std::exception& error) {
    engine.lane_failed(error.what());
  } catch (...) {
    engine.lane_failed("an exception that is no std::exception");
  }
  engine.lane_finished();
  engine.pause();
}

// A lane that returned counts no longer: whoever waited only for it goes on.
inline void Engine::lane_finished() {
  Lane& self = lane();
  self.state = LaneState::kDone;
  --live_;
  Warp& warp = warps_[current_lane_ / warpSize];
  warp.done |= 1u << lane_in_warp();
  const int first = current_lane_ - lane_in_warp();
  for (uint32_t left = warp.waiting; left;) {
    const int other = __builtin_ctz(left);
    const uint32_t mask = warp.calls[other].mask;
    left &= ~(mask | 1u << other);
    if ((mask & ~(warp.waiting | warp.done)) == 0) complete_warp_call(warp, first, mask);
  }
  if (barriers_[0].arrived && !barriers_[0].expected && barriers_[0].arrived == live_) {
    release(barriers_[0], 0);
  }
}

inline std::string Engine::deadlock_text() const {
  struct Group {
    Site site;
    uint32_t mask;
    int count;
  };
  std::vector<Group> groups;
  for (int t = 0; t < threads_; ++t) {
    const Lane& lane = lanes_[t];
    if (lane.state == LaneState::kDone) continue;
    const uint32_t mask = lane.state == LaneState::kInWarpOperation
                              ? warps_[t / warpSize].calls[t % warpSize].mask
                              : 0;
    bool found = false;
    for (Group& group : groups) {
      if (group.site.line != lane.site.line || group.site.file != lane.site.file ||
          group.mask != mask) {
        continue;
      }
      ++group.count;
      found = true;
    }
    if (!found) groups.push_back({lane.site, mask, 1});
  }
  std::ostringstream out;
  out << ": deadlock, " << live_ << " of " << threads_ << " threads are left:";
  for (const Group& group : groups) {
    out << ' ' << group.count << " wait at " << text(group.site);
    if (group.mask) out << " with mask 0x" << std::hex << group.mask << std::dec;
    out << ';';
  }
  out << ' ' << threads_ - live_ << " have returned";
  return out.str();
}

// ---- meeting points ----------------------------------------------------------------------------

inline int Engine::barrier(int id, int expected, bool vote, bool wait, const Site& site,
                           int* arrived) {
  if (id < 0 || id >= kBarriers) throw std::logic_error("barrier id is not in 0..15");
  if (expected % warpSize != 0) {
    throw std::logic_error("a named barrier counts whole warps, got " + std::to_string(expected));
  }
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.site = site;
    barrier.votes = 0;
  } else if (barrier.expected != expected) {
    throw std::logic_error("barrier " + std::to_string(id) + " expects " +
                           std::to_string(barrier.expected) + " threads at " + text(barrier.site) +
                           " and " + std::to_string(expected) + " at " + text(site));
  } else if (!expected && (barrier.site.line != site.line || barrier.site.file != site.file)) {
    // A GPU may let this pass or may hang; the programming guide forbids it.
    throw std::logic_error("divergent barrier: some threads wait at " + text(barrier.site) +
                           ", this one at " + text(site));
  }
  ++barrier.arrived;
  barrier.votes += vote;
  Lane& self = lane();
  self.site = site;
  if (wait) {
    self.state = LaneState::kAtBarrier;
    self.barrier = id;
  }
  if (barrier.arrived == (barrier.expected ? barrier.expected : live_)) release(barrier, id);
  if (wait) pause();
  if (arrived) *arrived = barrier.last_arrived;
  return barrier.last_votes;
}

inline void Engine::release(Barrier& barrier, int id) {
  barrier.last_votes = barrier.votes;
  barrier.last_arrived = barrier.arrived;
  barrier.arrived = 0;
  for (int t = 0; t < threads_; ++t) {
    Lane& lane = lanes_[t];
    if (lane.state == LaneState::kAtBarrier && lane.barrier == id) lane.state = LaneState::kReady;
  }
}

inline void Engine::warp_operation(const WarpCall& call, const Site& site) {
  const uint32_t bit = 1u << lane_in_warp();
  if (!(call.mask & bit)) {
    throw std::logic_error(text(site) + ": the calling lane is not in its own mask");
  }
  Warp& warp = warps_[current_lane_ / warpSize];
  Lane& self = lane();
  warp.calls[lane_in_warp()] = call;
  warp.waiting |= bit;
  self.site = site;
  self.state = LaneState::kInWarpOperation;
  if ((call.mask & ~(warp.waiting | warp.done)) == 0) {
    const int first = current_lane_ - lane_in_warp();
    complete_warp_call(warp, first, call.mask);
  }
  pause();
}

// Completes the operation of the lanes in `mask`, unless some of them wait with another mask or in
// another operation: then nobody moves, and the deadlock report shows them.
inline void Engine::complete_warp_call(Warp& warp, int first_lane, uint32_t mask) {
  const uint32_t present = mask & ~warp.done;
  if (!present) return;
  const WarpCall& model = warp.calls[__builtin_ctz(present)];
  for (uint32_t left = present; left; left &= left - 1) {
    const WarpCall& call = warp.calls[__builtin_ctz(left)];
    if (call.mask != mask || call.combine != model.combine) return;
  }
  model.combine(warp.calls, present);
  for (uint32_t left = present; left; left &= left - 1) {
    lanes_[first_lane + __builtin_ctz(left)].state = LaneState::kReady;
  }
  warp.waiting &= ~present;
}

// ---- shared memory -----------------------------------------------------------------------------

inline void Engine::prepare_arena() {
  const size_t needed = kStaticArena + shared_limit() + kGap;
  if (arena_bytes_ >= needed) return;
  arena_memory_.reset(new char[needed + 128]);
  const uintptr_t address = reinterpret_cast<uintptr_t>(arena_memory_.get());
  arena_ = arena_memory_.get() + (128 - address % 128);
  arena_bytes_ = needed;
}

// The first lane of a block that passes the declaration makes the variable; the others find it.
inline void* Engine::shared_variable(const void* key, size_t bytes, size_t alignment) {
  for (const SharedVariable& variable : shared_variables_) {
    if (variable.key == key) return variable.data;
  }
  const auto round_up = [](size_t value, size_t unit) { return (value + unit - 1) / unit * unit; };
  static_bytes_ = round_up(static_bytes_, alignment) + bytes;
  const size_t offset = round_up(static_offset_, std::max(alignment, size_t{16}));
  static_offset_ = offset + bytes + kGap;
  if (static_bytes_ > kStaticSharedLimit || static_offset_ > kStaticArena) {
    throw std::logic_error("static shared memory of " + std::to_string(static_bytes_) +
                           " bytes is over 48 KiB");
  }
  if (static_bytes_ + info_->shared_bytes > shared_limit()) {
    throw std::logic_error("static and dynamic shared memory together, " +
                           std::to_string(static_bytes_ + info_->shared_bytes) +
                           " bytes, are over " + std::to_string(shared_limit()));
  }
  char* data = arena_ + offset;
#if KD_SIMT_ASAN
  __asan_unpoison_memory_region(data, bytes);
#endif
  std::memset(data, 0xFF, bytes);
  shared_variables_.push_back({key, data});
  return data;
}

}  // namespace simt::host
