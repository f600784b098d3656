// Cooperative launches in the emulator: every block has an engine of its own, and they take turns,
// a pass over the lanes each (with kWarpAhead as many as it can), in the schedule's order.
#pragma once

#include "common/simt/engine.h"

namespace simt::host {

inline void Engine::run_together(const LaunchInfo& info, void (*body)(void*), void* argument) {
  static thread_local std::vector<std::unique_ptr<Engine>> engines;
  of_thread().check(info);
  const uint64_t blocks = uint64_t{info.grid.x} * info.grid.y * info.grid.z;
  if (blocks > kResidentBlocks) {
    throw std::runtime_error(std::string("kernel ") + info.kernel + ": a cooperative launch of " +
                             std::to_string(blocks) + " blocks, " +
                             std::to_string(kResidentBlocks) + " fit at once");
  }
  while (engines.size() < blocks) engines.push_back(std::make_unique<Engine>());
  Scope scope(engines[0].get());
  std::vector<uint32_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0u);
  for (uint32_t block : sequence) {
    current() = engines[block].get();
    engines[block]->prepare_run(info, body, argument, schedule().seed * kResidentBlocks + block);
    engines[block]->begin_block(block);
  }
  const Order order = schedule().order;
  if (order == Order::kDescending) std::reverse(sequence.begin(), sequence.end());
  const auto give_up = [&](Engine& engine, const std::string& why) {
    engine.failed_ = true;
    engine.error_ = why;
    for (uint64_t block = 0; block < blocks; ++block) engines[block]->abandon();
    engine.end_block();  // throws
  };
  // Lanes that wait for another block spin, so nobody is ever stuck for good: rounds in which
  // nothing happens but that are counted.
  int idle_rounds = 0;
  for (bool running = true; running;) {
    running = false;
    bool progressed = false;
    if (order == Order::kShuffle || order == Order::kWarpAhead) engines[0]->shuffle(sequence);
    for (uint32_t block : sequence) {
      Engine& engine = *engines[block];
      current() = &engine;
      for (bool again = engine.is_running(); again;) {
        blockIdx = engine.block_;
        if (!engine.run_pass() && engine.is_running()) give_up(engine, engine.deadlock_text());
        if (engine.failed_) give_up(engine, engine.error_);
        progressed |= engine.progressed_;
        again = order == Order::kWarpAhead && engine.progressed_ && engine.is_running();
      }
      running |= engine.is_running();
    }
    idle_rounds = progressed ? 0 : idle_rounds + 1;
    if (!running || idle_rounds < kIdleRounds) continue;
    for (uint32_t block : sequence) {
      Engine& engine = *engines[block];
      if (engine.is_running()) give_up(engine, engine.deadlock_text());
    }
  }
  for (uint32_t block : sequence) engines[block]->end_block();
}

}  // namespace simt::host
