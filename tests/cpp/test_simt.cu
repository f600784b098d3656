// The CUDA vocabulary: what kernels may rely on, and in the emulator what it must catch.
#include <thread>

#include "check.h"
#include "common/group_barrier.cuh"
#include "common/simt.h"

namespace {

using test::Buffer;
using test::for_each_order;
using test::run;

constexpr unsigned kFull = 0xffffffffu;

// ---- barriers and shared memory ----------------------------------------------------------------

// Each thread reads what the thread `distance` further wrote.
template <bool kBarrier>
__global__ void rotate_kernel(int* out, int distance) {
  KD_SHARED(int[1024], tile);
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = tile[(threadIdx.x + distance) % blockDim.x];
}

int wrong_rotations(void (*kernel)(int*, int), int threads, int distance) {
  Buffer<int> out(threads);
  run(kernel, 1, threads, 0, out.data(), distance);
  int wrong = 0;
  for (int t = 0; t < threads; ++t) wrong += out[t] != (t + distance) % threads;
  return wrong;
}

TEST(barrier_orders_writes_before_reads) {
  for_each_order([] {
    for (int threads : {1, 31, 32, 33, 256, 1024}) {  // less than, equal to, and many warps
      CHECK(wrong_rotations(rotate_kernel<true>, threads, 1) == 0);
      CHECK(wrong_rotations(rotate_kernel<true>, threads, threads / 2) == 0);
    }
  });
}

__global__ void dynamic_kernel(float* out, int n) {
  KD_DYN_SHARED(float, values);
  KD_SHARED(float, total);
  for (int i = threadIdx.x; i < n; i += blockDim.x) values[i] = 1.0f;
  if (threadIdx.x == 0) total = 0.0f;
  __syncthreads();
  if (threadIdx.x == 5) {
    for (int i = 0; i < n; ++i) total += values[i];
  }
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

TEST(dynamic_shared_memory) {
  for_each_order([] {
    Buffer<float> out(3 * 64);
    run(dynamic_kernel, 3, 64, 1000 * sizeof(float), out.data(), 1000);
    for (float value : {out[0], out[63], out[191]}) CHECK(value == 1000.0f);
  });
}

__global__ void votes_kernel(int* out, int threshold) {
  const int yes = static_cast<int>(threadIdx.x) < threshold;
  const int count = __syncthreads_count(yes);
  const int any = __syncthreads_or(yes);
  const int all = __syncthreads_and(yes);
  out[threadIdx.x] = count * 4 + (any != 0) * 2 + (all != 0);
}

TEST(barriers_with_votes) {
  for_each_order([] {
    Buffer<int> out(96);
    for (int threshold : {0, 1, 40, 96}) {
      run(votes_kernel, 1, 96, 0, out.data(), threshold);
      const int expected = threshold * 4 + (threshold > 0) * 2 + (threshold == 96);
      for (int t = 0; t < 96; ++t) CHECK(out[t] == expected);
    }
  });
}

// Warp 0 makes, warp 1 uses: a pair of named barriers as a hand-over, warp 2 takes no part.
__global__ void named_barrier_kernel(int* out) {
  KD_SHARED(int[32], box);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int round = 0; round < 4; ++round) {
    if (warp == 0) {
      if (round > 0) kd::named_barrier_sync(2, 64);  // the box is free
      box[lane] = round * 100 + lane;
      kd::named_barrier_arrive(1, 64);
    } else if (warp == 1) {
      kd::named_barrier_sync(1, 64);
      out[round * 32 + lane] = box[31 - lane];
      if (round < 3) kd::named_barrier_arrive(2, 64);
    }
  }
}

TEST(named_barriers) {
  for_each_order([] {
    Buffer<int> out(128);
    run(named_barrier_kernel, 1, 96, 0, out.data());
    for (int i = 0; i < 128; ++i) CHECK(out[i] == i / 32 * 100 + 31 - i % 32);
  });
}

__global__ void early_return_kernel(int* out) {
  KD_SHARED(int[64], tile);
  if (threadIdx.x >= 40) return;  // the others' barrier does not wait for these
  tile[threadIdx.x] = 7;
  __syncthreads();
  int sum = tile[39 - threadIdx.x];
  if (threadIdx.x < 32) sum = __shfl_sync(kFull, sum, 3);
  out[threadIdx.x] = sum;
}

TEST(threads_may_return_early) {
  for_each_order([] {
    Buffer<int> out(40);
    run(early_return_kernel, 1, 64, 0, out.data());
    for (int t = 0; t < 40; ++t) CHECK(out[t] == 7);
  });
}

__global__ void index_kernel(int* out) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  out[block * 24 + thread] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
                       10000 * blockIdx.y + 100000 * blockIdx.z);
}

TEST(three_dimensional_indices) {
  for_each_order([] {
    Buffer<int> out(12 * 24);
    run(index_kernel, dim3(2, 3, 2), dim3(4, 3, 2), 0, out.data());
    for (int i = 0; i < 12 * 24; ++i) {
      const int t = i % 24, b = i / 24;
      CHECK(out[i] == t % 4 + 10 * (t / 4 % 3) + 100 * (t / 12) + 1000 * (b % 2) +
                          10000 * (b / 2 % 3) + 100000 * (b / 6));
    }
  });
}

// ---- warp operations ---------------------------------------------------------------------------

__global__ void shuffle_kernel(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + threadIdx.x * 8;
  mine[0] = __shfl_sync(kFull, lane, 5);
  mine[1] = __shfl_xor_sync(kFull, lane, 9);
  mine[2] = __shfl_up_sync(kFull, lane, 3);
  mine[3] = __shfl_down_sync(kFull, lane, 3);
  mine[4] = __shfl_sync(kFull, lane, 5, 8);
  mine[5] = __shfl_up_sync(kFull, lane, 3, 8);
  mine[6] = __shfl_down_sync(kFull, lane, 3, 8);
  mine[7] = static_cast<int>(__shfl_xor_sync(kFull, static_cast<double>(lane), 4, 8));
}

TEST(shuffles) {
  for_each_order([] {
    Buffer<int> out(64 * 8);
    run(shuffle_kernel, 1, 64, 0, out.data());
    for (int t = 0; t < 64; ++t) {
      const int lane = t % 32, in_group = lane % 8, group = lane - in_group;
      const int* mine = out.data() + t * 8;
      CHECK(mine[0] == 5);
      CHECK(mine[1] == (lane ^ 9));
      CHECK(mine[2] == (lane >= 3 ? lane - 3 : lane));
      CHECK(mine[3] == (lane < 29 ? lane + 3 : lane));
      CHECK(mine[4] == group + 5);
      CHECK(mine[5] == (in_group >= 3 ? lane - 3 : lane));
      CHECK(mine[6] == (in_group < 5 ? lane + 3 : lane));
      CHECK(mine[7] == (lane ^ 4));
    }
  });
}

struct Triple {
  float a;
  double b;
  int c;
  int d;
};

__global__ void struct_shuffle_kernel(Triple* out) {
  const int lane = threadIdx.x;
  const Triple mine{lane * 0.5f, lane * 0.25, lane, -lane};
  out[lane] = simt::shuffle_xor(kFull, mine, 1);
  out[32 + lane] = simt::shuffle_down(kFull, mine, 2, 16);
  out[64 + lane] = simt::shuffle_from(kFull, mine, 3, 4);
}

TEST(struct_shuffles) {
  for_each_order([] {
    Buffer<Triple> out(96);
    run(struct_shuffle_kernel, 1, 32, 0, out.data());
    for (int i = 0; i < 96; ++i) {
      const int lane = i % 32;
      const int from = i < 32 ? lane ^ 1 : i < 64 ? (lane % 16 < 14 ? lane + 2 : lane) : lane | 3;
      CHECK(out[i].a == from * 0.5f && out[i].b == from * 0.25 && out[i].c == from &&
            out[i].d == -from);
    }
  });
}

__global__ void vote_kernel(unsigned* out) {
  const int lane = threadIdx.x;
  unsigned* mine = out + lane * 6;
  mine[0] = __ballot_sync(kFull, lane % 3 == 0);
  mine[1] = __any_sync(kFull, lane == 7) * 2 + __any_sync(kFull, lane == 70);
  mine[2] = __all_sync(kFull, lane < 32) * 2 + __all_sync(kFull, lane < 31);
  mine[3] = __match_any_sync(kFull, lane / 5);
  // Two halves of the warp meet separately.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  mine[4] = __ballot_sync(half, lane % 2);
  __syncwarp(half);
  mine[5] = lane < 16 ? __popc(__ballot_sync(half, 1)) : 0;
}

TEST(votes_and_partial_masks) {
  for_each_order([] {
    Buffer<unsigned> out(32 * 6);
    run(vote_kernel, 1, 32, 0, out.data());
    for (int lane = 0; lane < 32; ++lane) {
      const unsigned* mine = out.data() + lane * 6;
      unsigned thirds = 0, same = 0;
      for (int i = 0; i < 32; ++i) {
        thirds |= (i % 3 == 0 ? 1u : 0u) << i;
        same |= (i / 5 == lane / 5 ? 1u : 0u) << i;
      }
      CHECK(mine[0] == thirds);
      CHECK(mine[1] == 2 && mine[2] == 2);
      CHECK(mine[3] == same);
      CHECK(mine[4] == (lane < 16 ? 0x0000aaaau : 0xaaaa0000u));
      CHECK(mine[5] == (lane < 16 ? 16u : 0u));
    }
  });
}

__global__ void warp_reduce_kernel(int* out) {
  const int lane = threadIdx.x;
  const unsigned u = static_cast<unsigned>(lane);
  out[0 * 32 + lane] = __reduce_add_sync(kFull, lane - 16);
  out[1 * 32 + lane] = __reduce_min_sync(kFull, lane - 16);
  out[2 * 32 + lane] = __reduce_max_sync(kFull, lane - 16);
  out[3 * 32 + lane] = static_cast<int>(__reduce_and_sync(kFull, u | 64u));
  out[4 * 32 + lane] = static_cast<int>(__reduce_or_sync(kFull, u));
  out[5 * 32 + lane] = static_cast<int>(__reduce_xor_sync(kFull, u + 1));
}

TEST(integer_warp_reductions) {
  for_each_order([] {
    Buffer<int> out(6 * 32);
    run(warp_reduce_kernel, 1, 32, 0, out.data());
    for (int lane = 0; lane < 32; ++lane) {
      CHECK(out[lane] == -16 && out[32 + lane] == -16 && out[64 + lane] == 15);
      CHECK(out[96 + lane] == 64 && out[128 + lane] == 31 && out[160 + lane] == 32);
    }
  });
}

// ---- atomics -----------------------------------------------------------------------------------

struct Counters {
  int i;
  unsigned u;
  unsigned long long l;
  float f;
  double d;
  int lowest, highest;
  unsigned bits, owner, tickets;
};

__global__ void atomics_kernel(Counters* c) {
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&c->i, -1);
  atomicAdd(&c->u, 2u);
  atomicAdd(&c->l, 1ull << 32);
  atomicAdd(&c->f, 0.5f);
  atomicAdd(&c->d, 0.25);
  atomicMin(&c->lowest, t - 7);
  atomicMax(&c->highest, t);
  atomicOr(&c->bits, 1u << (t % 32));
  if (atomicCAS(&c->owner, 0u, 1u + t) == 0u) atomicExch(&c->tickets, 99u);
}

TEST(atomics) {
  for_each_order([] {
    Buffer<Counters> c(1);
    std::memset(c.data(), 0, sizeof(Counters));
    run(atomics_kernel, 3, 64, 0, c.data());
    CHECK(c[0].i == -192 && c[0].u == 384 && c[0].l == 192ull << 32);
    CHECK(c[0].f == 96.0f && c[0].d == 48.0);
    CHECK(c[0].lowest == -7 && c[0].highest == 191 && c[0].bits == kFull);
    CHECK(c[0].owner >= 1 && c[0].owner <= 192 && c[0].tickets == 99);
  });
}

// The last block to finish adds up what all blocks wrote.
__global__ void last_block_kernel(float* partial, unsigned* done, float* out) {
  KD_SHARED(int, last);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x);
    __threadfence();
    last = atomicAdd(done, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += static_cast<volatile float*>(partial)[b];
    *out = sum;
  }
}

TEST(last_block_pattern) {
  for_each_order([] {
    Buffer<float> partial(50, NAN), out(1);
    Buffer<unsigned> done(1);
    run(last_block_kernel, 50, 32, 0, partial.data(), done.data(), out.data());
    CHECK(out[0] == 49 * 50 / 2);
  });
}

// ---- cooperative launches ----------------------------------------------------------------------

// In every round each block of a group (blockIdx.x) writes its number and adds up everybody's;
// group y ends after `rounds` - y rounds.
template <bool kBarrier>
__global__ void exchange_kernel(unsigned* counters, int* boxes, int* out, int rounds) {
  kd::GroupBarrier barrier(counters + blockIdx.y, gridDim.x);
  const int blocks = gridDim.x, group = blockIdx.y;
  int* const box = boxes + group * blocks;
  for (int round = 0; round < rounds - group; ++round) {
    if (threadIdx.x == 40) box[blockIdx.x] = round * 10 + static_cast<int>(blockIdx.x);
    if (kBarrier) barrier.wait();
    int sum = 0;
    for (int i = 0; i < blocks; ++i) sum += box[i];
    if (threadIdx.x == 3) out[(group * rounds + round) * blocks + blockIdx.x] = sum;
    barrier.wait();  // nobody writes before all have read
  }
}

int wrong_exchanges(void (*kernel)(unsigned*, int*, int*, int)) {
  constexpr int kBlocks = 3, kGroups = 2, kRounds = 4;
  Buffer<unsigned> counters(kGroups);
  Buffer<int> boxes(kBlocks * kGroups), out(kBlocks * kGroups * kRounds);
  simt::launch_cooperative(
      simt::LaunchInfo{"exchange", dim3(kBlocks, kGroups), dim3(64), 0, nullptr, ""}, kernel,
      counters.data(), boxes.data(), out.data(), kRounds);
#if defined(__CUDACC__)
  kd::check_cuda(cudaDeviceSynchronize(), "exchange");
#endif
  int wrong = 0;
  for (int group = 0; group < kGroups; ++group) {
    for (int round = 0; round < kRounds; ++round) {
      const int expected = round < kRounds - group ? round * 10 * kBlocks + 3 : 0;
      for (int block = 0; block < kBlocks; ++block) {
        wrong += out[(group * kRounds + round) * kBlocks + block] != expected;
      }
    }
  }
  return wrong;
}

TEST(groups_of_blocks_meet) {
  for_each_order([] { CHECK(wrong_exchanges(exchange_kernel<true>) == 0); });
}

#if !defined(__CUDACC__)
// ---- what only the emulator promises -----------------------------------------------------------

TEST(missing_group_barrier_is_seen_in_every_order) {
  for_each_order([] { CHECK(wrong_exchanges(exchange_kernel<false>) > 0); });
}

// Block 1 never comes.
__global__ void absent_block_kernel(unsigned* counter) {
  kd::GroupBarrier barrier(counter, gridDim.x);
  if (blockIdx.x != 1) barrier.wait();
}

TEST(cooperative_deadlocks_and_sizes_are_reported) {
  for_each_order([] {
    Buffer<unsigned> counter(1);
    const auto start = [&](unsigned blocks) {
      counter[0] = 0;
      simt::launch_cooperative(
          simt::LaunchInfo{"absent_block", dim3(blocks), dim3(32), 0, nullptr, ""},
          absent_block_kernel, counter.data());
    };
    CHECK_THROWS(start(3), "deadlock");
    CHECK_THROWS(start(3), "group_barrier.cuh");
    CHECK_THROWS(start(1000), "1000 blocks");
    CHECK(wrong_exchanges(exchange_kernel<true>) == 0);  // the next launch is not disturbed
  });
}

TEST(missing_barrier_is_seen_in_some_order) {
  // The reader of the next thread's value: wrong in ascending order, right in descending order;
  // the reader of an earlier one the other way round. Every distance must be caught somewhere.
  for (int distance : {1, 32, 100, 255}) {
    int caught = 0;
    for_each_order([&] { caught += wrong_rotations(rotate_kernel<false>, 256, distance) > 0; });
    CHECK(caught >= 2);
  }
}

// Forgets the barrier between the warps' results and their sum.
__global__ void broken_reduction_kernel(float* out) {
  KD_SHARED(float[32], partial);
  float sum = 1;
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(kFull, sum, o);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
  out[threadIdx.x] = total;
}

TEST(missing_barrier_between_warps_is_seen_in_every_order) {
  for_each_order([] {
    Buffer<float> out(256);
    run(broken_reduction_kernel, 1, 256, 0, out.data());
    bool poisoned = false;
    for (int t = 0; t < 256; ++t) poisoned |= std::isnan(out[t]);
    CHECK(poisoned);
  });
}

__global__ void unwritten_kernel(float* out) {
  KD_SHARED(float[8], fixed);
  KD_DYN_SHARED(float, dynamic);
  out[blockIdx.x * 2] = fixed[3];
  out[blockIdx.x * 2 + 1] = dynamic[3];
  __syncthreads();
  fixed[3] = dynamic[3] = 1.0f;  // must not be seen by the next block
}

TEST(shared_memory_is_poisoned_in_every_block) {
  for_each_order([] {
    Buffer<float> out(6);
    run(unwritten_kernel, 3, 1, 64, out.data());
    for (int i = 0; i < 6; ++i) CHECK(std::isnan(out[i]));
  });
}

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void stuck_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    kd::named_barrier_sync(1, 64);
  }
}

__global__ void stuck_warp_kernel() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __ballot_sync(0xffff0000u, 1);
    __syncthreads();
  }
}

TEST(deadlocks_are_reported) {
  for_each_order([] {
    CHECK_THROWS(run(divergent_barrier_kernel, 1, 64, 0), "divergent barrier");
    CHECK_THROWS(run(stuck_kernel, 2, 64, 0), "kernel test_kernel, block (");
    CHECK_THROWS(run(stuck_kernel, 1, 64, 0), "deadlock, 64 of 64 threads are left");
    CHECK_THROWS(run(stuck_kernel, 1, 64, 0), "40 wait at __syncthreads (test_simt.cu:");
    CHECK_THROWS(run(stuck_kernel, 1, 64, 0), "24 wait at named_barrier_sync (test_simt.cu:");
    CHECK_THROWS(run(stuck_kernel, 1, 64, 0), "N=1");
    CHECK_THROWS(run(stuck_warp_kernel, 1, 32, 0), "16 wait at __syncwarp (test_simt.cu:");
    CHECK_THROWS(run(stuck_warp_kernel, 1, 32, 0), "with mask 0xffffffff");
    // The engine is usable afterwards.
    CHECK(wrong_rotations(rotate_kernel<true>, 64, 1) == 0);
  });
}

__global__ void wrong_mask_kernel() {
  __shfl_sync(0x0000ffffu, 1, 0);
}

__global__ void mixed_operations_kernel(int* out) {
  // One mask, two different operations: they never meet.
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_sync(kFull, 1, 0) : __any_sync(kFull, 1);
}

__global__ void outsider_kernel(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1.0f, 8);
}

TEST(warp_masks_are_checked) {
  for_each_order([] {
    Buffer<int> out(32);
    CHECK_THROWS(run(wrong_mask_kernel, 1, 32, 0), "not in its own mask");
    CHECK_THROWS(run(mixed_operations_kernel, 1, 32, 0, out.data()), "deadlock");
    Buffer<float> values(16);
    run(outsider_kernel, 1, 32, 0, values.data());
    for (int lane = 0; lane < 16; ++lane) CHECK(std::isnan(values[lane]) == (lane >= 8));
  });
}

__global__ void assert_kernel(int n) {
  KD_ASSERT(static_cast<int>(threadIdx.x) < n);
}
__global__ void throwing_kernel() {
  throw 1;
}
__global__ void nothing_kernel() {}
__global__ void nested_kernel() {
  run(nothing_kernel, 1, 1, 0);
}
template <int kFloats>
__global__ void large_kernel(float* out) {
  KD_SHARED(float[kFloats], tile);
  tile[0] = 1;
  *out = tile[0];
}

TEST(errors_name_kernel_block_and_thread) {
  CHECK_THROWS(run(assert_kernel, 2, 64, 0, 63), "kernel test_kernel, block (");
  CHECK_THROWS(run(assert_kernel, 1, 64, 0, 63),
               "thread (63,0,0): KD_ASSERT(static_cast<int>(threadIdx.x) < n) failed");
  CHECK_THROWS(run(throwing_kernel, 1, 1, 0), "no std::exception");
  CHECK_THROWS(run(nested_kernel, 1, 1, 0), "launched from inside a kernel");
  CHECK_THROWS(__syncthreads(), "outside of a kernel");
}

TEST(launch_limits) {
  CHECK_THROWS(run(nothing_kernel, 1, 1025, 0), "1 to 1024 threads");
  CHECK_THROWS(run(nothing_kernel, 1, dim3(1, 1, 65), 0), "at most 64 in z");
  CHECK_THROWS(run(nothing_kernel, 1, 0, 0), "1 to 1024 threads");
  CHECK_THROWS(run(nothing_kernel, 0, 1, 0), "the grid is empty");
  CHECK_THROWS(run(nothing_kernel, dim3(1, 65536), 1, 0), "65535");
  CHECK_THROWS(run(nothing_kernel, 1, 1, (99 << 10) + 1), "dynamic shared memory");
  Buffer<float> out(1);
  run(large_kernel<12 * 1024>, 1, 1, 0, out.data());
  CHECK_THROWS(run(large_kernel<12 * 1024 + 1>, 1, 1, 0, out.data()), "over 48 KiB");
  CHECK_THROWS(run(large_kernel<12 * 1024>, 1, 1, 60 << 10, out.data()), "together");
  simt::set_shared_limit(227 << 10);
  run(large_kernel<12 * 1024>, 1, 1, 60 << 10, out.data());
  simt::set_shared_limit(99 << 10);
}

TEST(orders_are_parsed) {
  using simt::Order;
  using simt::host::parse_schedule;
  CHECK(parse_schedule(nullptr).order == Order::kAscending);
  CHECK(parse_schedule("descending").order == Order::kDescending);
  CHECK(parse_schedule("shuffle:17").order == Order::kShuffle);
  CHECK(parse_schedule("shuffle:17").seed == 17);
  CHECK(parse_schedule("warp_ahead").order == Order::kWarpAhead);
  CHECK_THROWS(parse_schedule("sideways:3"), "got sideways");
}

__global__ void order_kernel(int* log, int* count) {
  __syncthreads();
  log[(*count)++] = static_cast<int>(threadIdx.x);
}

TEST(orders_differ) {
  std::vector<std::vector<int>> logs;
  for_each_order([&] {
    std::vector<int> log(64);
    int count = 0;
    run(order_kernel, 1, 64, 0, log.data(), &count);
    logs.push_back(log);
  });
  // Ascending, descending and three shuffles; of two warps there are only two warp-ahead orders.
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < i; ++j) CHECK(logs[i] != logs[j]);
  }
  CHECK(logs[0].front() == 0 && logs[0].back() == 63);
  CHECK(logs[1].front() == 63 && logs[1].back() == 0);
}

__global__ void spin_kernel(int* out) {
  KD_SHARED(int, flag);
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 3) flag = 5;
  while (flag == 0) __nanosleep(20);
  out[threadIdx.x] = flag;
}

TEST(nanosleep_lets_others_run) {
  for_each_order([] {
    Buffer<int> out(64);
    run(spin_kernel, 1, 64, 0, out.data());
    for (int t = 0; t < 64; ++t) CHECK(out[t] == 5);
  });
}

TEST(two_host_threads_launch_at_once) {
  int wrong[2] = {};
  const auto work = [&](int who) {
    for (int i = 0; i < 50; ++i) {
      wrong[who] += wrong_rotations(rotate_kernel<true>, 128 + 32 * who, 7 + who);
    }
  };
  std::thread other(work, 1);
  work(0);
  other.join();
  CHECK(wrong[0] == 0 && wrong[1] == 0);
}
#endif  // !__CUDACC__

}  // namespace
