// The maths of transport, once for every backend: what happens to one potential, one adjoint, one
// sorted key. Logarithms are to base 2.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/scalar.h"

namespace kd {

// Sums of exponentials outside this range have lost too much to underflow (or overflow): they are
// made again relative to their largest term.
constexpr double kSmallSum = 7.888609052210118e-31;  // 2^-100
constexpr double kLargeSum = 1.2676506002282294e30;  // 2^100

// Densities and ratios of potentials stop here. Where there is mass they never come near.
constexpr double kMaxExponent = 120;

// log2(2^x + 2^y); y = -inf gives x. The larger one is taken out, so nothing overflows.
template <class F>
KD_HOST_DEVICE F log2_add(F x, F y) {
  const F high = select(x < y, y, x), low = select(x < y, x, y);
  const F sum = high + log2(F(1) + exp2(low - high));
  return select(low == F(-kInfinity), high, sum);
}

// The new potential from log2 of the kernel sum: log2 (sum + d)^-D.
template <class F>
KD_HOST_DEVICE F potential(F log_sum, F log_denominator, F damping) {
  return -damping * log2_add(log_sum, log_denominator);
}

// 1 / (sum + d) over rho = (sum + d)^-D, from log2(rho): 2^(x (1/D - 1)); 1 when balanced. Bounded,
// because it meets entries that have underflowed where it would overflow.
template <class F>
KD_HOST_DEVICE F divisor_ratio(F log_rho, F damping) {
  const F exponent = log_rho * (F(1) / damping - F(1));
  return exp2(select(exponent < F(-kMaxExponent), F(-kMaxExponent),
                     select(exponent > F(kMaxExponent), F(kMaxExponent), exponent)));
}

// divisor_ratio once more, from `sum` = rho (K v) as the sweep itself has added it up: 1 / (sum + d
// rho). A potential is stored to one rounding, 2^-24 of its size, which would be common to all
// terms of its sum and add up over the iterations; the sum knows it. Where the two do not nearly
// agree, terms have underflowed, and the potential is right.
template <class F>
KD_HOST_DEVICE F corrected_ratio(F log_rho, F damping, F denominator, F sum) {
  const F ratio = damping == F(1) ? F(1) : divisor_ratio(log_rho, damping);
  if (denominator != F(0)) sum += denominator * exp2(log_rho);
  const F near = sum * ratio;
  return abs(near - F(1)) < F(0.015625) ? ratio / near : ratio;
}

// Squared distances below this are it: the distance's derivative ends there, at its root. Given
// costs may come from a root that rounds up.
constexpr double kLeastSquare = 1e-8;
constexpr double kLeastDistance = 1.000001e-4;

// Points of more coordinates come with their costs.
constexpr int64_t kMostCoordinates = 16;

// D softmin from the sum of 2^(x_j + base) over the columns; per_k = epsilon ln 2.
template <class F>
KD_HOST_DEVICE F softmin(F sum, F base, F per_k, F damping) {
  return damping * per_k * (base - log2(sum));
}

// Order-preserving map of a float's bits: larger float, SMALLER key (sorted ascending = descending
// floats). -0 counts as +0, NaN sorts behind everything.
KD_HOST_DEVICE uint32_t descending_key(float x) {
  uint32_t bits;
  x = x + 0.0f;  // -0 becomes +0
  memcpy(&bits, &x, 4);
  if (x != x) return 0xffffffffu;
  return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}
KD_HOST_DEVICE float from_descending_key(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key : ~key & 0x7fffffffu;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
KD_HOST_DEVICE uint64_t descending_key(double x) {
  uint64_t bits;
  x = x + 0.0;
  memcpy(&bits, &x, 8);
  if (x != x) return ~uint64_t{0};
  const uint64_t top = uint64_t{1} << 63;
  return bits & top ? bits : ~(bits | top);
}
KD_HOST_DEVICE double from_descending_key(uint64_t key) {
  const uint64_t top = uint64_t{1} << 63;
  const uint64_t bits = key & top ? key : ~key & ~top;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

}  // namespace kd
