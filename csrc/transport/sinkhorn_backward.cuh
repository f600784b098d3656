// The backward's rows and columns on the GPU; the formulas stand in transport.h.
#pragma once

#include "transport/sinkhorn_device.cuh"

namespace kd::cuda {

// What one backward sweep does; see BackwardSweep on the CPU.
template <class T>
struct Step {
  enum Stage : int { kStart, kStep, kApply };
  Stage stage;
  const T* f;  // null: zero
  const T* g;
  bool unit_rows, solve, add_alpha, accumulate, write_cost, implicit;
  const T* f_bar;
  const T* w;
  // Of the step that follows: its f (null: zero), whether its rows have their start.
  const T* f_next;
  bool unit_next;
};

template <class T>
struct Density {
  const T* cost;
  const T* g;
  T k, f;
  // Bounded for pairs without mass on either side, whose density means nothing: 0 x inf is NaN.
  KD_DEVICE T operator()(int j) const {
    const T x = fma(-k, cost[j], g[j]) + f;
    return exp2(x > T(kMaxExponent) ? T(kMaxExponent) : x);
  }
};

template <int kCols, class T>
KD_DEVICE void backward_row(const DeviceProblem<T>& p, const Step<T>& s, int i, int lane,
                            T* slice) {
  const SinkhornData<T>& d = p.data;
  const bool start = s.stage == Step<T>::kStart, apply = s.stage == Step<T>::kApply;
  const bool envelope = d.mode == static_cast<int>(GradientMode::kEnvelope);
  const T a = p.mass_a(i);
  const T f = s.f != nullptr ? s.f[i] : T(0);
  const T* cost = p.cost + i * d.cost_row;
  const T linear_bar = d.linear_bar != nullptr ? d.linear_bar[p.index] : T(0);
  const T row_bar = d.rows_bar != nullptr ? p.of_rows(d.rows_bar)[i] : T(0);
  const T* column_bar = p.of_columns(d.columns_bar);
  const T* plan_bar = p.row_of(d.plan_bar, i);
  const auto bar = [&](int j, T e) {
    if (e == T(0)) return T(0);
    T out = row_bar;
    if (linear_bar != T(0)) out = fma(linear_bar, cost[j], out);
    if (column_bar != nullptr) out += column_bar[j];
    if (plan_bar != nullptr) out += plan_bar[j];
    return out;
  };
  using Make = Density<T>;
  LaneRow<T, kCols, Make> row(Make{cost, s.g, d.k, f}, p.m, lane);
  T total = T(0);  // the sum of rho K v that the row's potential stands for
  T alpha = row.first([&](int j, T e) {
    if (s.stage == Step<T>::kStep) {
      total += e * p.q[j];
      return -e * s.w[j];
    }
    if (!start || envelope) return T(0);
    total += e * p.mass_b(j);
    return bar(j, e) * p.mass_b(j) * e;
  });
  total = warp_sum(total);
  // Makes of this row's densities those of the step that follows, times its scaling.
  T next = s.unit_next ? T(a != T(0)) : a;
  if (s.f_next != s.f) {
    const T moved = (s.f_next != nullptr ? s.f_next[i] : T(0)) - f;
    next *= exp2(moved > T(kMaxExponent) ? T(kMaxExponent) : moved);
  }
  T* const sums = slice + p.m;
  const T scale = s.unit_rows ? T(a != T(0)) : a;
  T z = T(0);
  if (apply) {
    z = p.z_sum[i];
  } else if (!envelope) {
    if (s.add_alpha) alpha += p.alpha[i];
    if (s.solve) {
      T of_f = a * alpha;
      if (s.f_bar != nullptr) of_f += s.f_bar[i] * T(kLog2E);
      z = d.damping_a * of_f * corrected_ratio(f, d.damping_a, d.denominator, total);
    }
    if (lane == 0) {
      if (start) p.alpha[i] = alpha;
      if (s.solve && d.grad_a != nullptr) p.of_rows(d.grad_a)[i] += alpha;
      if (s.solve && s.implicit) p.z_sum[i] += z;
    }
  }
  T* grad = s.write_cost ? p.row_of(d.grad_cost, i) : nullptr;
  const T per_epsilon = T(1) / d.epsilon;
  if (!start) {
    row.again([&](int j, T e) {
      if (s.accumulate) {
        slice[j] += e * z;
        sums[j] += e * next;
      }
      if (grad != nullptr) grad[j] += e * (s.w[j] * scale + p.q[j] * z) * per_epsilon;
    });
    return;
  }
  row.again([&](int j, T e) {
    const T b = p.mass_b(j);
    T out = e * scale * b * linear_bar;
    if (!envelope) {
      const T t = bar(j, e) * e * scale;
      slice[j] += t - e * z;
      sums[j] += e * next;
      // The implicit mode applies all z together, in kApply.
      out += ((s.implicit ? T(0) : e * z) - t) * b * per_epsilon;
    }
    if (grad != nullptr) grad[j] = out;
  });
}

// Between two sweeps: beta, and what the next sweep needs of column j. `g_before`: null at the
// start of the iterations; `first`: the sums are the start's own. Returns |b beta|.
template <class T>
KD_DEVICE T adjoint_column(const DeviceProblem<T>& p, const T* g, const T* g_before, bool first,
                           bool fixed, int tiles, int j) {
  const SinkhornData<T>& d = p.data;
  T beta = p.partial[j];
  for (int tile = 1; tile < tiles; ++tile) beta += p.partial[static_cast<int64_t>(tile) * p.m + j];
  T total = p.sums[j];
  for (int tile = 1; tile < tiles; ++tile) total += p.sums[static_cast<int64_t>(tile) * p.m + j];
  if (!first) {
    beta = -beta * p.r[j];
    total *= p.r[j];
  }
  if (d.grad_b != nullptr) p.of_columns(d.grad_b)[j] += beta;
  const T b = p.mass_b(j);
  T of_g = b * beta;
  const T size = abs(of_g);
  if (first && d.g_bar != nullptr) of_g += p.of_columns(d.g_bar)[j] * T(kLog2E);
  const T w = d.damping_b * of_g * corrected_ratio(g[j], d.damping_b, d.denominator, total);
  p.w[j] = w;
  if (fixed) p.w_sum[j] += w;
  T r = T(1), q = b;
  if (!fixed && g_before != nullptr) {
    const T x = g_before[j] - g[j];
    r = exp2(x > T(kMaxExponent) ? T(kMaxExponent) : x);
    q = b * r;
  } else if (!fixed) {
    q = b == T(0) ? T(0) : exp2(-g[j]);
  }
  p.r[j] = r;
  p.q[j] = q;
  return size;
}

template <class T>
KD_DEVICE void next_of(const DeviceProblem<T>& p, int t, Step<T>* s) {
  s->f_next = t >= 0 ? p.f_at(t) : nullptr;
  s->unit_next = t < 0;
}

template <class T>
KD_DEVICE Step<T> start_step(const DeviceProblem<T>& p, int done) {
  const SinkhornData<T>& d = p.data;
  Step<T> s{};
  s.stage = Step<T>::kStart;
  s.f = p.f_at(done - 1);
  s.g = p.g_at(done - 1);
  s.solve = d.columns_first;
  s.f_bar = d.columns_first ? p.of_rows(d.f_bar) : nullptr;
  s.accumulate = s.write_cost = true;
  s.implicit = d.mode == static_cast<int>(GradientMode::kImplicit);
  // The first step's columns were solved from these rows, or, columns first, from those before.
  s.f_next = s.f;
  if (d.columns_first && !s.implicit) next_of(p, done - 2, &s);
  return s;
}

// The sweep of iteration t (unrolled), or one round of the fixed point (`round`).
template <class T>
KD_DEVICE Step<T> step_of(const DeviceProblem<T>& p, int done, int t) {
  const SinkhornData<T>& d = p.data;
  Step<T> s{};
  s.stage = Step<T>::kStep;
  s.g = p.g_at(t);
  s.w = p.w;
  s.write_cost = true;
  s.accumulate = t > 0;
  if (d.columns_first) {
    s.f = t > 0 ? p.f_at(t - 1) : nullptr;
    s.unit_rows = t == 0;
    s.solve = t > 0;
  } else {
    s.f = p.f_at(t);
    s.solve = true;
    s.add_alpha = t == done - 1;
    s.f_bar = s.add_alpha ? p.of_rows(d.f_bar) : nullptr;
  }
  next_of(p, d.columns_first ? t - 2 : t - 1, &s);
  return s;
}
template <class T>
KD_DEVICE Step<T> round_of(const DeviceProblem<T>& p, int done, int round) {
  const SinkhornData<T>& d = p.data;
  Step<T> s{};
  s.stage = Step<T>::kStep;
  s.f = p.f_at(done - 1);
  s.g = p.g_at(done - 1);
  s.w = p.w;
  s.solve = s.accumulate = s.implicit = true;
  s.add_alpha = round == 0 && !d.columns_first;
  s.f_bar = s.add_alpha ? p.of_rows(d.f_bar) : nullptr;
  s.f_next = s.f;
  return s;
}
template <class T>
KD_DEVICE Step<T> apply_step(const DeviceProblem<T>& p, int done) {
  Step<T> s{};
  s.stage = Step<T>::kApply;
  s.f = p.f_at(done - 1);
  s.g = p.g_at(done - 1);
  s.w = p.w_sum;
  s.write_cost = s.implicit = true;
  s.f_next = s.f;
  return s;
}

// All sweeps of a backward; sweep(step) goes over the rows, columns(g, g_before, first, fixed) over
// the columns and returns the size of their adjoint. Both end with a barrier of all who take part.
template <class T, class Rows, class Columns>
KD_DEVICE void walk_back(const DeviceProblem<T>& p, int done, const Rows& sweep,
                         const Columns& columns) {
  const SinkhornData<T>& d = p.data;
  const bool implicit = d.mode == static_cast<int>(GradientMode::kImplicit);
  const int limit = d.iterations < 100 ? 100 : d.iterations;
  const T precision = sizeof(T) == 8 ? T(1e-14) : T(1e-8);
  T size = T(0), initial = T(0);
  Step<T> s = start_step(p, done);
  for (int at = 0;; ++at) {  // one place that sweeps: several would each take registers
    sweep(s);
    if (d.mode == static_cast<int>(GradientMode::kEnvelope) || s.stage == Step<T>::kApply) return;
    if (!implicit && at == done) return;
    if (implicit && (at == limit || (at > 1 && !(size > precision * initial)))) {
      s = apply_step(p, done);
      continue;
    }
    const int t = done - 1 - (implicit ? 0 : at);
    const T* before = implicit || t == 0 ? nullptr : p.g_at(t - 1);
    size = columns(p.g_at(t), before, at == 0, implicit);
    if (at == 0) initial = size;
    s = implicit ? round_of(p, done, at) : step_of(p, done, t);
  }
}

// Zeros: the gradients, and what accumulates. One block.
template <class T>
KD_DEVICE void clear_backward(const DeviceProblem<T>& p, bool live) {
  const SinkhornData<T>& d = p.data;
  const int threads = blockDim.x, thread = threadIdx.x;
  for (int64_t i = thread; i < d.rows; i += threads) {
    if (d.grad_a != nullptr) p.of_rows(d.grad_a)[i] = T(0);
    p.z_sum[i] = T(0);
  }
  for (int64_t j = thread; j < d.columns; j += threads) {
    if (d.grad_b != nullptr) p.of_columns(d.grad_b)[j] = T(0);
    p.w_sum[j] = T(0);
  }
  if (d.grad_cost == nullptr) return;
  for (int64_t i = 0; i < d.rows; ++i) {
    T* grad = p.row_of(d.grad_cost, static_cast<int>(i));
    for (int64_t j = (live && i < p.n ? p.m : 0) + thread; j < d.columns; j += threads) {
      grad[j] = T(0);
    }
  }
}

}  // namespace kd::cuda
