// Threads for CPU kernels: parallel_for over torch's own pool where torch is loaded (one pool a
// process, torch.set_num_threads is honoured), over a small pool of our own otherwise.
//
// The range is cut into contiguous pieces by thread count, so where the cuts fall varies between
// machines. A kernel whose bits must not vary makes each index independent (one row, or one fixed
// block of rows) and sums over indices in a second pass, in order.
//
// Sources compiled per ISA may include this header: no standard library beyond <cstdint>,
// <cstddef>.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/macros.h"

namespace kd {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body(b, e, context) on pieces [b, e) that cover [begin, end) exactly once. No piece but the
// last is shorter than `grain`. Runs serially in the caller when one piece is enough, inside
// another parallel region, or while another thread holds our own pool. The first exception a piece
// throws is rethrown in the caller after all pieces have ended.
void parallel_for_range(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);

// fn(int64_t begin, int64_t end), by reference: it is called from several threads at once.
template <class Fn>
KD_HOST_DEVICE void parallel_for(int64_t begin, int64_t end, int64_t grain, const Fn& fn) {
  parallel_for_range(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<const Fn*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

// Threads a parallel_for from outside any region uses at most: torch's number, or OMP_NUM_THREADS,
// or the CPUs this process may run on. KDK_THREADS (read once) is an upper limit for torch's pool
// and the size of our own; 1 means serial. Bad KDK_THREADS: std::invalid_argument.
int num_threads();

// The same from where the caller stands: 1 inside a parallel region.
int current_threads();

// Overrides KDK_THREADS; 0 returns to it.
void set_num_threads(int threads);

// "torch", "own" or "serial": what the next parallel_for from outside a region runs on.
const char* thread_pool_name();

// The calling thread's scratch buffer: 64-byte aligned, at least `bytes` long, contents undefined.
// It grows with demand, lives as long as the thread and has one user at a time: the next call on
// the same thread hands out the same memory. More than kScratchLimit: std::length_error.
constexpr size_t kScratchLimit = size_t{2} << 20;
float* scratch(size_t bytes);

// A second buffer of the same sort, for a loop that holds it while what it calls uses scratch().
// Without a limit: it is for what grows with a row.
float* block_scratch(size_t bytes);

// Asks for huge pages on the whole 2 MiB blocks inside [data, data + bytes): a large fresh output
// then costs one page fault where 4 KiB pages cost 512. Only a hint.
void advise_huge(void* data, size_t bytes);

}  // namespace kd
