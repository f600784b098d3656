// Online softmax statistics: what one pass over a row can know about its softmax.
//
// Everything is in log2 units: push x * log2(e) / tau, so that the exponential is a bare exp2 and
// the scale folds into one fma. OnlineSums<F, K> holds
//
//   max       m    = max_i x_i
//   sum[0]    s_0  = sum_i 2^(x_i - m)
//   sum[k]    s_k  = sum_i 2^(x_i - m) w_ki                  for k = 1 .. K - 1
//
// so s_k / s_0 is the mean of w_k under softmax(x). A KL row, for example, is an OnlineSums<F, 2>
// of the teacher with w = teacher - student and an OnlineSums<F, 1> of the student.
//
// F is float, double or a SIMD lane type. There is no branch, hence the same code for all of them.
// Corner cases, tested in tests/cpp/test_online.cpp:
//   x = -inf adds exactly nothing, whatever its weight is (0 * inf = 0); nothing pushed: lse =
//   -inf; NaN or +inf in x: sum[0], and so lse, is NaN; an infinite weight where 2^(x - m) > 0:
//   that sum is infinite, and stays so until its element is 2^-150 (float) below the maximum and
//   its probability underflows to 0.
#pragma once

#include "common/macros.h"
#include "common/scalar.h"

namespace kd {

template <class F, int K = 1>
struct OnlineSums {
  static_assert(K >= 1, "sum[0] is the normaliser");

  F max;
  F sum[K];

  KD_HOST_DEVICE OnlineSums() : max(F(-kInfinity)) {
    KD_UNROLL
    for (int k = 0; k < K; ++k) sum[k] = F(0);
  }

  // The maximum, or 0 while it is -inf: subtracting it never gives -inf - -inf.
  KD_HOST_DEVICE F reference() const { return reference_of(max); }

  // Moves the maximum up to at least `x` and rescales the sums.
  KD_HOST_DEVICE void raise(F x) {
    using kd::max;
    const F raised = max(this->max, x);
    scale_sums(exp2(this->max - reference_of(raised)));
    this->max = raised;
  }

  // One element. Two exponentials; prefer push_chunk in a loop.
  KD_HOST_DEVICE void push(F x) {
    static_assert(K == 1, "this accumulator has weights: pass them");
    raise(x);
    sum[0] = sum[0] + exp2(x - reference());
  }
  KD_HOST_DEVICE void push(F x, const F (&weights)[K > 1 ? K - 1 : 1]) {
    raise(x);
    add(exp2(x - reference()), weights);
  }

  // n elements, n + 1 exponentials.
  template <int n>
  KD_HOST_DEVICE void push_chunk(const F (&x)[n]) {
    static_assert(K == 1, "this accumulator has weights: pass them");
    raise(largest(x));
    const F m = reference();
    KD_UNROLL
    for (int i = 0; i < n; ++i) sum[0] = sum[0] + exp2(x[i] - m);
  }
  // weights[k - 1][i] belongs to x[i] and sum[k].
  template <int n>
  KD_HOST_DEVICE void push_chunk(const F (&x)[n], const F (&weights)[K > 1 ? K - 1 : 1][n]) {
    raise(largest(x));
    const F m = reference();
    KD_UNROLL
    for (int i = 0; i < n; ++i) {
      const F e = exp2(x[i] - m);
      sum[0] = sum[0] + e;
      KD_UNROLL
      for (int k = 1; k < K; ++k) {
        sum[k] = sum[k] + select(e == F(0), F(0), e * weights[k - 1][i]);
      }
    }
  }

  // For callers that made the exponential themselves: e = 2^(x - reference()), after raise(x).
  KD_HOST_DEVICE void add(F e, const F (&weights)[K > 1 ? K - 1 : 1]) {
    sum[0] = sum[0] + e;
    KD_UNROLL
    for (int k = 1; k < K; ++k) {
      sum[k] = sum[k] + select(e == F(0), F(0), e * weights[k - 1]);
    }
  }

  // The statistics of both parts together.
  KD_HOST_DEVICE void merge(const OnlineSums& other) {
    OnlineSums scaled = other;
    raise(other.max);
    scaled.scale_sums(exp2(other.max - reference()));
    KD_UNROLL
    for (int k = 0; k < K; ++k) sum[k] = sum[k] + scaled.sum[k];
  }

  // log2 of sum 2^x, and the natural log of sum e^(x ln 2).
  KD_HOST_DEVICE F lse2() const { return max + log2(sum[0]); }
  KD_HOST_DEVICE F lse() const { return F(kLn2) * lse2(); }
  KD_HOST_DEVICE F finish() const { return lse(); }

  // Mean of weight k under the softmax; NaN if nothing finite was pushed.
  KD_HOST_DEVICE F mean(int k) const { return sum[k] / sum[0]; }

 private:
  KD_HOST_DEVICE static F reference_of(F m) { return select(m == F(-kInfinity), F(0), m); }

  template <int n>
  KD_HOST_DEVICE static F largest(const F (&x)[n]) {
    using kd::max;
    F m = x[0];
    KD_UNROLL
    for (int i = 1; i < n; ++i) m = max(m, x[i]);
    return m;
  }

  // sum[0] is infinite only if it is NaN in the end, so it needs no guard.
  KD_HOST_DEVICE void scale_sums(F scale) {
    sum[0] = sum[0] * scale;
    KD_UNROLL
    for (int k = 1; k < K; ++k) {
      sum[k] = select((abs(sum[k]) == F(kInfinity)) & (scale == F(0)), F(0), sum[k] * scale);
    }
  }
};

}  // namespace kd
