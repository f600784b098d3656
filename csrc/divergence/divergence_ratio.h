// The fast pass between statistics and gradient: terms of each entry as functions of q and of
// r = p / q = 2^d, from what the statistics left in scratch (2^u or u, and v - u).
//
// One or two exponentials and at most one logarithm or division an entry, against the five to eight
// of divergence_math.h, at the price of cancellation: an entry's value is right to about 1e-7 of
// `scale`. Roundings are independent from entry to entry, so the sum's error is 1e-7
// sqrt(sum scale^2); a row whose value is not well above that is finished by exact_terms(). The
// ratio form also needs r < 2^60, so that an entry whose q underflows has a negligible p; rows
// beyond are left to exact_terms() altogether. S follows the conventions of divergence_math.h.
#pragma once

#include "divergence/divergence_math.h"
#include "divergence/divergence_statistics.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

constexpr double kLargestGap = 60;

// What the passes after the first know about a row.
template <class S>
struct RowNumbers {
  S tau_s, tau_t;
  S inverse_s, inverse_t;  // 1 / sum
  S lse_s, lse_t;          // log2 of the sums; log2 q = u - lse_s
  S gap;                   // lse_t - lse_s, rounded from
  double exact_gap;
  RowKind<S> kind;

  // From the two normalisers.
  void set_sums(double sum_s, double sum_t) {
    // A row without any possible entry has probabilities 0, not NaN.
    if (!(sum_s > 0)) sum_s = 1;
    if (!(sum_t > 0)) sum_t = 1;
    lse_s = static_cast<S>(__builtin_log2(sum_s));
    lse_t = static_cast<S>(__builtin_log2(sum_t));
    inverse_s = static_cast<S>(1 / sum_s);
    inverse_t = static_cast<S>(1 / sum_t);
    exact_gap = kLog2E * __builtin_log1p((sum_t - sum_s) / sum_s);
    gap = static_cast<S>(exact_gap);
  }
};

struct RowTerms {
  double value = 0, student = 0, teacher = 0;
  double square = 0;  // sum of scale^2
  double excess = 0;  // sum of q - p: what rounding made of 0

  KD_LANES void operator+=(const RowTerms& other) {
    value += other.value;
    student += other.student;
    teacher += other.teacher;
    square += other.square;
    excess += other.excess;
  }
};

// Without the coefficient `other`. No teacher's term: its gradient takes the exact way.
template <class V>
struct RatioTerms {
  V value, scale, student;
};

// A KL(p || M) + B KL(q || M); slanted: neither Jensen-Shannon.
template <bool Slanted>
struct MixtureRatio {
  static constexpr bool kNeedsLog = false;
  static constexpr bool kStaged = true;

  template <class V, class S>
  static KD_LANES V inside(V r, const RowKind<S>& c) {  // M / q
    return fma(V(c.mix), r, V(S(1) - c.mix));
  }
  // r = 2^d and log_m = log2(M / q) come from loops of their own.
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V r, V log_m, const RowKind<S>& c) {
    const V p = q * r, log_q = -log_m;
    RatioTerms<V> t;
    t.scale = p + q;
    t.student = V(c.to_student * S(kLn2)) * q * log_q;
    t.value = fma(V(c.to_teacher * S(kLn2)) * p, log_q + d, t.student);
    if constexpr (Slanted) {
      const S slant = c.to_teacher * (S(1) - c.mix) - c.to_student * c.mix;
      const V by_m = (p - q) / inside(r, c);  // (p - q) q / M
      t.student -= V(slant * c.mix_student * (S(1) - c.mix)) * by_m;
    }
    return t;
  }
};

struct TotalVariationRatio {
  static constexpr bool kNeedsLog = false;
  static constexpr bool kStaged = false;
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V, const RowKind<S>&) {
    const V zero = V::zero(), half(0.5f);
    const V p = q * exp2(d), pq = p - q, h = half * q;
    const auto above = d > zero, below = d < zero;
    RatioTerms<V> t;
    t.value = half * abs(pq);
    t.scale = p + q;
    t.student = select(above, -h, select(below, h, zero));
    return t;
  }
};

struct HellingerRatio {
  static constexpr bool kNeedsLog = false;
  static constexpr bool kStaged = false;
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V, const RowKind<S>&) {
    const V half(0.5f);
    const V h = exp2(half * d), root = h - V(1), hq = half * q;
    RatioTerms<V> t;
    t.scale = q * root;  // hq (h - 1)^2 keeps the relative error of its factor
    t.value = hq * root * root;
    t.student = -hq * root;
    return t;
  }
};

struct TriangularRatio {
  static constexpr bool kNeedsLog = false;
  static constexpr bool kStaged = false;
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V, const RowKind<S>&) {
    const V one(1), two(2);
    const V r = exp2(d), above = r - one, share = above / (r + one);
    RatioTerms<V> t;
    t.scale = q * above;
    t.value = t.scale * share;
    t.student = -q * share * (two + share);
    return t;
  }
};

struct ChiSquaredRatio {
  static constexpr bool kNeedsLog = false;
  static constexpr bool kStaged = false;
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V, const RowKind<S>&) {
    const V one(1);
    const V r = exp2(d), above = r - one;
    RatioTerms<V> t;
    t.scale = q * above * (r + one);
    t.value = q * above * above;
    t.student = -t.scale;
    return t;
  }
};

// The AB divergence where alpha, beta and their sum are not 0; Plain: the sum is 1.
template <bool Plain>
struct PowerRatio {
  static constexpr bool kNeedsLog = !Plain;
  static constexpr bool kStaged = false;
  template <class V, class S>
  static KD_LANES RatioTerms<V> terms(V q, V d, V lq, const RowKind<S>& c) {
    const S s = c.alpha + c.beta;
    V Q = q, P;
    if constexpr (Plain) {
      P = q * exp2(d);
    } else {
      Q = exp2(V(s) * lq);
      P = Q * exp2(V(s) * d);
    }
    const V W = Q * exp2(V(c.alpha) * d);
    const V PW = P - W, QW = Q - W;
    RatioTerms<V> t;
    // (alpha / s (P - W) + beta / s (Q - W)) / (alpha beta)
    const V a(S(1) / (s * c.beta)), b(S(1) / (s * c.alpha));
    t.value = fma(a, PW, b * QW);
    t.scale = fma(abs(a), P, abs(b) * Q);
    t.student = V(S(1) / c.alpha) * QW;
    return t;
  }
};

// x = 2^u (u if the form needs logarithms) and y = v - u of n entries, whole vectors: y becomes s
// and x becomes q times *unit.
template <class Form, class V, class S>
RowTerms ratio_terms(S* x, S* y, int64_t n, const RowNumbers<S>& numbers, double* unit) {
  const RowNumbers<S> row = numbers;  // a copy that the stores below cannot alias
  const V inverse(row.inverse_s), gap(row.gap), lse(row.lse_s);
  alignas(64) S powers[Form::kStaged ? kBlock : 1], logs[Form::kStaged ? kBlock : 1];
  VecD sum_value = VecD::zero(), sum_student = sum_value, sum_square = sum_value;
  // Backwards: the end of the row is what the statistics have left in the cache, and the beginning
  // is what the gradient asks for first.
  for (int64_t begin = (n - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    const int64_t ahead = begin > kBlock ? kBlock : 0;
    if constexpr (Form::kStaged) {
      // An exponential and a logarithm in one chain are too long for the out-of-order window: apart
      // they run at their throughput.
      for (int64_t i = begin; i < end; i += V::kLanes) {
        store(powers + (i - begin), exp2(V::load(y + i) - gap));
      }
      for (int64_t i = 0; i < end - begin; i += V::kLanes) {
        store(logs + i, log2_absolute(Form::inside(V::load(powers + i), row.kind)));
      }
    }
    V value = V::zero(), square = value, student = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      prefetch(x + i - ahead);
      prefetch(y + i - ahead);
      const V d = V::load(y + i) - gap;
      V q, lq = V::zero();
      if constexpr (Form::kNeedsLog) {
        lq = V::load(x + i) - lse;
        q = exp2(lq);
        store(x + i, q);
      } else {
        q = V::load(x + i) * inverse;
      }
      RatioTerms<V> t;
      if constexpr (Form::kStaged) {
        t = Form::terms(q, d, V::load(powers + (i - begin)), V::load(logs + (i - begin)), row.kind);
      } else {
        t = Form::terms(q, d, lq, row.kind);
      }
      value += t.value;
      square = fma(t.scale, t.scale, square);
      student += t.student;
      store(y + i, t.student);
    }
    sum_value += widen_sum(value);
    sum_student += widen_sum(student);
    sum_square += widen_sum(square);
  }
  *unit = Form::kNeedsLog ? 1 : double(row.inverse_s);
  RowTerms total{reduce_add(sum_value), reduce_add(sum_student), 0, reduce_add(sum_square)};
  const double c = row.kind.other;
  total.value *= c;
  total.student *= c;
  total.square *= c * c;
  return total;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
