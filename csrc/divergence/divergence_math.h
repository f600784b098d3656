// The maths of every divergence, once, for scalars (CUDA, float64) and SIMD lanes (CPU).
//
// A row needs three sums over the vocabulary:
//   value    D = sum_v generator(p_v, q_v)                     non-negative term by term
//   student  S = sum_v s_v,  s_v = q_v dD/dq_v (+ const q_v)   so  dD/dz_v = (s_v - q_v S) / tau_s
//   teacher  T = sum_v t_v,  t_v = p_v dD/dp_v (+ const p_v)   so  dD/da_v = (t_v - p_v T) / tau_t
// (a constant multiple of q_v in s_v cancels in s_v - q_v S because sum q = 1).
//
// Everything is a function of p, q and d = log p - log q. d comes from the difference of the
// logits, not from two rounded logarithms; that, and generators without first-order terms, keeps a
// value of 1e-7 nats right to 1e-5.
//
// Zeros. p = 0 or q = 0 makes d infinite, and NaN where both are 0. Every product with d is
// selected by its probability, so 0 * inf never reaches a sum. S or T that is infinite (a reverse
// kind with p = 0 < q) means gradient 0; the row kernels decide that once a row.
#pragma once

#include <type_traits>

#include "common/macros.h"
#include "common/scalar.h"
#include "divergence/divergence.h"

namespace kd {

// One vocabulary entry.
template <class F>
struct Entry {
  F p, q;    // teacher, student probability
  F d;       // log p - log q (natural)
  F lp, lq;  // log p, log q (natural)
};

template <class F>
struct Terms {
  F value, student, teacher;
};

// Coefficients of one row, resolved from the spec and the per-row parameters. S is a scalar.
template <class S>
struct RowKind {
  S forward_kl, reverse_kl, cross_entropy, entropy;  // linear group
  S other;                                           // coefficient of the kind below
  S to_teacher, to_student, mix, mix_student;        // A KL(p||M) + B KL(q||M), M = mix p + ...
  S total_variation, squared_hellinger, triangular, chi_squared;
  S alpha, beta;
  S clip_element, clip_signed;
  S overlap;  // 1: the terms are those of sum sqrt(pq), or sum p^alpha q^beta, in place of D
};

template <class S>
KD_HOST_DEVICE RowKind<S> row_kind(const DivergenceSpec& spec, S first, S second) {
  const Kind kind = static_cast<Kind>(static_cast<int>(spec.kind));
  RowKind<S> c = {};
  c.forward_kl = S(spec.forward_kl);
  c.reverse_kl = S(spec.reverse_kl);
  c.cross_entropy = S(spec.cross_entropy);
  c.entropy = S(spec.entropy);
  c.other = S(spec.other);
  c.mix_student = spec.detach_mixture != 0 ? S(0) : S(1);
  c.clip_element = S(spec.clip_element);
  c.clip_signed = S(spec.clip_signed);
  switch (kind) {
    case Kind::kJensenShannon:
      c.to_teacher = c.mix = first;
      c.to_student = S(1) - first;
      break;
    case Kind::kSkewForward:
      c.to_teacher = S(1);
      c.mix = first;
      break;
    case Kind::kSkewReverse:
      c.to_student = S(1);
      c.mix = S(1) - first;
      break;
    case Kind::kTotalVariation:
      c.total_variation = S(1);
      break;
    case Kind::kSquaredHellinger:
      c.squared_hellinger = S(1);
      break;
    case Kind::kTriangular:
      c.triangular = S(1);
      break;
    case Kind::kChiSquared:
      c.chi_squared = S(1);
      break;
    case Kind::kAlphaBeta:
      c.alpha = first;
      c.beta = second;
      break;
    case Kind::kAlpha:
      c.alpha = first;
      c.beta = S(1) - first;
      break;
    case Kind::kNone:
      break;
  }
  // The ends of a mixture are of the linear group: M = q makes KL(p || M) the forward and KL(q ||
  // M) nothing. Jensen-Shannon's are forward and reverse KL by the trainers' convention, not its
  // limits.
  const bool jensen_shannon = kind == Kind::kJensenShannon;
  if (group_of(kind) == DivergenceGroup::kMixture && (c.mix == S(0) || c.mix == S(1))) {
    if (c.mix == S(0) && (jensen_shannon || kind == Kind::kSkewForward)) c.forward_kl += c.other;
    if (c.mix == S(1) && (jensen_shannon || kind == Kind::kSkewReverse)) c.reverse_kl += c.other;
    c.other = S(0);
  }
  return c;
}

// Below this |x| small_gap serves; above it the direct form does. float: at 1 the direct form has
// lost a factor 3, at 1/4 it would have lost 30. double: the polynomial ends at 1/4.
template <class F, class = void>
struct ScalarOf {
  using type = F;
};
template <class F>
struct ScalarOf<F, std::void_t<typename F::Scalar>> {  // SIMD lanes
  using type = typename F::Scalar;
};
template <class F>
constexpr double kSmallGap = std::is_same<typename ScalarOf<F>::type, double>::value ? 0.25 : 1.0;

// e^-x - 1 + x, accurate relative to its own size (x^2 / 2 near 0). Taylor; the first term left out
// is 5e-9 of the value at |x| = 1, 4e-15 at 1/4.
template <class F>
KD_HOST_DEVICE F small_gap(F x) {
  F r = F(-1.0 / 39916800);
  r = fma(r, x, F(1.0 / 3628800));
  r = fma(r, x, F(-1.0 / 362880));
  r = fma(r, x, F(1.0 / 40320));
  r = fma(r, x, F(-1.0 / 5040));
  r = fma(r, x, F(1.0 / 720));
  r = fma(r, x, F(-1.0 / 120));
  r = fma(r, x, F(1.0 / 24));
  r = fma(r, x, F(-1.0 / 6));
  r = fma(r, x, F(0.5));
  return r * x * x;
}

// x y with 0 where x is 0, even for infinite or NaN y. x >= 0.
template <class F>
KD_HOST_DEVICE F zero_times(F x, F y) {
  return select(x > F(0), x * y, F(0));
}

// p (e^-d - 1 + d) with q = p e^-d: the generator of KL(p || q). `difference` is q - p.
template <class F>
KD_HOST_DEVICE F kl_generator(F p, F difference, F d) {
  const F direct = max(difference + zero_times(p, d), F(0));
  return select(abs(d) < F(kSmallGap<F>), p * small_gap(d), direct);
}

// q - p, small beside p where d is.
template <class F>
KD_HOST_DEVICE F excess_of(const Entry<F>& e) {
  return select(abs(e.d) < F(kSmallGap<F>), e.p * (small_gap(e.d) - e.d), e.q - e.p);
}

template <class F, class S>
KD_HOST_DEVICE Terms<F> linear_terms(const Entry<F>& e, const RowKind<S>& c) {
  const F pq = e.q - e.p;
  // Coefficients are the same for a whole row: branches on them cost nothing.
  Terms<F> t{F(0), F(c.forward_kl + c.cross_entropy) * pq, F(0)};
  if (c.forward_kl != S(0)) {
    t.value = F(c.forward_kl) * kl_generator(e.p, pq, e.d);
    t.teacher = F(c.forward_kl) * zero_times(e.p, e.d);
  }
  if (c.reverse_kl != S(0)) {
    const F r(c.reverse_kl);
    t.value = t.value + r * kl_generator(e.q, -pq, -e.d);
    t.student = t.student - r * zero_times(e.q, e.d);
    t.teacher = t.teacher - r * pq;
  }
  if (c.cross_entropy != S(0)) {
    const F cross = F(c.cross_entropy) * zero_times(e.p, e.lq);
    t.value = t.value - cross;
    t.teacher = t.teacher - cross;
  }
  if (c.entropy != S(0)) {
    const F entropy = F(c.entropy) * zero_times(e.q, e.lq);
    t.value = t.value - entropy;
    t.student = t.student - entropy;
  }
  return t;
}

// A KL(p || M) + B KL(q || M) with M = w p + (1 - w) q, 0 < w < 1.
template <class F, class S>
KD_HOST_DEVICE Terms<F> mixture_terms(const Entry<F>& e, const RowKind<S>& c) {
  const auto above = e.d >= F(0);  // p >= q
  const F w(c.mix), v(S(1) - c.mix);
  // The larger of p and q is the base: smaller = base (1 + t), M = base (1 + y).
  const F distance = abs(e.d);
  const F t = expm1(-distance);
  const F y = select(above, v, w) * t;
  const F log_base = -log1p(y);  // log(base / M)
  const F inverse = F(1) / (F(1) + y);
  const F log_other = log_base - distance;
  const F other_ratio = (F(1) + t) * inverse;
  const F xp = select(above, log_base, log_other), xq = select(above, log_other, log_base);
  const F rp = select(above, inverse, other_ratio), rq = select(above, other_ratio, inverse);
  const F pq = select(above, -e.p * t, e.q * t);  // p - q
  const F A(c.to_teacher), B(c.to_student);
  const F slant = (A * v - B * w) * pq;  // A (p - M) + B (q - M); 0 for Jensen-Shannon
  Terms<F> out;
  out.value = select(A > F(0), A * kl_generator(e.p, -v * pq, xp), F(0)) +
              select(B > F(0), B * kl_generator(e.q, w * pq, xq), F(0));
  out.student = select(B > F(0), B * zero_times(e.q, xq), F(0)) - F(c.mix_student) * v * rq * slant;
  out.teacher = select(A > F(0), A * zero_times(e.p, xp), F(0)) - w * rp * slant;
  // An entry where both are 0 has d = NaN and adds nothing.
  const auto exists = max(e.p, e.q) > F(0);
  return {select(exists, out.value, F(0)), select(exists, out.student, F(0)),
          select(exists, out.teacher, F(0))};
}

// The larger of p and q, and the smaller = base (1 + t), sqrt(p q) = base (1 + u).
template <class F>
struct Spread {
  F base, u, t;
};

template <class F>
KD_HOST_DEVICE Spread<F> spread_of(const Entry<F>& e) {
  const F u = expm1(F(-0.5) * abs(e.d));
  return {select(e.d >= F(0), e.p, e.q), u, u * (F(2) + u)};
}

template <class F, class S>
KD_HOST_DEVICE Terms<F> probability_terms(const Entry<F>& e, const RowKind<S>& c) {
  if (c.overlap != S(0)) {
    const F w = exp(F(0.5) * (e.lp + e.lq));
    return {w, F(0.5) * w, F(0.5) * w};
  }
  const auto above = e.d >= F(0);
  const Spread<F> spread = spread_of(e);
  const F base = spread.base, u = spread.u, t = spread.t;
  const F signed_t = select(above, -t, t);  // (p - q) / base
  const F r = signed_t / (F(2) + t);        // (p - q) / (p + q)
  const F tv(c.total_variation), h(c.squared_hellinger), tri(c.triangular), chi(c.chi_squared);
  const F half(0.5), two(2), zero(0);
  Terms<F> out;
  out.value = base * (half * tv * abs(t) + half * h * u * u + tri * abs(t * r));
  const F sign = select(e.d > zero, F(-1), select(e.d < zero, F(1), zero));  // of q - p
  out.student = half * tv * e.q * sign + half * h * base * select(above, t - u, -u) -
                tri * e.q * r * (two + r);
  out.teacher = half * h * base * select(above, -u, t - u) - half * tv * e.p * sign +
                tri * e.p * r * (two - r);
  auto exists = base > zero;
  if (c.chi_squared != S(0)) {
    // Chi-squared divides by q: p^2 / q from its logarithm, for 1 + t has no bits left where d is
    // large, and p^2 / q may count where both underflow.
    const F scaled = select(above, exp(e.lp + e.d), e.q);  // base^2 / q
    out.value = chi * scaled * t * t;
    out.student = -chi * scaled * signed_t * (two + t);
    out.teacher = two * chi * signed_t * select(above, scaled, e.p);
    exists = max(e.lp, e.lq) > F(-20000);
  }
  return {select(exists, out.value, zero), select(exists, out.student, zero),
          select(exists, out.teacher, zero)};
}

// The AB divergence (Cichocki et al.; teacher exponent alpha, student exponent beta), with its true
// limits on the axes. With P = p^s, Q = q^s, W = p^alpha q^beta, s = alpha + beta and the generator
// g(x, y, l) = y - x + x l (y = x e^-l):
//   D = [g(P, Q, s d) / s - g(P, W, beta d) / beta] / alpha      where |alpha| >= |beta|
//     = [g(Q, P, -s d) / s - g(Q, W, -alpha d) / alpha] / beta   elsewhere
// Neither cancels as the small exponent goes to 0.
template <class F, class S>
KD_HOST_DEVICE Terms<F> power_terms(const Entry<F>& e, const RowKind<S>& c) {
  const S alpha = c.alpha, beta = c.beta, s = alpha + beta;
  const F zero(0);
  // An entry that is impossible on both sides is none; one whose p and q merely underflow counts.
  const auto exists = max(e.lp, e.lq) > F(-20000);
  const F d = select(exists, e.d, zero);
  if (alpha == S(0) && beta == S(0)) {
    return {F(0.5) * d * d, -d, d};
  }
  // Finite stand-ins for log 0, so that a zero exponent times log 0 is 0 and any other gives 0 or
  // inf after exp.
  const F lp = max(e.lp, F(-30000)), lq = max(e.lq, F(-30000));
  F P = e.p, Q = e.q;
  if (s != S(1)) {
    P = exp(F(s) * lp);
    Q = exp(F(s) * lq);
  }
  const F W = exp(fma(F(alpha), lp, F(beta) * lq));
  if (c.overlap != S(0)) return {W, F(beta) * W, F(alpha) * W};
  const bool teacher_side = abs(alpha) >= abs(beta);
  const S big = teacher_side ? alpha : beta, little = teacher_side ? beta : alpha;
  const F base = teacher_side ? P : Q, other = teacher_side ? Q : P;
  const F sd = teacher_side ? d : -d;
  F value = zero;
  if (s != S(0)) value = kl_generator(base, other - base, F(s) * sd) * F(S(1) / s);
  if (little != S(0)) {
    value = value - kl_generator(base, W - base, F(little) * sd) * F(S(1) / little);
    if (s != S(0)) {
      // Far apart, where d may be infinite: the two x l cancel, so they are left out.
      const F far = fma(F(S(1) / s), other - base, F(S(-1) / little) * (W - base));
      value = select(abs(d) < F(4), value, far);
    }
  }
  Terms<F> out;
  out.value = value * F(S(1) / big);
  // (Q - W) / alpha and (P - W) / beta; their limits are -Q d and P d.
  if (alpha != S(0)) {
    const F x = F(alpha) * d;
    out.student = select(abs(x) < F(0.25), -Q * expm1(x), Q - W) * F(S(1) / alpha);
  } else {
    out.student = -zero_times(Q, d);
  }
  if (beta != S(0)) {
    const F x = F(beta) * d;
    out.teacher = select(abs(x) < F(0.25), -P * expm1(-x), P - W) * F(S(1) / beta);
  } else {
    out.teacher = zero_times(P, d);
  }
  return {select(exists, out.value, zero), select(exists, out.student, zero),
          select(exists, out.teacher, zero)};
}

// The linear group plus one kind of group G, unclipped.
template <DivergenceGroup G, class F, class S>
KD_HOST_DEVICE Terms<F> whole_terms(const Entry<F>& e, const RowKind<S>& c) {
  if constexpr (G == DivergenceGroup::kLinear) {
    return linear_terms(e, c);
  } else {
    Terms<F> out{F(0), F(0), F(0)};
    if (c.other != S(0)) {
      if constexpr (G == DivergenceGroup::kMixture) out = mixture_terms(e, c);
      if constexpr (G == DivergenceGroup::kProbability) out = probability_terms(e, c);
      if constexpr (G == DivergenceGroup::kPower) out = power_terms(e, c);
      const F other(c.other);
      out.value = out.value * other;
      out.student = out.student * other;
      out.teacher = out.teacher * other;
    }
    if (c.forward_kl != S(0) || c.reverse_kl != S(0) || c.cross_entropy != S(0) ||
        c.entropy != S(0)) {
      const Terms<F> linear = linear_terms(e, c);
      out.value = out.value + linear.value;
      out.student = out.student + linear.student;
      out.teacher = out.teacher + linear.teacher;
    }
    return out;
  }
}

// An entry's terms with its summand l bounded: min(l, clip), no gradient above. A bounded sum has
// no constant that cancels: s and t must be q dl/dq and p dl/dp themselves, of the generator or,
// signed, of the raw summand.
template <class F, class S>
KD_HOST_DEVICE Terms<F> clipped_terms(Terms<F> t, const Entry<F>& e, const RowKind<S>& c) {
  // -p log q and -q log q, to which linear_terms adds q.
  F by_q(-c.cross_entropy - c.entropy);
  if (c.clip_signed != S(0)) {
    // p log(p/q) is its generator + p - q; A p log(p/M) + B q log(q/M) is its own plus
    // A (p - M) + B (q - M).
    const S a = c.other * c.to_teacher, b = c.other * c.to_student;
    const S slant = a * (S(1) - c.mix) - b * c.mix;
    const S apart = c.forward_kl - c.reverse_kl;
    const S mixed = b - (a + b) * (S(1) - c.mix) * c.mix_student;
    t.value = t.value + F(apart + slant) * (e.p - e.q);
    by_q = by_q + F(mixed - apart);
    t.teacher = t.teacher + F(apart + a - (a + b) * c.mix) * e.p;
  }
  t.student = t.student + by_q * e.q;
  const F clip(c.clip_element), zero(0);
  const auto free = t.value <= clip;
  return {select(free, t.value, clip), select(free, t.student, zero),
          select(free, t.teacher, zero)};
}

// All terms of an entry.
template <DivergenceGroup G, class F, class S>
KD_HOST_DEVICE Terms<F> terms(const Entry<F>& e, const RowKind<S>& c) {
  const Terms<F> whole = whole_terms<G>(e, c);
  return c.clip_element > S(0) ? clipped_terms(whole, e, c) : whole;
}

// Bhattacharyya's and Renyi's logarithms are of the rows' overlap, sum sqrt(pq) or sum p^alpha
// q^(1-alpha). Where that is small, 1 - sum of generators has lost it: such a row is summed again
// as its overlap. Renyi beyond alpha = 1 has no such row.
template <class S>
KD_HOST_DEVICE bool has_overlap(const DivergenceSpec& spec, S first) {
  const Outer outer = static_cast<Outer>(static_cast<int>(spec.outer));
  return outer == Outer::kBhattacharyya || (outer == Outer::kRenyi && first > S(0) && first < S(1));
}

template <class S>
KD_HOST_DEVICE bool hardly_overlaps(S sum, const RowKind<S>& c, const DivergenceSpec& spec,
                                    S first) {
  if (!has_overlap(spec, first) || c.other != S(1) || c.clip_element > S(0)) return false;
  const S lost = c.squared_hellinger != S(0) ? sum : first * (S(1) - first) * sum;
  return lost > S(0.75);
}

// The row's own arithmetic: sum of generators -> D -> value, and the slope d(value)/d(sum).
template <class S>
struct RowValue {
  S divergence;  // D, before clip
  S value;       // after clip and tau^2, before label term and weight
  S slope;       // d value / d(sum of generators)
};

template <class S>
KD_HOST_DEVICE RowValue<S> finish_row(S sum, const DivergenceSpec& spec, S first, S tau,
                                      bool overlap) {
  RowValue<S> row{sum, S(0), S(1)};
  switch (static_cast<Outer>(static_cast<int>(spec.outer))) {
    case Outer::kIdentity:
      break;
    case Outer::kSqrt:
      row.divergence = sqrt(sum);
      row.slope = sum > S(0) ? S(0.5) / row.divergence : S(0);
      break;
    case Outer::kBhattacharyya:
      row.divergence = overlap ? -log(sum) : -log1p(-sum);
      row.slope = overlap ? S(-1) / sum : S(1) / (S(1) - sum);
      break;
    case Outer::kRenyi: {
      const S k = first - S(1);
      if (k != S(0)) {
        const S inside = first * k * sum;
        row.divergence = (overlap ? log(sum) : log1p(inside)) / k;
        row.slope = overlap ? S(1) / (k * sum) : first / (S(1) + inside);
      }
      break;
    }
  }
  row.value = row.divergence;
  const S clip = S(spec.clip_token);
  if (clip > S(0) && row.value > clip) {
    row.value = clip;
    row.slope = S(0);
  }
  if (spec.temperature_squared != 0) {
    row.value = row.value * tau * tau;
    row.slope = row.slope * tau * tau;
  }
  return row;
}

}  // namespace kd
