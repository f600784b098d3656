// Sinkhorn on the GPU, the part that both ways of launching share: a warp solves a row, a thread
// updates a column. One block owns a problem and runs every iteration, or a group of blocks does.
#pragma once

#include "common/reduce.cuh"
#include "common/simt.h"
#include "transport/transport.h"
#include "transport/transport_math.h"

namespace kd::cuda {

// Rows of a large problem are cut into at most kTiles tiles, whatever the device.
constexpr int kTiles = 256;
constexpr int kWarps = 8;  // a block
// Elements of scratch that hold a group's barrier counter.
constexpr int kCounterSize = 4;

// Everything a kernel needs, as plain pointers. Optional ones are null.
template <class T>
struct SinkhornData {
  int64_t batch, rows, columns, kept;
  const T* cost;
  int64_t cost_batch, cost_row;
  const T* a;
  int64_t a_batch;
  const T* b;
  int64_t b_batch;
  const int64_t* student_lengths;
  const int64_t* teacher_lengths;
  T* f;
  T* g;
  int64_t* done;
  T *linear, *row_sums, *column_sums, *plan;
  const T *linear_bar, *rows_bar, *columns_bar, *plan_bar, *f_bar, *g_bar;
  T *grad_cost, *grad_a, *grad_b;
  T* workspace;
  int64_t workspace_size;
  // Numbers
  T k, epsilon, damping_a, damping_b, denominator, log_denominator, tolerance;
  bool damped_a, damped_b, columns_first;
  int iterations;
  int mode;
};

KD_HOST_DEVICE int tile_rows(int64_t rows) {
  const int64_t least = (rows + kTiles - 1) / kTiles;
  return static_cast<int>(least < kWarps ? kWarps : least);
}
KD_HOST_DEVICE int tile_count(int64_t rows) {
  const int size = tile_rows(rows);
  return rows == 0 ? 1 : static_cast<int>((rows + size - 1) / size);
}
KD_HOST_DEVICE int column_blocks(int64_t columns) {
  return columns == 0 ? 1 : static_cast<int>((columns + 32 * kWarps - 1) / (32 * kWarps));
}

// One problem of the batch: sizes, arrays, scratch.
template <class T>
struct DeviceProblem {
  const SinkhornData<T>& data;
  int64_t index;
  int n, m;
  bool bad;  // lengths that no tensor has
  const T* cost;
  const T *a, *b;
  T uniform_a, uniform_b;
  // Scratch: forward and backward use the same places.
  T *log_v, *w, *q, *r, *w_sum;           // (m)
  T *log_u, *alpha, *z_sum, *row_linear;  // (n)
  T* errors;                              // (column_blocks)
  T* partial;                             // (tiles, m)
  T* sums;                                // (tiles, m), backward only
  unsigned* counter;                      // of a group's barrier

  KD_DEVICE DeviceProblem(const SinkhornData<T>& data, int64_t index) : data(data), index(index) {
    int64_t rows = data.rows, columns = data.columns;
    if (data.student_lengths != nullptr) rows = data.student_lengths[index];
    if (data.teacher_lengths != nullptr) columns = data.teacher_lengths[index];
    bad = rows < 0 || rows > data.rows || columns < 0 || columns > data.columns;
    n = bad ? 0 : static_cast<int>(rows);
    m = bad ? 0 : static_cast<int>(columns);
    cost = data.cost + index * data.cost_batch;
    a = data.a != nullptr ? data.a + index * data.a_batch : nullptr;
    b = data.b != nullptr ? data.b + index * data.b_batch : nullptr;
    uniform_a = T(1) / static_cast<T>(n);
    uniform_b = T(1) / static_cast<T>(m);
    T* scratch = data.workspace + index * data.workspace_size;
    const auto take = [&](int64_t count) {
      T* out = scratch;
      scratch += count;
      return out;
    };
    log_v = take(data.columns);
    w = take(data.columns);
    q = take(data.columns);
    r = take(data.columns);
    w_sum = take(data.columns);
    log_u = take(data.rows);
    alpha = take(data.rows);
    z_sum = take(data.rows);
    row_linear = take(data.rows);
    errors = take(column_blocks(data.columns));
    partial = take(data.columns * tile_count(data.rows));
    sums = take(data.columns * tile_count(data.rows));
    counter = reinterpret_cast<unsigned*>(take(kCounterSize));
  }

  KD_DEVICE bool empty() const { return n == 0 || m == 0; }
  KD_DEVICE T mass_a(int i) const { return a != nullptr ? a[i] : uniform_a; }
  KD_DEVICE T mass_b(int j) const { return b != nullptr ? b[j] : uniform_b; }
  KD_DEVICE T* f_at(int t) const {
    return data.f + ((data.kept > 1 ? t : 0) * data.batch + index) * data.rows;
  }
  KD_DEVICE T* g_at(int t) const {
    return data.g + ((data.kept > 1 ? t : 0) * data.batch + index) * data.columns;
  }
  KD_DEVICE T* of_rows(T* base) const {
    return base != nullptr ? base + index * data.rows : nullptr;
  }
  KD_DEVICE const T* of_rows(const T* base) const {
    return base != nullptr ? base + index * data.rows : nullptr;
  }
  KD_DEVICE T* of_columns(T* base) const {
    return base != nullptr ? base + index * data.columns : nullptr;
  }
  KD_DEVICE const T* of_columns(const T* base) const {
    return base != nullptr ? base + index * data.columns : nullptr;
  }
  KD_DEVICE T* row_of(T* base, int i) const {
    return base != nullptr ? base + (index * data.rows + i) * data.columns : nullptr;
  }
  KD_DEVICE const T* row_of(const T* base, int i) const {
    return base != nullptr ? base + (index * data.rows + i) * data.columns : nullptr;
  }
};

// The lane's share of a row: columns lane, lane + 32, ... Up to 32 kCols columns stay in registers;
// kCols = 0 makes the exponentials again when they are needed a second time.
template <class T, int kCols, class Make>
struct LaneRow {
  Make make;
  int m, lane;
  T kept[kCols > 0 ? kCols : 1];

  KD_DEVICE LaneRow(const Make& make, int m, int lane) : make(make), m(m), lane(lane) {}
  // Visits (column, value), making the values; the sum of what fn returns, over the warp.
  template <class Fn>
  KD_DEVICE T first(const Fn& fn) {
    T sum = T(0);
    if constexpr (kCols > 0) {
      KD_UNROLL
      for (int c = 0; c < kCols; ++c) {
        const int j = lane + 32 * c;
        kept[c] = T(0);
        if (j < m) {
          kept[c] = make(j);
          sum += fn(j, kept[c]);
        }
      }
    } else {
      for (int j = lane; j < m; j += 32) sum += fn(j, make(j));
    }
    return warp_sum(sum);
  }
  template <class Fn>
  KD_DEVICE void again(const Fn& fn) {
    if constexpr (kCols > 0) {
      KD_UNROLL
      for (int c = 0; c < kCols; ++c) {
        const int j = lane + 32 * c;
        if (j < m) fn(j, kept[c]);
      }
    } else {
      for (int j = lane; j < m; j += 32) fn(j, make(j));
    }
  }
};

// What one forward sweep does; see ForwardSweep on the CPU.
template <class T>
struct Sweep {
  const T* f_in;
  T* f_out;
  bool solve, has_v, report;
};

template <class T>
struct ForwardExponent {
  const T* cost;
  const T* log_v;  // null: v is one
  T k, base;
  KD_DEVICE T exponent(int j) const {
    return log_v != nullptr ? fma(-k, cost[j], log_v[j]) : -k * cost[j];
  }
  KD_DEVICE T operator()(int j) const { return exp2(exponent(j) + base); }
};

// Row i by one warp; adds it to the warp's column sums.
template <int kCols, class T>
KD_DEVICE void forward_row(const DeviceProblem<T>& p, const Sweep<T>& s, int i, int lane,
                           T* slice) {
  const SinkhornData<T>& d = p.data;
  const T a = p.mass_a(i);
  using Make = ForwardExponent<T>;
  Make make{p.cost + i * d.cost_row, s.has_v ? p.log_v : nullptr, d.k, T(0)};
  if (s.f_in != nullptr) make.base = s.f_in[i];
  LaneRow<T, kCols, Make> row(make, p.m, lane);
  const auto value = [](int, T e) { return e; };
  T factor;
  if (!s.solve) {
    row.first(value);
    factor = s.f_in != nullptr ? a : T(a != T(0));
  } else {
    T sum = s.f_in != nullptr ? row.first(value) : T(0);
    if (!(sum > T(kSmallSum) && sum < T(kLargeSum))) {
      T top = T(-kInfinity);
      for (int j = lane; j < p.m; j += 32) top = max(make.exponent(j), top);
      top = warp_max(top);
      row.make.base = top == T(-kInfinity) ? T(0) : -top;
      sum = row.first(value);
    }
    const T base = row.make.base;
    const bool idle = a == T(0) && sum == T(0);
    T f = base - log2(sum);
    if (d.damped_a) f = potential(-f, d.log_denominator, d.damping_a);
    if (idle && !(d.log_denominator > T(-kInfinity))) f = T(0);
    factor = idle ? T(0) : d.damped_a ? a * exp2(f - base) : a / sum;
    if (lane == 0) s.f_out[i] = f;
  }
  row.again([&](int j, T e) { slice[j] += factor * e; });
  if (!s.report) return;
  T linear = T(0), sum = T(0);
  T* plan = p.row_of(d.plan, i);
  row.again([&](int j, T e) {
    const T mass = factor * e;
    sum += mass;
    // An infinite cost carries no mass and costs nothing.
    if (mass != T(0)) linear += mass * make.cost[j];
    if (plan != nullptr) plan[j] = mass;
  });
  linear = warp_sum(linear);
  sum = warp_sum(sum);
  if (lane == 0) {
    p.row_linear[i] = linear;
    if (d.row_sums != nullptr) p.of_rows(d.row_sums)[i] = sum;
  }
}

// Rows [begin, end) by the block's warps; then the column sums over the warps, in order, to `out`.
// The backward has two sums a column, in kSets slices of every warp: the second goes to `second`.
template <int kCols, int kSets = 1, class T, class Row>
KD_DEVICE void block_rows(const DeviceProblem<T>& p, int begin, int end, T* slices, T* out,
                          const Row& row, T* second = nullptr) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int width = kSets * p.m;
  T* slice = slices + warp * width;
  for (int j = lane; j < width; j += 32) slice[j] = T(0);
  for (int i = begin + warp; i < end; i += warps) row(i, lane, slice);
  __syncthreads();
  for (int j = threadIdx.x; j < width; j += blockDim.x) {
    T sum = slices[j];
    for (int other = 1; other < warps; ++other) sum += slices[other * width + j];
    if (j < p.m) {
      out[j] = sum;
    } else {
      second[j - p.m] = sum;
    }
  }
  __syncthreads();
}

// log2 of (K' u)_j relative to its largest term: for sums that have underflowed.
template <class T>
KD_DEVICE T column_log_sum(const DeviceProblem<T>& p, const T* f, int j) {
  const SinkhornData<T>& d = p.data;
  const auto term = [&](int i) {
    const T a = p.mass_a(i);
    const T log_u = f != nullptr ? f[i] + log2(a) : (a == T(0) ? T(-kInfinity) : T(0));
    return fma(-d.k, p.cost[i * d.cost_row + j], log_u);
  };
  T top = T(-kInfinity);
  for (int i = 0; i < p.n; ++i) top = max(term(i), top);
  if (top == T(-kInfinity)) top = T(0);
  T sum = T(0);
  for (int i = 0; i < p.n; ++i) sum += exp2(term(i) - top);
  return log2(sum) + top;
}

// Column j from the tiles' sums; returns the change of its sum (the error).
template <class T>
KD_DEVICE T update_column(const DeviceProblem<T>& p, const T* f, bool has_v, int tiles, int j,
                          T* g_out) {
  const SinkhornData<T>& d = p.data;
  T sum = p.partial[j];
  for (int tile = 1; tile < tiles; ++tile) sum += p.partial[static_cast<int64_t>(tile) * p.m + j];
  const T log_v = has_v ? p.log_v[j] : T(0);
  const T log_b = log2(p.mass_b(j));
  T log_sum = log2(sum) - log_v;
  if (!(sum > T(kSmallSum) && sum < T(kLargeSum))) log_sum = column_log_sum(p, f, j);
  T g = d.damped_b ? potential(log_sum, d.log_denominator, d.damping_b) : -log_sum;
  if (log_sum == T(-kInfinity) && log_b == T(-kInfinity)) g = T(0);
  g_out[j] = g;
  p.log_v[j] = log_b + g;
  if (log_b == T(-kInfinity)) return T(0);
  return abs(exp2(log_b + g + log_sum) - exp2(log_v + log_sum));
}

// Which rows a sweep of iteration t solves, and from what; see sinkhorn_host.cpp.
template <class T>
KD_DEVICE Sweep<T> sweep_of(const DeviceProblem<T>& p, int t) {
  Sweep<T> s{nullptr, nullptr, true, true, false};
  if (p.data.columns_first) {
    if (t > 1) s.f_in = p.f_at(t - 2);
    if (t > 0) s.f_out = p.f_at(t - 1);
    s.solve = s.has_v = t > 0;
  } else {
    if (t > 0) s.f_in = p.f_at(t - 1);
    s.f_out = p.f_at(t);
  }
  return s;
}
// The last sweep, after `done` iterations: reports, and solves the rows of order "columns".
template <class T>
KD_DEVICE Sweep<T> last_sweep_of(const DeviceProblem<T>& p, int done) {
  Sweep<T> s{nullptr, nullptr, p.data.columns_first, true, true};
  if (p.data.columns_first) {
    if (done > 1) s.f_in = p.f_at(done - 2);
    s.f_out = p.f_at(done - 1);
  } else {
    s.f_in = p.f_at(done - 1);
  }
  return s;
}

// v_0: one, zero where b is zero.
template <class T>
KD_DEVICE void start_column(const DeviceProblem<T>& p, int j) {
  p.log_v[j] = p.mass_b(j) == T(0) ? T(-kInfinity) : T(0);
}

// Sums over the problem, and zeros beyond it: one block, after the last sweep.
template <class T>
KD_DEVICE void finish_forward(const DeviceProblem<T>& p, int done, int tiles) {
  const SinkhornData<T>& d = p.data;
  const int threads = blockDim.x, thread = threadIdx.x;
  const bool live = !p.empty();
  double sum = 0;
  if (live) {
    for (int i = thread; i < p.n; i += threads) sum += static_cast<double>(p.row_linear[i]);
  }
  sum = block_sum(sum);
  const T nothing = p.bad ? static_cast<T>(NAN) : T(0);
  if (thread == 0) {
    if (d.linear != nullptr) d.linear[p.index] = live ? static_cast<T>(sum) : nothing;
    d.done[p.index] = live ? done : 0;
  }
  T* columns = p.of_columns(d.column_sums);
  T* rows = p.of_rows(d.row_sums);
  for (int64_t j = thread; columns != nullptr && j < d.columns; j += threads) {
    T total = T(0);
    for (int tile = 0; live && j < p.m && tile < tiles; ++tile) {
      total += p.partial[static_cast<int64_t>(tile) * p.m + j];
    }
    columns[j] = total;
  }
  for (int64_t i = (live ? p.n : 0) + thread; rows != nullptr && i < d.rows; i += threads) {
    rows[i] = nothing;
  }
  for (int64_t t = 0; t < d.kept; ++t) {
    const bool ran = live && (t < done || d.kept == 1);
    for (int64_t i = (ran ? p.n : 0) + thread; i < d.rows; i += threads) p.f_at(t)[i] = nothing;
    for (int64_t j = (ran ? p.m : 0) + thread; j < d.columns; j += threads) p.g_at(t)[j] = nothing;
  }
  if (d.plan == nullptr) return;
  for (int64_t i = 0; i < d.rows; ++i) {
    T* plan = p.row_of(d.plan, static_cast<int>(i));
    for (int64_t j = (live && i < p.n ? p.m : 0) + thread; j < d.columns; j += threads) {
      plan[j] = nothing;
    }
  }
}

}  // namespace kd::cuda
