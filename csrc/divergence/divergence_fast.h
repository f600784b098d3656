// Second pass: p, q and the terms of each entry, from base-2 log-probabilities, and their sums.
//
// The forms here are the fast ones: two exponentials, one logarithm or one division less than
// divergence_math.h, at the price of cancellation between terms the size of p and q, or of `scale`
// where that is larger. A row whose value is small against them is finished by exact_value(). S and T of either form follow the same conventions, and their
// error is 1e-7 of p + q, that of any gradient computed from rounded probabilities.
#pragma once

#include "divergence/divergence_math.h"
#include "divergence/divergence_statistics.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

// What the passes after the first know about a row.
template <class S>
struct RowNumbers {
  S scale_s, scale_t;  // log2(e) / tau
  S max_s, max_t;      // references of the first pass
  S lse_s, lse_t;      // log2 of the sums; log2 q = u - lse_s
  S inverse_s, inverse_t;  // 1 / sum
  double gap;              // lse_t - lse_s
  S tau_s, tau_t;
  RowKind<S> kind;
  bool has_linear;
};

template <class V>
struct Fast {
  V p, q;
  V value, scale;       // summed to D; what cancels in it where that exceeds p + q
  V student, teacher;   // s and t of divergence_math.h
};

struct RowTerms {
  double value = 0, scale = 0, student = 0, teacher = 0;
};

template <class V, class S>
KD_LANES void add_linear(V lp, V lq, const RowKind<S>& c, Fast<V>* f) {
  const V zero = V::zero(), ln2(kLn2);
  const V d = (lp - lq) * ln2;
  const V pq = f->q - f->p;
  const V qd = f->q * d, pd = f->p * d;
  f->value += fma(V(c.forward_kl), pd, -V(c.reverse_kl) * qd);
  f->student += V(c.forward_kl + c.cross_entropy) * pq - V(c.reverse_kl) * qd;
  f->teacher += V(c.forward_kl) * pd - V(c.reverse_kl) * pq;
  if (c.cross_entropy != S(0) || c.entropy != S(0)) {
    const V plq = f->p * lq * ln2, qlq = f->q * lq * ln2;
    f->value -= fma(V(c.cross_entropy), plq, V(c.entropy) * qlq);
    f->student -= V(c.entropy) * qlq;
    f->teacher -= V(c.cross_entropy) * plq;
  }
  // An impossible student logit has no gradient; without this it would have that of its p.
  f->student = select(lq <= V(S(0.5) * S(kDead)), zero, f->student);
}

struct LinearForm {
  template <class V, class S>
  static KD_LANES Fast<V> terms(V lp, V lq, const RowKind<S>&) {
    const V zero = V::zero();
    return {exp2(lp), exp2(lq), zero, zero, zero, zero};
  }
};

struct MixtureForm {
  template <class V, class S>
  static KD_LANES Fast<V> terms(V lp, V lq, const RowKind<S>& c) {
    const V d = lp - lq;
    const auto above = d >= V::zero();
    const V distance = abs(d);
    const V base = exp2(max(lp, lq)), ratio = exp2(-distance);
    const V other = base * ratio;
    // M = base (w' + (1 - w') ratio), w' the base's share of M.
    const V w(c.mix), v(S(1) - c.mix);
    const V inside = fma(select(above, v, w), ratio, select(above, w, v));
    const V log_base = -log2(inside);  // log2(base / M)
    const V log_other = log_base - distance;
    Fast<V> f;
    f.p = select(above, base, other);
    f.q = select(above, other, base);
    const V A(c.to_teacher * c.other * S(kLn2)), B(c.to_student * c.other * S(kLn2));
    f.teacher = A * f.p * select(above, log_base, log_other);
    f.student = B * f.q * select(above, log_other, log_base);
    f.value = f.teacher + f.student;
    f.scale = V::zero();
    const S slant = c.to_teacher * (S(1) - c.mix) - c.to_student * c.mix;
    if (slant != S(0)) {
      const V inverse = V(1) / inside;  // base / M
      const V pq = V(slant * c.other) * (f.p - f.q);
      const V rp = select(above, inverse, inverse * ratio);
      const V rq = select(above, inverse * ratio, inverse);
      f.student -= rq * pq * V(c.mix_student * (S(1) - c.mix));
      f.teacher -= rp * pq * w;
    }
    return f;
  }
};

struct ProbabilityForm {
  template <class V, class S>
  static KD_LANES Fast<V> terms(V lp, V lq, const RowKind<S>& c) {
    const V zero = V::zero();
    Fast<V> f;
    f.scale = zero;
    if (c.squared_hellinger != S(0)) {
      const V half_p = exp2(V(S(0.5)) * lp), half_q = exp2(V(S(0.5)) * lq);
      const V half(S(0.5) * c.other), root = half_p - half_q;
      f.p = half_p * half_p;
      f.q = half_q * half_q;
      f.value = half * root * root;
      f.student = half * half_q * -root;
      f.teacher = half * half_p * root;
      return f;
    }
    f.p = exp2(lp);
    f.q = exp2(lq);
    const V pq = f.p - f.q;
    if (c.total_variation != S(0)) {
      const V half(S(0.5) * c.other);
      const V sign = select(pq > zero, -half, select(pq < zero, half, zero));  // of q - p
      f.value = half * abs(pq);
      f.student = f.q * sign;
      f.teacher = -f.p * sign;
    } else if (c.triangular != S(0)) {
      const V both = f.p + f.q, other(c.other);
      const V r = select(both > zero, pq / both, zero);
      f.value = other * pq * r;
      f.student = -other * f.q * r * (V(2) + r);
      f.teacher = other * f.p * r * (V(2) - r);
    } else {  // chi-squared; p^2 / q on its own, because p / q may overflow where it does not
      const V square = exp2(lp + (lp - lq)), other(c.other);
      f.value = other * (square - f.p - pq);
      f.student = other * (f.q - square);
      f.teacher = V(2) * other * (square - f.p);
      f.scale = other * (square + f.p);
    }
    return f;
  }
};

// alpha, beta and alpha + beta are not 0: elsewhere the exact form serves.
struct PowerForm {
  template <class V, class S>
  static KD_LANES Fast<V> terms(V lp, V lq, const RowKind<S>& c) {
    const S s = c.alpha + c.beta;
    Fast<V> f;
    f.p = exp2(lp);
    f.q = exp2(lq);
    V P = f.p, Q = f.q;
    if (s != S(1)) {
      P = exp2(V(s) * lp);
      Q = exp2(V(s) * lq);
    }
    const V W = exp2(fma(V(c.alpha), lp, V(c.beta) * lq));
    const V a(c.other / (s * c.beta)), b(c.other / (s * c.alpha));
    const V w(c.other / (c.alpha * c.beta));
    f.value = fma(a, P, b * Q) - w * W;
    f.scale = fma(abs(a), P, abs(b) * Q) + abs(w) * W;
    f.student = V(c.other / c.alpha) * (Q - W);
    f.teacher = V(c.other / c.beta) * (P - W);
    // An entry that is impossible on both sides is none (with s < 0 its powers are infinite).
    const V dead(S(0.5) * S(kDead)), zero = V::zero();
    const auto exists = max(lp, lq) > dead;
    f.value = select(exists, f.value, zero);
    f.scale = select(exists, f.scale, zero);
    f.student = select(exists, f.student, zero);
    f.teacher = select(exists, f.teacher, zero);
    return f;
  }
};

// The forms of divergence_math.h, where the fast ones do not reach: float64, degenerate exponents.
template <DivergenceGroup G>
struct MathForm {
  template <class V, class S>
  static KD_LANES Fast<V> terms(V lp, V lq, const RowKind<S>& c) {
    const V ln2(kLn2);
    const Entry<V> entry{exp2(lp), exp2(lq), (lp - lq) * ln2, lp * ln2, lq * ln2};
    RowKind<S> alone = c;  // the linear group is added by the caller
    alone.forward_kl = alone.reverse_kl = alone.cross_entropy = alone.entropy = S(0);
    const Terms<V> t = kd::terms<G>(entry, alone);
    const auto dead = lq <= V(S(0.5) * S(kDead));
    return {entry.p, entry.q, t.value, V::zero(), select(dead, V::zero(), t.student), t.teacher};
  }
};

enum class Output { kNone, kStudent, kBoth };

// x = u and y = v of n entries (whole vectors) become x = q and y = s; p and t likewise if wanted.
template <class Form, Output Out, class V, class S>
RowTerms transform(S* x, S* y, S* p, S* t, int64_t n, const RowNumbers<S>& row) {
  const V lse_s(row.lse_s), lse_t(row.lse_t);
  RowTerms total;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V value = V::zero(), scale = value, student = value, teacher = value;
    for (int64_t i = begin; i < end; i += V::kLanes) {
      const V lq = V::load(x + i) - lse_s, lp = V::load(y + i) - lse_t;
      Fast<V> f = Form::terms(lp, lq, row.kind);
      if (row.has_linear) add_linear(lp, lq, row.kind, &f);
      value += f.value;
      scale += f.scale;
      student += f.student;
      teacher += f.teacher;
      if constexpr (Out != Output::kNone) {
        store(x + i, f.q);
        store(y + i, f.student);
      }
      if constexpr (Out == Output::kBoth) {
        store(p + i, f.p);
        store(t + i, f.teacher);
      }
    }
    total.value += reduce_add_double(value);
    total.scale += reduce_add_double(scale);
    total.student += reduce_add_double(student);
    total.teacher += reduce_add_double(teacher);
  }
  return total;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
