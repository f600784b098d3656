// The statistics of a row pair out of its entries, once, for scalars (CUDA, float64) and SIMD lanes
// (CPU). Generators and zeros are those of divergence_math.h.
#pragma once

#include "divergence/divergence_math.h"

namespace kd {

// Sums over the vocabulary.
template <class F>
struct PairSums {
  F forward_kl, reverse_kl, total_variation, squared_hellinger;
  F student_entropy, teacher_entropy, dot, student_square, teacher_square;
  F excess;  // of q - p: what rounding made of 0
  F slope;   // of the total variation, by an error that all log p - log q have in common

  KD_HOST_DEVICE PairSums()
      : forward_kl(F(0)),
        reverse_kl(F(0)),
        total_variation(F(0)),
        squared_hellinger(F(0)),
        student_entropy(F(0)),
        teacher_entropy(F(0)),
        dot(F(0)),
        student_square(F(0)),
        teacher_square(F(0)),
        excess(F(0)),
        slope(F(0)) {}

  // f(mine, the other's) for every sum.
  template <class Other, class Fn>
  KD_HOST_DEVICE void each(const Other& other, const Fn& f) {
    f(forward_kl, other.forward_kl);
    f(reverse_kl, other.reverse_kl);
    f(total_variation, other.total_variation);
    f(squared_hellinger, other.squared_hellinger);
    f(student_entropy, other.student_entropy);
    f(teacher_entropy, other.teacher_entropy);
    f(dot, other.dot);
    f(student_square, other.student_square);
    f(teacher_square, other.teacher_square);
    f(excess, other.excess);
    f(slope, other.slope);
  }

  KD_HOST_DEVICE void add(const Entry<F>& e) {
    const F pq = e.q - e.p;
    const Spread<F> spread = spread_of(e);
    const auto exists = spread.base > F(0);  // d of an entry that is impossible twice is NaN
    forward_kl = forward_kl + kl_generator(e.p, pq, e.d);
    reverse_kl = reverse_kl + kl_generator(e.q, -pq, -e.d);
    total_variation = total_variation + select(exists, F(0.5) * spread.base * abs(spread.t), F(0));
    squared_hellinger =
        squared_hellinger + select(exists, F(0.5) * spread.base * spread.u * spread.u, F(0));
    student_entropy = student_entropy - zero_times(e.q, e.lq);
    teacher_entropy = teacher_entropy - zero_times(e.p, e.lp);
    dot = fma(e.p, e.q, dot);
    student_square = fma(e.q, e.q, student_square);
    teacher_square = fma(e.p, e.p, teacher_square);
    excess = excess + excess_of(e);
    slope = slope + select(e.d > F(0), F(0.5) * e.q, select(e.d < F(0), F(-0.5) * e.p, F(0)));
  }

  // The normalisers are rounded, so all log p - log q are off by one number, which the excess
  // measures. It moves the total variation by itself, and the other sums by its square. Of a row
  // that is impossible on one side the excess says nothing.
  KD_HOST_DEVICE F corrected_total_variation() const {
    if (!(abs(excess) < F(1e-3))) return total_variation;
    return max(fma(excess, slope, total_variation), F(0));
  }
};

}  // namespace kd
