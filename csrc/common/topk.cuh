// Row top-k by one CUDA block, in one read of the row.
//
// Entries above the current k-th best are appended to a buffer in shared memory, in whatever order
// the threads come; when it is well filled the block sorts it and keeps k. The order of
// comes_before() is total, so the result does not depend on who came first.
#pragma once

#include "common/reduce.cuh"
#include "common/topk.h"
#include "common/vec.h"

namespace kd {

// Entries that may wait beyond k before the block sorts.
constexpr int kTopKSlack = 64;

// A tile, which may pass the limit as a whole, must fit behind a buffer that is not yet cut.
constexpr int topk_capacity(int k, int threads, int width) {
  return k + kTopKSlack + threads * width;
}
template <class F>
constexpr size_t topk_shared_bytes(int k, int threads, int width) {
  return static_cast<size_t>(topk_capacity(k, threads, width)) * (sizeof(F) + sizeof(int32_t));
}

// Puts the first `n` entries in order. Bitonic network in the form whose comparators all point the
// same way: entries beyond n would be last and never move, so n need not be a power of two. The
// whole block calls; ends with a barrier.
template <class F>
KD_DEVICE void block_sort(F* values, int32_t* indices, int n) {
  int padded = 1;
  while (padded < n) padded *= 2;
  const auto order = [&](int i, int j) {
    if (j >= n || !comes_before(values[j], indices[j], values[i], indices[i])) return;
    const F value = values[i];
    const int32_t index = indices[i];
    values[i] = values[j];
    indices[i] = indices[j];
    values[j] = value;
    indices[j] = index;
  };
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int size = 2; size <= padded; size *= 2) {
    for (int pair = thread; pair < padded / 2; pair += threads) {
      const int first = pair / (size / 2) * size, offset = pair % (size / 2);
      order(first + offset, first + size - 1 - offset);
    }
    __syncthreads();
    for (int stride = size / 4; stride > 0; stride /= 2) {
      for (int pair = thread; pair < padded / 2; pair += threads) {
        const int i = pair / stride * (2 * stride) + pair % stride;
        order(i, i + stride);
      }
      __syncthreads();
    }
  }
}

// The k entries of `row` (n) that come first, in order, in values[0..k), indices[0..k) (shared
// memory, topk_capacity entries). visit(u, first) sees each chunk of W entries once, by the thread
// that loaded it; entries outside of the row read as -inf. Ends with a barrier.
template <int W, class F, class T, class Visit>
KD_DEVICE void block_topk(const T* row, int64_t n, int k, F* values, int32_t* indices,
                          const Visit& visit) {
  KD_SHARED(int, shared_filled);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) shared_filled = 0;
  __syncthreads();

  const RowChunks<W> chunks(n, row);
  F limit = F(-kInfinity);
  // Every thread makes the same number of rounds, for the barriers.
  for (int64_t tile = 0; tile < chunks.count(); tile += blockDim.x) {
    const int64_t chunk = tile + thread;
    bool pushed = false;
    if (chunk < chunks.count()) {
      F u[W];
      chunks.template load<Access::kStreaming>(row, chunk, F(-kInfinity), u);
      visit(u);
      KD_UNROLL
      for (int i = 0; i < W; ++i) {
        if (u[i] <= limit) continue;
        const int slot = atomicAdd(&shared_filled, 1);
        values[slot] = u[i];
        indices[slot] = static_cast<int32_t>(chunks.begin(chunk) + i);
        pushed = true;
      }
    }
    if (__syncthreads_or(pushed)) {
      const int filled = shared_filled;
      __syncthreads();  // nobody counts on before everybody has read
      if (filled > k + kTopKSlack) {
        block_sort(values, indices, filled);
        limit = limit_of(values[k - 1]);
        if (thread == 0) shared_filled = k;
        __syncthreads();
      }
    }
  }
  int filled = shared_filled;
  block_sort(values, indices, filled);
  // Fewer than k others: the first -inf entries, which then lie within the first 2 k.
  if (thread == 0) {
    for (int64_t i = 0; filled < k && i < n; ++i) {
      const F x = static_cast<F>(to_float(row[i]));
      if (x != F(-kInfinity)) continue;
      values[filled] = x;
      indices[filled++] = static_cast<int32_t>(i);
    }
  }
  __syncthreads();
}

// Moments of a chunk with -inf left out, two-pass in registers.
template <class F, int W>
KD_DEVICE Moments<F> chunk_moments(const F (&u)[W]) {
  F count = F(0), sum = F(0), squares = F(0);
  KD_UNROLL
  for (int i = 0; i < W; ++i) {
    const bool alive = u[i] != F(-kInfinity);
    count += alive ? F(1) : F(0);
    sum += alive ? u[i] : F(0);
  }
  const F mean = count == F(0) ? F(0) : sum / count;
  KD_UNROLL
  for (int i = 0; i < W; ++i) {
    const F d = u[i] != F(-kInfinity) ? u[i] - mean : F(0);
    squares = fma(d, d, squares);
  }
  return {count, mean, squares};
}

}  // namespace kd
