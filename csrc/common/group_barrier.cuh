// A barrier of several blocks of a cooperative launch, for kernels whose problems each have a group
// of blocks: groups do not wait for each other.
#pragma once

#include "common/simt.h"

namespace kd {

// All threads of `blocks` blocks construct it over the same counter, which is zero before the
// launch, and call wait() equally often. What a block wrote before is seen by all after.
class GroupBarrier {
 public:
  KD_DEVICE GroupBarrier(unsigned* counter, int blocks)
      : counter_(counter), blocks_(static_cast<unsigned>(blocks)) {}

  KD_DEVICE void wait() {
    target_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter_, 1u);
      // The difference, because the counter may wrap around.
      while (static_cast<int>(*static_cast<volatile unsigned*>(counter_) - target_) < 0) {
        __nanosleep(32);
      }
      __threadfence();
    }
    __syncthreads();
  }

 private:
  unsigned* counter_;
  unsigned blocks_;
  unsigned target_ = 0;
};

}  // namespace kd
