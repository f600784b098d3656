// The maths of the relation kinds, entry by entry: the same text for float, double and SIMD lanes.
//
// A row is walked up to four times: maxima and sums (softmax, Gram kinds), then values and the sums
// that the gradient needs, then the gradient. Kinds whose gradient needs no such sum are `fused`:
// value and gradient in one walk.
#pragma once

#include "common/macros.h"
#include "common/scalar.h"
#include "relation/relation.h"

namespace kd::relation {

using Kind = RelationKind;

constexpr double kNormFloor = 1e-12;     // gram_row_l2: floor of a row's norm
constexpr double kSquaredFloor = 1e-12;  // distance: floor of a squared distance
constexpr double kPktEpsilon = 1e-7;

constexpr bool is_softmax(Kind kind) {
  return kind <= Kind::kSoftmaxMse || kind == Kind::kLogSumExp;
}
constexpr bool is_gram(Kind kind) {
  return kind == Kind::kGramRowL2 || kind == Kind::kGramRowL1;
}
constexpr bool is_distance(Kind kind) {
  return kind == Kind::kDistanceSum || kind == Kind::kDistance;
}
constexpr bool is_element(Kind kind) {
  return kind >= Kind::kMse && kind <= Kind::kMarginL1;
}
constexpr bool has_teacher(Kind kind) {
  return kind != Kind::kLogSumExp;
}
// The student's gradient of an entry needs no sum over the row's values.
constexpr bool is_fused(Kind kind) {
  return is_element(kind) || is_distance(kind) || kind == Kind::kSoftmaxKl ||
         kind == Kind::kSoftmaxCrossEntropy || kind == Kind::kLogSumExp;
}

// The number type of a lane type.
template <class F>
struct ScalarOf {
  using type = typename F::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

// What is the same for all entries of a row.
template <class F>
struct Constants {
  F s, t;                  // softmax: log-sum-exp; gram: 1 / norm; distance: 1 / mean
  F inverse_s, inverse_t;  // softmax, where exponentials are kept: 1 / sum e^(a - max)
  F shift;                 // softmax: lse_t - lse_s, rounded once
  F es, et;                // sums of Terms::es and Terms::et over the row
  F beta, margin, clamp;
  bool clamped;
  bool floored_s, floored_t;  // gram_row_l2: the norm is at its floor and carries no gradient
};

template <class F>
struct Terms {
  F value, es, et;
};

// p (e^-d - 1 + d) = q - p + p d for q = p e^-d: not negative, and accurate also where d is small.
template <class F>
KD_HOST_DEVICE F kl_generator(F p, F q, F d) {
  F tail = fma(d, F(-1.0 / 5040), F(1.0 / 720));
  tail = fma(d, tail, F(-1.0 / 120));
  tail = fma(d, tail, F(1.0 / 24));
  tail = fma(d, tail, F(-1.0 / 6));
  tail = fma(d, tail, F(0.5));
  if constexpr (sizeof(typename ScalarOf<F>::type) == 8) {
    // Six more terms: 2^-53 at |d| = 1/8, inside of which they are used.
    F more = fma(d, F(-1.0 / 6227020800), F(1.0 / 479001600));
    more = fma(d, more, F(-1.0 / 39916800));
    more = fma(d, more, F(1.0 / 3628800));
    more = fma(d, more, F(-1.0 / 362880));
    more = fma(d, more, F(1.0 / 40320));
    const F d2 = d * d;
    tail = fma(d2 * d2 * d2, more, tail);
    return select(abs(d) < F(0.125), p * (d2 * tail), fma(p, d, q - p));
  }
  return select(abs(d) < F(0.25), p * (d * d * tail), fma(p, d, q - p));
}

// NaN stays NaN.
template <class F>
KD_HOST_DEVICE F sign(F x) {
  return select(x > F(0), F(1), select(x < F(0), F(-1), x));
}

// rho and its derivative for the element kinds; beta > 0.
template <Kind kKind, class F>
KD_HOST_DEVICE F rho(F x, F beta, F margin) {
  const F size = abs(x);
  if constexpr (kKind == Kind::kMse) return x * x;
  if constexpr (kKind == Kind::kL1) return size;
  if constexpr (kKind == Kind::kSmoothL1 || kKind == Kind::kDistance) {
    return select(size < beta, F(0.5) * x * x / beta, size - F(0.5) * beta);
  }
  if constexpr (kKind == Kind::kHuber) {
    return select(size < beta, F(0.5) * x * x, beta * (size - F(0.5) * beta));
  }
  return select(size <= margin, F(0), size - margin);
}
template <Kind kKind, class F>
KD_HOST_DEVICE F rho_slope(F x, F beta, F margin) {
  const F size = abs(x);
  if constexpr (kKind == Kind::kMse) return x + x;
  if constexpr (kKind == Kind::kL1) return sign(x);
  if constexpr (kKind == Kind::kSmoothL1 || kKind == Kind::kDistance) {
    return select(size < beta, x / beta, sign(x));
  }
  if constexpr (kKind == Kind::kHuber) return select(size < beta, x, beta * sign(x));
  return select(size <= margin, F(0), sign(x));
}

// The entries of both maps of gram_row_l1: P = r / sum r with r = (a + 1) / 2, and the exact d.
template <class F>
struct PktEntry {
  F ps, pt, d;
  KD_HOST_DEVICE PktEntry(F as, F at, const Constants<F>& c)
      : ps((as + F(1)) * F(0.5) * c.s), pt((at + F(1)) * F(0.5) * c.t) {
    d = log1p((pt - ps) / (ps + F(kPktEpsilon)));
  }
};

// Value of an entry, and what the gradient needs summed over the row. The row value is the sum of
// the values. Softmax kinds: p, q are the entry's chances, which a row loop may already have.
template <Kind kKind, class F>
KD_HOST_DEVICE Terms<F> softmax_terms(F p, F q, F as, F at, const Constants<F>& c) {
  const F zero(0);
  if constexpr (kKind == Kind::kSoftmaxKl) {
    const F value = kl_generator(p, q, (at - as) - c.shift);
    return {value, zero, value};
  } else if constexpr (kKind == Kind::kSoftmaxCrossEntropy) {
    const F value = p * (c.s - as);
    return {value, zero, value};
  } else if constexpr (kKind == Kind::kSoftmaxReverseKl) {
    const F value = kl_generator(q, p, (as - at) + c.shift);
    return {value, value, zero};
  } else if constexpr (kKind == Kind::kSoftmaxMse) {
    const F x = q - p;
    return {x * x, x * q, x * p};
  } else {
    return {zero, zero, zero};
  }
}

template <Kind kKind, class F>
KD_HOST_DEVICE Terms<F> terms(F as, F at, const Constants<F>& c) {
  const F zero(0);
  if constexpr (kKind == Kind::kLogSumExp) {
    return {zero, zero, zero};
  } else if constexpr (is_softmax(kKind)) {
    return softmax_terms<kKind>(exp(at - c.t), exp(as - c.s), as, at, c);
  } else if constexpr (kKind == Kind::kGramRowL2) {
    const F us = as * c.s, ut = at * c.t, x = us - ut;
    return {x * x, x * us, x * ut};
  } else if constexpr (kKind == Kind::kGramRowL1) {
    const PktEntry<F> e(as, at, c);
    const F epsilon(kPktEpsilon);
    // Summed over the row the generator is the published sum: both P add up to 1.
    const F value = kl_generator(e.pt + epsilon, e.ps + epsilon, e.d) - epsilon * e.d;
    return {value, e.pt / (e.ps + epsilon) * e.ps, (e.d + e.pt / (e.pt + epsilon)) * e.pt};
  } else if constexpr (kKind == Kind::kDistanceSum) {
    return {as, zero, zero};
  } else if constexpr (kKind == Kind::kDistance) {
    return {rho<kKind>(as * c.s - at * c.t, c.beta, c.margin), zero, zero};
  } else {
    return {rho<kKind>(as - at, c.beta, c.margin), zero, zero};
  }
}

// d row value / d a_s and / d a_t of an entry. Distance kinds: / d distance.
template <Kind kKind, class F>
KD_HOST_DEVICE void softmax_gradient(F p, F q, F as, F at, const Constants<F>& c, F* gs, F* gt) {
  if constexpr (kKind == Kind::kSoftmaxKl) {
    *gs = q - p;
    *gt = p * ((at - as) - c.shift - c.et);
  } else if constexpr (kKind == Kind::kSoftmaxCrossEntropy) {
    *gs = q - p;
    *gt = p * ((c.s - as) - c.et);
  } else if constexpr (kKind == Kind::kSoftmaxReverseKl) {
    *gs = q * ((as - at) + c.shift - c.es);
    *gt = p - q;
  } else if constexpr (kKind == Kind::kSoftmaxMse) {
    const F x = q - p;
    *gs = F(2) * q * (x - c.es);
    *gt = F(-2) * p * (x - c.et);
  } else {
    *gs = q;
    *gt = F(0);
  }
}

template <Kind kKind, class F>
KD_HOST_DEVICE void gradient(F as, F at, const Constants<F>& c, F* gs, F* gt) {
  if constexpr (is_softmax(kKind)) {
    const F p = has_teacher(kKind) ? exp(at - c.t) : F(0);
    softmax_gradient<kKind>(p, exp(as - c.s), as, at, c, gs, gt);
  } else if constexpr (kKind == Kind::kGramRowL2) {
    const F us = as * c.s, ut = at * c.t, x = us - ut;
    *gs = F(2) * c.s * (c.floored_s ? x : fma(us, -c.es, x));
    *gt = F(-2) * c.t * (c.floored_t ? x : fma(ut, -c.et, x));
  } else if constexpr (kKind == Kind::kGramRowL1) {
    const PktEntry<F> e(as, at, c);
    const F epsilon(kPktEpsilon);
    *gs = F(0.5) * c.s * (c.es - e.pt / (e.ps + epsilon));
    *gt = F(0.5) * c.t * (e.d + e.pt / (e.pt + epsilon) - c.et);
  } else if constexpr (kKind == Kind::kDistanceSum) {
    *gs = F(1);
    *gt = F(1);
  } else if constexpr (kKind == Kind::kDistance) {
    const F slope = rho_slope<kKind>(as * c.s - at * c.t, c.beta, c.margin);
    *gs = slope;
    *gt = -slope;
  } else {
    const F slope = rho_slope<kKind>(as - at, c.beta, c.margin);
    *gs = slope;
    *gt = -slope;
  }
}

// Distance from a product and two squared norms.
template <class F>
KD_HOST_DEVICE F squared_distance(F product, F row, F column) {
  return fma(F(-2), product, row + column);
}

}  // namespace kd::relation
