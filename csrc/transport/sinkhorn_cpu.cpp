// The sweeps of Sinkhorn's iterations over row blocks, written once against VecF / VecD and
// compiled once per ISA. Four rows are in flight: their exponentials stay in cache between the row
// sum and the column sums, which are then loaded and stored once for all four.
#include "transport/sinkhorn_cpu.h"

#include "common/scalar.h"
#include "common/simd.h"
#include "transport/transport_lanes.h"
#include "transport/transport_math.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

// ---- forward -----------------------------------------------------------------------------------

// x_j = log2 v_j - k C_ij.
template <class V, class At, class T>
KD_LANES V exponent(const At& at, const ForwardSweep<T>& s, const T* cost) {
  const V c = at.load(cost, T(0));
  if (s.log_v == nullptr) return at.keep(V(-s.k) * c, T(-kInfinity));
  return fnma(V(s.k), c, at.load(s.log_v, T(-kInfinity)));
}

// e_j = 2^(x_j + base) into `e`, and its sum.
template <class V, class T>
T exponentials(const ForwardSweep<T>& s, const T* cost, T base, T* e) {
  V sum = V::zero();
  for_lanes<V>(
      s.columns, KD_BODY {
        const V value = exp2(exponent<V>(at, s, cost) + V(base));
        at.save(e, value);
        sum += at.keep(value, T(0));
      });
  return reduce_add(sum);
}

// Minus the largest exponent: the base that makes the largest e_j one.
template <class V, class T>
T safe_base(const ForwardSweep<T>& s, const T* cost) {
  V top(T(-kInfinity));
  for_lanes<V>(s.columns, KD_BODY { top = max(exponent<V>(at, s, cost), top); });
  const T highest = reduce_max(top);
  return highest == T(-kInfinity) ? T(0) : -highest;
}

// Solves row i (or keeps it) and returns what its e_j are multiplied by to become row i of the
// plan.
template <class V, class T>
T forward_row(const ForwardSweep<T>& s, int64_t i, T* e) {
  const T* cost = s.cost + i * s.row_stride;
  const T a = s.a != nullptr ? s.a[i] : s.uniform_a;
  if (!s.solve) {
    exponentials<V>(s, cost, s.f_in != nullptr ? s.f_in[i] : T(0), e);
    return s.f_in != nullptr ? a : T(a != T(0));
  }
  T base = s.f_in != nullptr ? s.f_in[i] : T(0);
  T sum = T(0);
  if (s.f_in != nullptr) sum = exponentials<V>(s, cost, base, e);
  if (!(sum > T(kSmallSum) && sum < T(kLargeSum))) {
    base = safe_base<V>(s, cost);
    sum = exponentials<V>(s, cost, base, e);
  }
  // Nothing is reachable from this row: without mass that is no matter, with mass it is NaN.
  const bool idle = a == T(0) && sum == T(0);
  if (!s.damped) {
    s.base[i] = idle ? T(0) : base;
    s.f_out[i] = idle ? T(1) : sum;
    return idle ? T(0) : a / sum;
  }
  const T solved = potential(kd::log2(sum) - base, s.log_denominator, s.damping);
  s.f_out[i] = idle && s.log_denominator == T(-kInfinity) ? T(0) : solved;
  return idle ? T(0) : a * kd::exp2(solved - base);
}

// <P, C> and the row sum of row i, and the plan itself, from e and the factor.
template <class V, class T>
void report_row(const ForwardSweep<T>& s, int64_t i, const T* e, T factor) {
  const T* cost = s.cost + i * s.row_stride;
  V sum = V::zero(), product = V::zero();
  T* plan = s.plan != nullptr ? s.plan + i * s.plan_stride : nullptr;
  for_lanes<V>(
      s.columns, KD_BODY {
        const V p = at.load(e, T(0)) * V(factor);
        sum += p;
        // An infinite cost carries no mass and costs nothing.
        if (s.linear != nullptr) {
          product += select(p == V::zero(), V::zero(), p * at.load(cost, T(0)));
        }
        if (plan != nullptr) at.save(plan, p);
      });
  if (s.linear != nullptr) s.linear[i] = reduce_add(product);
  if (s.rows != nullptr) s.rows[i] = reduce_add(sum);
}

template <class V, int kRows, class T>
KD_LANES void forward_group(const ForwardSweep<T>& s, int64_t i, T* partial, T* buffer) {
  T factor[kRows];
  for (int r = 0; r < kRows; ++r) {
    factor[r] = forward_row<V>(s, i + r, buffer + r * s.columns);
    if (s.linear != nullptr || s.rows != nullptr || s.plan != nullptr) {
      report_row<V>(s, i + r, buffer + r * s.columns, factor[r]);
    }
  }
  if (!s.accumulate) return;
  for_lanes<V>(
      s.columns, KD_BODY {
        V sum = at.load(partial, T(0));
        for (int r = 0; r < kRows; ++r) {
          sum = fma(at.load(buffer + r * s.columns, T(0)), V(factor[r]), sum);
        }
        at.save(partial, sum);
      });
}

template <class V, class T>
void forward(const ForwardSweep<T>& s, int64_t begin, int64_t end, T* partial, T* buffer) {
  if (s.accumulate) memset(partial, 0, static_cast<size_t>(s.columns) * sizeof(T));
  int64_t i = begin;
  for (; i + kSweepRows <= end; i += kSweepRows) {
    forward_group<V, kSweepRows>(s, i, partial, buffer);
  }
  for (; i < end; ++i) forward_group<V, 1>(s, i, partial, buffer);
}

template <class V, class T>
void finish_rows(const ForwardSweep<T>& s, int64_t rows) {
  if (s.damped) return;
  for_lanes<V>(
      rows, KD_BODY { at.save(s.f_out, at.load(s.base, T(0)) - log2(at.load(s.f_out, T(1)))); });
}

// log2 of column sums K' u of one vector of columns, relative to their largest term.
template <class V, class At, class T>
V column_log_sum(const At& at, const ColumnUpdate<T>& u) {
  const T lowest = T(-kInfinity);
  V top(lowest);
  for (int64_t i = 0; i < u.rows; ++i) {
    const V c = at.load(u.cost + i * u.row_stride, T(0));
    top = max(fnma(V(u.k), c, V(u.log_u[i])), top);
  }
  top = select(top == V(lowest), V::zero(), top);
  V sum = V::zero();
  for (int64_t i = 0; i < u.rows; ++i) {
    const V c = at.load(u.cost + i * u.row_stride, T(0));
    sum += exp2(fnma(V(u.k), c, V(u.log_u[i])) - top);
  }
  return log2(sum) + top;
}

template <class V, class T>
double update_columns(const ColumnUpdate<T>& u) {
  const V lowest(T(-kInfinity));
  double error = 0;
  for_lanes<V>(
      u.columns, KD_BODY {
        V sum = at.load(u.partial, T(1));
        for (int64_t block = 1; block < u.blocks; ++block) {
          sum += at.load(u.partial + block * u.columns, T(0));
        }
        const V log_v = u.has_log_v ? at.load(u.log_v, T(0)) : V::zero();
        const V log_b = at.load(u.log_b, T(0));
        V log_sum = log2(sum) - log_v;
        if (!all((sum > V(T(kSmallSum))) & (sum < V(T(kLargeSum))))) {
          log_sum = column_log_sum<V>(at, u);
        }
        V g = -log_sum;
        if (u.damped) {
          V inside = log_sum;
          if (u.log_denominator != T(-kInfinity)) {
            const V d(u.log_denominator);
            const V high = max(log_sum, d), low = min(log_sum, d);
            inside = high + log2(V(T(1)) + exp2(low - high));
          }
          g = V(-u.damping) * inside;
        }
        // Nothing is reachable from a column without mass: as for rows.
        g = select((log_sum == lowest) & (log_b == lowest), V::zero(), g);
        at.save(u.g_out, g);
        at.save(u.log_v, log_b + g);
        if (u.want_error) {
          const V change = abs(exp2(log_b + g + log_sum) - exp2(log_v + log_sum));
          error += static_cast<double>(
              reduce_add(at.keep(select(log_b == lowest, V::zero(), change), T(0))));
        }
      });
  return error;
}

// ---- backward ----------------------------------------------------------------------------------

// The row's share of alpha, and `total`, the sum of rho K v that its potential stands for.
template <class V, class T>
T backward_row(const BackwardSweep<T>& s, int64_t i, T* e, T* total) {
  using Stage = BackwardSweep<T>;
  const T* cost = s.cost + i * s.row_stride;
  const T f = s.f != nullptr ? s.f[i] : T(0);
  const T* plan_bar = s.plan_bar != nullptr ? s.plan_bar + i * s.plan_bar_stride : nullptr;
  const T row_bar = s.rows_bar != nullptr ? s.rows_bar[i] : T(0);
  V sum = V::zero(), masses = V::zero();
  for_lanes<V>(
      s.columns, KD_BODY {
        const V c = at.load(cost, T(0));
        // Bounded for pairs without mass on either side, whose density means nothing: 0 x inf is
        // NaN.
        const V x = min(V(T(kMaxExponent)), fnma(V(s.k), c, at.load(s.g, T(0))) + V(f));
        const V value = at.keep(exp2(x), T(0));
        at.save(e, value);
        if (s.stage == Stage::kStep) {
          sum = fnma(value, at.load(s.w, T(0)), sum);
          masses = fma(value, at.load(s.q, T(0)), masses);
        } else if (s.stage == Stage::kStart && !s.envelope) {
          V bar(row_bar);
          if (s.linear_bar != T(0)) bar = fma(V(s.linear_bar), c, bar);
          if (s.columns_bar != nullptr) bar += at.load(s.columns_bar, T(0));
          if (plan_bar != nullptr) bar += at.load(plan_bar, T(0));
          const V b = s.b != nullptr ? at.load(s.b, T(0)) : V(s.uniform_b);
          sum = fma(select(value == V::zero(), V::zero(), bar) * b, value, sum);
          masses = fma(value, b, masses);
        }
      });
  *total = reduce_add(masses);
  return reduce_add(sum);
}

// What row i of the sweep gives to the columns and to the gradient of the cost.
template <class T>
struct RowShare {
  T scale;  // the row scaling over rho: a, or the start
  T z;
  T next;  // what makes of this row's densities those of the step that follows, times its scaling
};

template <class V, class T>
RowShare<T> solve_row(const BackwardSweep<T>& s, int64_t i, T sum, T total) {
  using Stage = BackwardSweep<T>;
  const T a = s.a != nullptr ? s.a[i] : s.uniform_a;
  RowShare<T> share{s.unit_rows ? T(a != T(0)) : a, T(0), T(0)};
  if (s.envelope) return share;
  const T f = s.f != nullptr ? s.f[i] : T(0);
  share.next = s.unit_next ? T(a != T(0)) : a;
  if (s.f_next != s.f) {
    const T moved = (s.f_next != nullptr ? s.f_next[i] : T(0)) - f;
    share.next *= kd::exp2(moved < T(kMaxExponent) ? moved : T(kMaxExponent));
  }
  if (s.stage == Stage::kApply) {
    share.z = s.z_sum[i];
    return share;
  }
  const T alpha = s.add_alpha ? s.alpha[i] + sum : sum;
  if (s.stage == Stage::kStart) s.alpha[i] = alpha;
  if (!s.solve) return share;
  if (s.grad_a != nullptr) s.grad_a[i] += alpha;
  T bar = a * alpha;
  if (s.f_bar != nullptr) bar += s.f_bar[i] * T(kLog2E);
  share.z = s.damping * bar * corrected_ratio(f, s.damping, s.denominator, total);
  if (s.z_sum != nullptr) s.z_sum[i] += share.z;
  return share;
}

// The start's second pass over a row: its share of beta, and the cost's gradient.
template <class V, class T>
void start_row(const BackwardSweep<T>& s, int64_t i, const T* e, RowShare<T> share, T* partial,
               T* sums) {
  const T* cost = s.cost + i * s.row_stride;
  const T* plan_bar = s.plan_bar != nullptr ? s.plan_bar + i * s.plan_bar_stride : nullptr;
  const T row_bar = s.rows_bar != nullptr ? s.rows_bar[i] : T(0);
  T* grad = s.grad_cost != nullptr ? s.grad_cost + i * s.grad_stride : nullptr;
  const V per_epsilon(T(1) / s.epsilon);
  for_lanes<V>(
      s.columns, KD_BODY {
        const V c = at.load(cost, T(0));
        const V b = s.b != nullptr ? at.load(s.b, T(0)) : V(s.uniform_b);
        const V value = at.load(e, T(0));
        const V p = value * V(share.scale) * b;
        V out = p * V(s.linear_bar);
        if (!s.envelope) {
          V bar(row_bar);
          if (s.linear_bar != T(0)) bar = fma(V(s.linear_bar), c, bar);
          if (s.columns_bar != nullptr) bar += at.load(s.columns_bar, T(0));
          if (plan_bar != nullptr) bar += at.load(plan_bar, T(0));
          const V t = select(value == V::zero(), V::zero(), bar) * value;
          at.save(partial, at.load(partial, T(0)) + t * V(share.scale) - value * V(share.z));
          at.save(sums, fma(value, V(share.next), at.load(sums, T(0))));
          // The implicit mode applies all z together, in kApply.
          const V z = s.z_sum != nullptr ? V::zero() : V(share.z);
          out += (value * z - t * V(share.scale)) * b * per_epsilon;
        }
        if (grad != nullptr) at.save(grad, out);
      });
}

template <class V, int kRows, class T>
KD_LANES void backward_group(const BackwardSweep<T>& s, int64_t i, T* partial, T* sums, T* buffer) {
  using Stage = BackwardSweep<T>;
  RowShare<T> share[kRows];
  for (int r = 0; r < kRows; ++r) {
    T* e = buffer + r * s.columns;
    T total;
    const T sum = backward_row<V>(s, i + r, e, &total);
    share[r] = solve_row<V>(s, i + r, sum, total);
    if (s.stage == Stage::kStart) start_row<V>(s, i + r, e, share[r], partial, sums);
  }
  if (s.stage == Stage::kStart) return;
  const T per_epsilon = T(1) / s.epsilon;
  if (s.accumulate) {
    for_lanes<V>(
        s.columns, KD_BODY {
          V sum = at.load(partial, T(0)), next = at.load(sums, T(0));
          for (int r = 0; r < kRows; ++r) {
            const V e = at.load(buffer + r * s.columns, T(0));
            sum = fma(e, V(share[r].z), sum);
            next = fma(e, V(share[r].next), next);
          }
          at.save(partial, sum);
          at.save(sums, next);
        });
  }
  if (s.grad_cost == nullptr) return;
  for_lanes<V>(
      s.columns, KD_BODY {
        const V w = at.load(s.w, T(0)), q = at.load(s.q, T(0));
        for (int r = 0; r < kRows; ++r) {
          T* grad = s.grad_cost + (i + r) * s.grad_stride;
          const V both = fma(w, V(share[r].scale * per_epsilon), q * V(share[r].z * per_epsilon));
          at.save(grad, fma(at.load(buffer + r * s.columns, T(0)), both, at.load(grad, T(0))));
        }
      });
}

template <class V, class T>
void backward(const BackwardSweep<T>& s, int64_t begin, int64_t end, T* partial, T* sums,
              T* buffer) {
  memset(partial, 0, static_cast<size_t>(s.columns) * sizeof(T));
  memset(sums, 0, static_cast<size_t>(s.columns) * sizeof(T));
  int64_t i = begin;
  for (; i + kSweepRows <= end; i += kSweepRows) {
    backward_group<V, kSweepRows>(s, i, partial, sums, buffer);
  }
  for (; i < end; ++i) backward_group<V, 1>(s, i, partial, sums, buffer);
}

template <class V, class T>
double adjoint_columns(const ColumnAdjoint<T>& c) {
  double size = 0;
  for_lanes<V>(
      c.columns, KD_BODY {
        V beta = at.load(c.partial, T(0)), total = at.load(c.sums, T(0));
        for (int64_t block = 1; block < c.blocks; ++block) {
          beta += at.load(c.partial + block * c.columns, T(0));
          total += at.load(c.sums + block * c.columns, T(0));
        }
        if (c.r != nullptr) {
          const V r = at.load(c.r, T(0));
          beta = -beta * r;
          total = total * r;
        }
        if (c.grad_b != nullptr) at.save(c.grad_b, at.load(c.grad_b, T(0)) + beta);
        const V b = c.b != nullptr ? at.load(c.b, T(0)) : V(c.uniform_b);
        const V g = at.load(c.g, T(0));
        V bar = b * beta;
        size += static_cast<double>(reduce_add(at.keep(abs(bar), T(0))));
        if (c.g_bar != nullptr) bar = fma(at.load(c.g_bar, T(0)), V(T(kLog2E)), bar);
        // corrected_ratio, lane by lane.
        V ratio(T(1));
        if (c.damping != T(1)) {
          const V exponent = g * V(T(1) / c.damping - T(1));
          ratio = exp2(min(V(T(kMaxExponent)), max(V(T(-kMaxExponent)), exponent)));
        }
        if (c.denominator != T(0)) total += V(c.denominator) * exp2(g);
        const V near = total * ratio;
        const V corrected = select(abs(near - V(T(1))) < V(T(0.015625)), ratio / near, ratio);
        const V w = V(c.damping) * bar * corrected;
        at.save(c.w, w);
        if (c.w_sum != nullptr) at.save(c.w_sum, at.load(c.w_sum, T(0)) + w);
        V r(T(1)), q = b;
        if (!c.fixed && c.g_before != nullptr) {
          r = exp2(min(V(T(kMaxExponent)), at.load(c.g_before, T(0)) - g));
          q = b * r;
        } else if (!c.fixed) {
          q = select(b == V::zero(), V::zero(), exp2(-g));
        }
        at.save(c.r_out, r);
        at.save(c.q, q);
      });
  return size;
}

// ---- small ones --------------------------------------------------------------------------------

template <class V, class T>
void log2_of(const T* x, T uniform, T* out, int64_t n) {
  for_lanes<V>(n, KD_BODY { at.save(out, log2(x != nullptr ? at.load(x, T(1)) : V(uniform))); });
}

template <class V, class T>
void add(T* to, const T* from, int64_t n) {
  for_lanes<V>(n, KD_BODY { at.save(to, at.load(to, T(0)) + at.load(from, T(0))); });
}

template <class V>
struct Filled {
  using T = typename V::Scalar;
  static constexpr SinkhornTable<T> table = {
      V::kLanes,       &forward<V, T>,         &finish_rows<V, T>, &update_columns<V, T>,
      &backward<V, T>, &adjoint_columns<V, T>, &log2_of<V, T>,     &add<V, T>};
};

}  // namespace

const SinkhornTable<float>* sinkhorn_float() {
  return &Filled<VecF>::table;
}
const SinkhornTable<double>* sinkhorn_double() {
  return &Filled<VecD>::table;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
