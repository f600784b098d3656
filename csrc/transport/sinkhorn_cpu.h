// What sinkhorn_cpu.cpp (compiled once per ISA) offers to sinkhorn_host.cpp: sweeps over a block of
// rows of one problem, and the vector work between sweeps. T is float or double.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace kd {

// One sweep of the forward over rows: solve them, add them to the column sums, report them.
template <class T>
struct ForwardSweep {
  const T* cost;  // (n, m)
  int64_t row_stride, columns;
  T k;             // log2(e) / epsilon
  const T* log_v;  // (m) log2 v; null: v is one
  const T* a;      // (n); null: uniform_a
  T uniform_a;
  const T* f_in;  // (n) potentials before; null: none yet
  T* f_out;       // (n), where `solve`
  T* base;        // (n) scratch: f_out = base - log2(f_out as left by the sweep), balanced
  bool solve;     // otherwise f_in stays (u is one where f_in is null)
  bool damped;    // damping != 1 or denominator != 0
  T damping, log_denominator;
  bool accumulate;  // column sums of the scaled rows
  // Reports of the last sweep, each or null.
  T* linear;  // (n) row sums of P C
  T* rows;    // (n) row sums of P
  T* plan;    // (n, m)
  int64_t plan_stride;
};

template <class T>
struct ColumnUpdate {
  const T* cost;
  int64_t row_stride, rows, columns;
  T k;
  const T* partial;  // (blocks, m) column sums of every row block
  int64_t blocks;
  const T* log_u;  // (n) log2 u; for columns whose sum has underflowed
  const T* log_b;  // (m)
  T* log_v;        // (m) in: null or before; out: after
  bool has_log_v;  // log_v holds the v of the iteration before (otherwise v was one)
  T* g_out;        // (m)
  bool damped;
  T damping, log_denominator;
  bool want_error;
};

// One sweep of the backward. E_ij = 2^(f_i + g_j - k C_ij), the density of the plan.
template <class T>
struct BackwardSweep {
  enum Stage { kStart, kStep, kApply };
  Stage stage;
  const T* cost;
  int64_t row_stride, columns;
  T k, epsilon;
  const T* f;  // (n); null: zero
  const T* g;  // (m)
  const T* a;  // (n); null: uniform_a
  T uniform_a;
  bool unit_rows;  // the row scaling is the start: one, zero where a is zero
  // kStart: Pbar = linear_bar C + rows_bar_i + columns_bar_j + plan_bar_ij
  const T* b;  // (m); null: uniform_b
  T uniform_b;
  T linear_bar;
  const T* rows_bar;
  const T* columns_bar;
  const T* plan_bar;
  int64_t plan_bar_stride;
  bool envelope;  // grad_cost = linear_bar P, nothing else
  // kStep, kApply
  const T* w;  // (m)
  const T* q;  // (m)
  // Rows
  const T* f_bar;  // (n) adjoint of f in log2 units, or null
  T damping, denominator;
  // Of the step that follows: its f (null: zero), whether its rows have their start.
  const T* f_next;
  bool unit_next;
  T* alpha;        // (n)
  bool add_alpha;  // alpha holds the start's share
  bool solve;      // z = D (a alpha + f_bar) / divisor: the rows were solved at this step
  T* z_sum;        // (n) += z (implicit), or the z of kApply
  T* grad_a;       // (n) += alpha, or null
  T* grad_cost;    // (n, m), or null
  int64_t grad_stride;
  bool accumulate;
};

template <class T>
struct ColumnAdjoint {
  int64_t columns, blocks;
  const T* partial;  // (blocks, m)
  const T* sums;     // (blocks, m): of this step's columns, but for r
  const T* r;        // (m) ratio of the step before; null at the start, where beta = +partial
  const T* b;
  T uniform_b;
  const T* g;         // (m) of this step
  const T* g_before;  // (m) of the step before this one; null: the start (v0) or `fixed`
  const T* g_bar;     // (m) or null
  bool fixed;         // implicit: r = 1
  T damping, denominator;
  T* grad_b;  // (m) += beta, or null
  T* w;
  T* q;
  T* r_out;
  T* w_sum;  // (m) or null
};

template <class T>
struct SinkhornTable {
  int lanes;
  // `partial` (m) and `sums` (m, null: not wanted) are written; `buffer` holds kSweepRows x m.
  void (*forward)(const ForwardSweep<T>&, int64_t begin, int64_t end, T* partial, T* buffer);
  void (*finish_rows)(const ForwardSweep<T>&, int64_t rows);
  double (*update_columns)(const ColumnUpdate<T>&);
  void (*backward)(const BackwardSweep<T>&, int64_t begin, int64_t end, T* partial, T* sums,
                   T* buffer);
  double (*adjoint_columns)(const ColumnAdjoint<T>&);  // sum |b beta|
  void (*log2)(const T* x, T uniform, T* out, int64_t n);
  void (*add)(T* to, const T* from, int64_t n);
};

constexpr int64_t kSweepRows = 4;

KD_DECLARE_PER_ISA(const SinkhornTable<float>* sinkhorn_float();
                   const SinkhornTable<double>* sinkhorn_double())

}  // namespace kd
