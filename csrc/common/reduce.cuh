// The reduction ladder: lane -> warp -> block, for any accumulator.
//
// An accumulator is trivially copyable, a multiple of 4 bytes, default-constructs to the neutral
// element and has `merge(const Acc& other)`. The order of merging is fixed by the thread numbers
// alone, and every thread gets the same bits. All threads that hold the value must call.
#pragma once

#include "common/scalar.h"
#include "common/simt.h"

namespace kd {

constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
struct SumOf {
  T value;
  KD_HOST_DEVICE SumOf(T v = T(0)) : value(v) {}
  KD_HOST_DEVICE void merge(const SumOf& other) { value += other.value; }
};

// NaN: see kd::max. A maximum that must keep NaN is found by the sum beside it.
template <class T>
struct MaxOf {
  T value;
  KD_HOST_DEVICE MaxOf(T v = T(-kInfinity)) : value(v) {}
  KD_HOST_DEVICE void merge(const MaxOf& other) { value = max(value, other.value); }
};

template <class T>
struct MinOf {
  T value;
  KD_HOST_DEVICE MinOf(T v = T(kInfinity)) : value(v) {}
  KD_HOST_DEVICE void merge(const MinOf& other) { value = min(value, other.value); }
};

// ---- warp --------------------------------------------------------------------------------------

// Over each group of kWidth neighbouring lanes (1, 2, 4, .. 32); the whole warp must call.
template <int kWidth = 32, class Acc>
KD_DEVICE Acc warp_reduce(Acc acc) {
  static_assert(kWidth >= 1 && kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "a power of two");
  KD_UNROLL
  for (int offset = kWidth / 2; offset > 0; offset /= 2) {
    acc.merge(simt::shuffle_down(kFullMask, acc, offset, kWidth));
  }
  // Only the group's first lane has merged everybody; in the others merge(a, b) and merge(b, a)
  // would differ in the last bit.
  return kWidth > 1 ? simt::shuffle_from(kFullMask, acc, 0, kWidth) : acc;
}

template <int kWidth = 32, class T>
KD_DEVICE T warp_sum(T value) {
  return warp_reduce<kWidth>(SumOf<T>(value)).value;
}
template <int kWidth = 32, class T>
KD_DEVICE T warp_max(T value) {
  return warp_reduce<kWidth>(MaxOf<T>(value)).value;
}
template <int kWidth = 32, class T>
KD_DEVICE T warp_min(T value) {
  return warp_reduce<kWidth>(MinOf<T>(value)).value;
}

// ---- block -------------------------------------------------------------------------------------

// Storage for an accumulator in shared memory, which knows no constructors.
template <class Acc>
struct SharedSlot {
  alignas(alignof(Acc)) unsigned char bytes[sizeof(Acc)];

  KD_DEVICE void put(const Acc& acc) { memcpy(bytes, &acc, sizeof(Acc)); }
  KD_DEVICE Acc get() const {
    Acc acc;
    memcpy(&acc, bytes, sizeof(Acc));
    return acc;
  }
};

// Over the block, whose size is a multiple of 32. Two barriers; may be called again at once.
template <class Acc>
KD_DEVICE Acc block_reduce(Acc acc) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned warps = threads / 32;
  KD_ASSERT(threads % 32 == 0);
  acc = warp_reduce(acc);
  if (warps == 1) return acc;

  using Slots = SharedSlot<Acc>[32];
  KD_SHARED(Slots, slots);
  if (thread % 32 == 0) slots[thread / 32].put(acc);
  __syncthreads();
  // Every warp repeats the last rung, which saves handing the result around.
  acc = thread % 32 < warps ? slots[thread % 32].get() : Acc();
  acc = warp_reduce(acc);
  __syncthreads();  // the slots are free for the next call
  return acc;
}

template <class T>
KD_DEVICE T block_sum(T value) {
  return block_reduce(SumOf<T>(value)).value;
}
template <class T>
KD_DEVICE T block_max(T value) {
  return block_reduce(MaxOf<T>(value)).value;
}
template <class T>
KD_DEVICE T block_min(T value) {
  return block_reduce(MinOf<T>(value)).value;
}

}  // namespace kd
