// The fast passes between statistics and gradient: terms of each entry from what the statistics
// left in scratch, for the kinds outside the linear group.
//
//   pair    x = 2^u and y = 2^v (mixtures, total variation, triangular): at most a division and a
//           logarithm an entry
//   power   sum w with w = p^alpha q^(1 - alpha) is all that D needs, and q and w all that the
//           gradient needs (Hellinger, chi-squared, alpha): the statistics have made both, so there
//           is no pass at all
//   log     u and v - u (alpha-beta): exponentials of their multiples
//
// Entries stay in units of x or y; normalisers and coefficients are applied once a row, in double.
//
// Against the five to eight transcendental functions of divergence_math.h the price is
// cancellation: an entry's value is right to about 1e-7 of `scale`. Roundings are independent from
// entry to entry, so the sum's error is 1e-7 sqrt(sum scale^2); a row whose value is not well above
// that is finished by exact_terms(). S follows the conventions of divergence_math.h.
#pragma once

#include "divergence/divergence_math.h"
#include "divergence/divergence_statistics.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

constexpr double kLargestGap = 60;    // base 2, of p / q
constexpr double kLargestPower = 60;  // base 2, of the normaliser of w

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

// The terms of a row, and its gradient in scratch: (shift - S) q_unit x + cy y. No teacher's term:
// its gradient takes the exact way.
struct FastTerms {
  RowTerms terms;
  double q_unit, shift, cy;
};

// Pairs -------------------------------------------------------------------------------------------

// Calls block(begin, end, ahead) backwards over n entries: the end of the row is what the
// statistics have left in the cache, and the beginning is what the gradient asks for first.
// begin - ahead is where the next block lies, which no hardware prefetcher guesses.
template <class Block>
KD_LANES void backwards(int64_t n, const Block& block) {
  for (int64_t begin = (n - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
    block(begin, begin + kBlock < n ? begin + kBlock : n, begin > kBlock ? kBlock : 0);
  }
}

// sum x^2, for the sum of scale^2 of a row whose p and q are close.
template <class V, class S>
double sum_of_squares(const S* x, int64_t n) {
  VecD sum = VecD::zero();
  backwards(n, [&](int64_t begin, int64_t end, int64_t) {
    V square = V::zero();
    for (int64_t i = begin; i < end; i += V::kLanes) {
      const V at = V::load(x + i);
      square = fma(at, at, square);
    }
    sum += widen_sum(square);
  });
  return reduce_add(sum);
}

enum class Mixture { kJensenShannon, kSkewForward, kSkewReverse };

// A KL(p || M) + B KL(q || M) from logarithms of one share: q / M, or p / M for the forward skew.
//   Jensen-Shannon   beta KL(p || q) + sum M log(q / M), whose first part the statistics have (kl)
// y becomes s in units that the result tells.
template <Mixture M, class V, class S>
FastTerms mixture_pass(const S* x, S* y, int64_t n, const RowSums<S>& sums, const RowKind<S>& c,
                       double kl) {
  constexpr bool kForward = M == Mixture::kSkewForward;
  const double w = c.mix, v = 1 - w, ratio = sums.sum_s / sums.sum_t;
  // M = kx x + ky y in units of the share's numerator.
  const S weight_x = static_cast<S>(kForward ? v / ratio : v);
  const S weight_y = static_cast<S>(kForward ? w : w * ratio);
  const double slanted = v * double(c.mix_student) / kLn2;
  const V kx(weight_x), ky(weight_y), least(S(0x1p-120f)), one(1), slant(static_cast<S>(slanted));
  alignas(64) S shares[2][kBlock];
  const auto share_at = [&](int64_t i) {
    const V at_x = V::load(x + i), at_y = V::load(y + i);
    // Finite and positive, also where both are 0 or subnormal.
    const V mixture = max(least, fma(at_y, ky, at_x * kx));
    return max(least, (kForward ? at_y : at_x) / mixture);
  };
  const auto share_block = [&](int64_t begin, int64_t end, S* out) {
    for (int64_t i = begin; i < end; i += V::kLanes) store(out + (i - begin), share_at(i));
  };
  VecD sum_value = VecD::zero(), sum_other = sum_value, sum_student = sum_value;
  const int64_t last = (n - 1) / kBlock * kBlock;
  share_block(last, n, shares[0]);
  int side = 0;
  backwards(n, [&](int64_t begin, int64_t end, int64_t) {
    // A division and a logarithm in one chain are too long for the out-of-order window. Side by
    // side, the one a block ahead of the other, they run at their throughput.
    const S* const share_of = shares[side];
    side = 1 - side;
    S* const next = shares[side];
    V value = V::zero(), other = value, student = value;
    const auto entry = [&](int64_t i) {
      const V at_x = V::load(x + i), at_y = V::load(y + i), share = V::load(share_of + (i - begin));
      const V log_share = log2_absolute(share);
      V s;
      if constexpr (M == Mixture::kJensenShannon) {
        s = at_x * log_share;
        other = fma(at_y, log_share, other);
      } else if constexpr (kForward) {
        s = at_x * (one - share);
        value = fma(at_y, log_share, value);
      } else {
        s = at_x * fma(slant, one - share, log_share);
        value = fma(at_x, log_share, value);
      }
      student += s;
      store(y + i, s);
    };
    if (begin > 0 && end == begin + kBlock) {
      const int64_t ahead = begin > kBlock ? 2 * kBlock : kBlock;
      for (int64_t i = begin; i < end; i += V::kLanes) {
        prefetch(x + i - ahead);
        prefetch(y + i - ahead);
        store(next + (i - begin), share_at(i - kBlock));
        entry(i);
      }
    } else {
      if (begin > 0) share_block(begin - kBlock, begin, next);
      for (int64_t i = begin; i < end; i += V::kLanes) entry(i);
    }
    sum_value += widen_sum(value);
    sum_other += widen_sum(other);
    sum_student += widen_sum(student);
  });
  const double by_s = kLn2 / sums.sum_s, by_t = kLn2 / sums.sum_t;
  const double student = reduce_add(sum_student);
  // M as computed sums to 1 + this, which enters in the first order.
  const double excess = kForward ? double(weight_x) * ratio + double(weight_y) - 1
                                 : double(weight_x) + double(weight_y) / ratio - 1;
  FastTerms made{{}, 1 / sums.sum_s, 0, 0};
  if constexpr (M == Mixture::kJensenShannon) {
    made.terms.value = w * kl + v * by_s * student + w * by_t * reduce_add(sum_other) + excess;
    made.cy = double(c.to_student) * by_s;
  } else {
    made.terms.value = (kForward ? by_t : by_s) * reduce_add(sum_value) + excess;
    made.cy = kForward ? v / sums.sum_s : by_s;
  }
  made.terms.student = made.cy * student;
  return made;
}

// sum |p - q| / 2.
template <class V, class S>
FastTerms total_variation_pass(const S* x, S* y, int64_t n, const RowSums<S>& sums) {
  const V ky(static_cast<S>(sums.sum_s / sums.sum_t)), zero = V::zero();
  VecD sum_value = VecD::zero(), sum_student = sum_value;
  backwards(n, [&](int64_t begin, int64_t end, int64_t ahead) {
    V value = V::zero(), student = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      prefetch(x + i - ahead);
      prefetch(y + i - ahead);
      const V q = V::load(x + i), pq = fms(V::load(y + i), ky, q);
      const V s = select(pq > zero, q, select(pq < zero, -q, zero));
      value += abs(pq);
      student += s;
      store(y + i, s);
    }
    sum_value += widen_sum(value);
    sum_student += widen_sum(student);
  });
  const double half = 0.5 / sums.sum_s;
  return {
      {half * reduce_add(sum_value), -half * reduce_add(sum_student)}, 1 / sums.sum_s, 0, -half};
}

// sum (p - q)^2 / (p + q).
template <class V, class S>
FastTerms triangular_pass(const S* x, S* y, int64_t n, const RowSums<S>& sums) {
  const V ky(static_cast<S>(sums.sum_s / sums.sum_t)), least(S(0x1p-120f)), two(2);
  VecD sum_value = VecD::zero(), sum_student = sum_value, sum_square = sum_value;
  backwards(n, [&](int64_t begin, int64_t end, int64_t ahead) {
    V value = V::zero(), student = value, square = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      prefetch(x + i - ahead);
      prefetch(y + i - ahead);
      const V q = V::load(x + i), at_y = V::load(y + i);
      const V pq = fms(at_y, ky, q), share = pq / max(fma(at_y, ky, q), least);
      const V s = q * share * (two + share);
      value = fma(pq, share, value);
      square = fma(pq, pq, square);
      student += s;
      store(y + i, s);
    }
    sum_value += widen_sum(value);
    sum_square += widen_sum(square);
    sum_student += widen_sum(student);
  });
  const double by = 1 / sums.sum_s;
  return {{by * reduce_add(sum_value), -by * reduce_add(sum_student), 0,
           by * by * reduce_add(sum_square)},
          by,
          0,
          -by};
}

// Powers ------------------------------------------------------------------------------------------

// D = factor (1 - sum w), w = p^alpha q^(1 - alpha).
template <class S>
struct PowerKind {
  S alpha;
  double factor;

  explicit PowerKind(const RowKind<S>& c) : alpha(c.alpha), factor(1) {
    if (c.squared_hellinger != S(0)) {
      alpha = S(0.5);
    } else if (c.chi_squared != S(0)) {
      alpha = S(2);
      factor = -1;
    } else {
      factor = 1 / (double(c.alpha) * (1 - double(c.alpha)));
    }
  }
};

// The same for a row whose D is small, from differences of entries in place of differences of sums:
// D = factor sum (sqrt p - sqrt q)^2 / 2 for alpha 1/2 and -factor sum (p - q)^2 / q for alpha 2. y
// becomes q - w in units of x, so that s and S carry the same roundings.
template <class V, class S>
RowTerms small_overlap_pass(const S* x, S* y, int64_t n, S alpha, double ratio) {
  const V by_w(static_cast<S>(ratio)), tiny(S(0x1p-100f)), half(S(0.5));
  const bool root = alpha == S(0.5), square_root = alpha == S(2);
  VecD sum_value = VecD::zero(), sum_student = sum_value, sum_square = sum_value;
  backwards(n, [&](int64_t begin, int64_t end, int64_t ahead) {
    V value = V::zero(), student = value, square = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      prefetch(x + i - ahead);
      prefetch(y + i - ahead);
      const V q = V::load(x + i), w = V::load(y + i), qw = fnma(w, by_w, q);
      if (root) value += half * qw * qw / max(tiny, q);
      if (square_root) {  // q - w is a difference of squares
        const V part = qw / max(tiny, sqrt(w * by_w) + sqrt(q));
        value = fma(part, part, value);
      }
      square = fma(qw, qw, square);
      student += qw;
      store(y + i, qw);
    }
    sum_value += widen_sum(value);
    sum_student += widen_sum(student);
    sum_square += widen_sum(square);
  });
  return {reduce_add(sum_value), reduce_add(sum_student), 0, reduce_add(sum_square)};
}

template <class V, class S>
FastTerms overlap_terms(const S* x, S* y, int64_t n, const RowSums<S>& sums,
                        const RowNumbers<S>& row, double smallest) {
  const PowerKind<S> kind(row.kind);
  const double q_unit = 1 / sums.sum_s, by_student = kind.factor * (1 - double(kind.alpha));
  const double ratio = __builtin_exp2(-double(kind.alpha) * row.exact_gap);
  const double by_w = ratio * q_unit, lost = 1 - sums.power * by_w;
  RowTerms t;
  t.value = kind.factor * lost;
  t.student = by_student * lost;
  t.square = kind.factor * kind.factor * sums.power_square * by_w * by_w;
  if (t.value >= smallest * __builtin_sqrt(t.square))
    return {t, q_unit, by_student, -by_student * by_w};
  const RowTerms small = small_overlap_pass<V>(x, y, n, kind.alpha, ratio);
  if (kind.alpha == S(0.5) || kind.alpha == S(2)) {
    const double factor = __builtin_fabs(kind.factor) * q_unit;
    t.value = factor * small.value;
    t.square = factor * factor * small.square;
  }
  t.student = by_student * q_unit * small.student;
  return {t, q_unit, 0, by_student * q_unit};
}

// Logarithms --------------------------------------------------------------------------------------

// The AB divergence where alpha, beta and their sum are not 0: x = u and y = v - u of n entries
// become q and s.
template <class V, class S>
RowTerms log_ratio_terms(S* x, S* y, int64_t n, const RowNumbers<S>& numbers) {
  const RowNumbers<S> row = numbers;  // a copy that the stores below cannot alias
  const S s = row.kind.alpha + row.kind.beta;
  const V gap(row.gap), lse(row.lse_s), both(s), alpha(row.kind.alpha);
  const V by_p(S(1) / (s * row.kind.beta)), by_q(S(1) / (s * row.kind.alpha));
  const V by_student(S(1) / row.kind.alpha);
  VecD sum_value = VecD::zero(), sum_student = sum_value, sum_square = sum_value;
  backwards(n, [&](int64_t begin, int64_t end, int64_t ahead) {
    V value = V::zero(), square = value, student = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      prefetch(x + i - ahead);
      prefetch(y + i - ahead);
      const V d = V::load(y + i) - gap, lq = V::load(x + i) - lse;
      const V Q = exp2(both * lq), P = Q * exp2(both * d), W = Q * exp2(alpha * d);
      // (alpha / s (P - W) + beta / s (Q - W)) / (alpha beta)
      const V QW = Q - W, term = by_student * QW;
      value += fma(by_p, P - W, by_q * QW);
      const V scale = fma(abs(by_p), P, abs(by_q) * Q);
      square = fma(scale, scale, square);
      student += term;
      store(x + i, exp2(lq));
      store(y + i, term);
    }
    sum_value += widen_sum(value);
    sum_student += widen_sum(student);
    sum_square += widen_sum(square);
  });
  return {reduce_add(sum_value), reduce_add(sum_student), 0, reduce_add(sum_square)};
}

// -------------------------------------------------------------------------------------------------

// How a row is evaluated between its statistics and its gradient.
enum class Way { kForward, kReverse, kLinear, kPair, kPower, kLogRatio, kExact };

// The fast ways keep the row pair in scratch and serve a student gradient alone.
template <class S>
Way way_of(const RowKind<S>& c, DivergenceGroup group, bool fast) {
  const bool linear =
      c.forward_kl != S(0) || c.reverse_kl != S(0) || c.cross_entropy != S(0) || c.entropy != S(0);
  if (c.clip_element > S(0)) return Way::kExact;
  if (c.other == S(0)) {
    if (c.reverse_kl == S(0) && c.entropy == S(0)) return Way::kForward;
    const bool plain = c.cross_entropy == S(0) && c.entropy == S(0);
    return plain && fast && sizeof(S) == 4 ? Way::kReverse : Way::kLinear;
  }
  if (linear || !fast || sizeof(S) == 8) return Way::kExact;
  if (group != DivergenceGroup::kPower) {
    return c.squared_hellinger != S(0) || c.chi_squared != S(0) ? Way::kPower : Way::kPair;
  }
  if (c.alpha == S(0) || c.beta == S(0) || c.alpha + c.beta == S(0)) return Way::kExact;
  return c.alpha + c.beta == S(1) ? Way::kPower : Way::kLogRatio;
}

// The first pass of a way that keeps the row pair.
template <class S, class TS, class TT, class BeforeWrite>
RowSums<S> kept_statistics(Way way, const RowKind<S>& kind, Side<TS>* z, Side<TT>* a, S* x, S* y,
                           const BeforeWrite& before_write) {
  const S alpha = PowerKind<S>(kind).alpha;
  switch (way) {
    case Way::kForward:
      return row_statistics<Keep::kExponentials>(z, a, x, y, before_write);
    case Way::kPair:
      return row_statistics<Keep::kPair>(z, a, x, y, before_write);
    case Way::kPower:
      return row_statistics<Keep::kPower>(z, a, x, y, before_write, alpha);
    case Way::kLogRatio:
      return row_statistics<Keep::kLogRatio>(z, a, x, y, before_write);
    default:
      return row_statistics<Keep::kRatio>(z, a, x, y, before_write);
  }
}

// Whether scratch says enough about this row.
template <class S>
bool scratch_serves(Way way, const RowSums<S>& sums, const RowNumbers<S>& row) {
  if (way != Way::kForward && !(sums.sum_s > 0 && sums.sum_t > 0)) return false;
  if (way == Way::kPower) {  // w must neither overflow nor underflow
    const double alpha = PowerKind<S>(row.kind).alpha;
    const double normaliser = double(row.lse_s) + alpha * row.exact_gap;
    return __builtin_fabs(normaliser) < kLargestPower && sums.power < 0x1p100;
  }
  // KL(p || q), or p / q of every entry, has a part in the value.
  const bool needs_near =
      way == Way::kReverse || way == Way::kLogRatio ||
      (way == Way::kPair && row.kind.to_teacher != S(0) && row.kind.to_student != S(0));
  return !needs_near || sums.top_gap - row.exact_gap < kLargestGap;
}

// Terms of the ways kPair, kPower and kLogRatio. smallest: of a value, beside sqrt(sum
// scale^2).
template <class V, class S>
FastTerms fast_terms(S* x, S* y, int64_t n, Way way, const RowSums<S>& sums,
                     const RowNumbers<S>& row, double smallest) {
  const RowKind<S>& c = row.kind;
  FastTerms fast;  // without the coefficient
  if (way == Way::kPower) {
    fast = overlap_terms<V>(x, y, n, sums, row, smallest);
  } else if (way == Way::kLogRatio) {
    fast = {log_ratio_terms<V>(x, y, n, row), 1, 0, 1};
  } else if (c.triangular != S(0)) {
    fast = triangular_pass<V>(x, y, n, sums);
  } else {
    if (c.total_variation != S(0)) {
      fast = total_variation_pass<V>(x, y, n, sums);
    } else if (c.to_teacher == S(0)) {
      fast = mixture_pass<Mixture::kSkewReverse, V>(x, y, n, sums, c, 0);
    } else if (c.to_student == S(0)) {
      fast = mixture_pass<Mixture::kSkewForward, V>(x, y, n, sums, c, 0);
    } else {
      const double kl = kLn2 * (sums.gap / sums.sum_t - row.exact_gap);
      fast = mixture_pass<Mixture::kJensenShannon, V>(x, y, n, sums, c, kl);
    }
    // scale is p + q, twice for the skew kinds: their first-order terms cancel between entries
    // alone. sum q^2 is 1 at most: a larger value need not know it.
    const bool skew = c.total_variation == S(0) && (c.to_teacher == S(0) || c.to_student == S(0));
    const double scale = skew ? 4 : 2;
    if (fast.terms.value < scale * smallest) {
      fast.terms.square = scale * scale * fast.q_unit * fast.q_unit * sum_of_squares<V>(x, n);
    }
  }
  const double other = c.other;
  fast.terms.value *= other;
  fast.terms.student *= other;
  fast.terms.square *= other * other;
  fast.shift *= other;
  fast.cy *= other;
  return fast;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
