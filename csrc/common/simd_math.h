// exp2, exp, expm1, log2, log, log1p and pow of VecF, written once over the primitives of each ISA;
// VecD goes through the C library lane by lane (float64 serves gradcheck, where speed is
// secondary).
//
// Worst errors against long double, asserted by tests/cpp/test_simd.cpp over the whole range:
//   exp2, exp2_nonpositive   2.0e-7 relative (exact at integers)       exp      1.5 ulp
//   expm1                    2 ulp, also at 0                          log      1.5 ulp
//   log2                     2.2 ulp, also at 1                        log1p    2 ulp, also at 0
// NaN gives NaN. exp2, exp: -inf -> 0, +inf -> +inf. log*: 0 (-1 for log1p) -> -inf, below -> NaN,
// +inf -> +inf, subnormal arguments as any other. Subnormal results: exp is right to one rounding;
// exp2 gives 0 below 2^-126 except on AVX-512, which is right to one rounding there too.
// Polynomials: Remez, relative error as the norm, low coefficients rounded first and the rest
// refitted.
#pragma once

namespace kd {
namespace KDK_ISA_NAMESPACE {

namespace detail {

// 2^f on [0, 1]: 1 at 0 exactly, relative error 8.2e-8. Floor instead of round keeps the value in
// [1, 2], so one exponent step lands on 0 and on inf at the very ends of the float range.
KD_LANES VecF exp2_fraction(VecF f) {
  VecF p = fma(VecF(0x1.e96912p-10f), f, VecF(0x1.277c1cp-7f));
  p = fma(p, f, VecF(0x1.c91c1p-5f));
  p = fma(p, f, VecF(0x1.ebdb6ap-3f));
  p = fma(p, f, VecF(0x1.62e4bap-1f));
  return fma(p, f, VecF(1.0f));
}

// (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2: e^r - 1 comes out with relative error 1.4e-8.
KD_LANES VecF expm1_tail(VecF r) {
  VecF p = fma(VecF(0x1.6cd79p-10f), r, VecF(0x1.122c52p-7f));
  p = fma(p, r, VecF(0x1.555538p-5f));
  p = fma(p, r, VecF(0x1.5554aap-3f));
  return fma(p, r, VecF(0.5f));
}

// x = n ln(2) + r with an integer n, |r| <= ln(2) / 2, for |x| < 2^15. The upper part of ln(2) has
// so few bits that n times it is exact, with or without FMA.
KD_LANES VecF reduce_ln2(VecF x, VecF* n) {
  const VecF shift(0x1.8p23f);  // adding it rounds to an integer
  *n = fma(x, VecF(0x1.715476p+0f), shift) - shift;
  const VecF r = fnma(*n, VecF(0x1.62e4p-1f), x);
  return fnma(*n, VecF(0x1.7f7d1cp-20f), r);
}

// ln(1 + t) - t for -1/4 <= t <= 1/2 + rounding: ln(1 + t) comes out with relative error 9.3e-9.
KD_LANES VecF log1p_tail(VecF t) {
  VecF p = fma(VecF(-0x1.70bbeep-5f), t, VecF(0x1.ad33d4p-4f));
  p = fma(p, t, VecF(-0x1.0df0cp-3f));
  p = fma(p, t, VecF(0x1.289648p-3f));
  p = fma(p, t, VecF(-0x1.54e63ep-3f));
  p = fma(p, t, VecF(0x1.996764p-3f));
  p = fma(p, t, VecF(-0x1.00005ep-2f));
  p = fma(p, t, VecF(0x1.5555aap-2f));
  const VecF t2 = t * t;
  return fma(t2 * t, p, t2 * VecF(-0.5f));
}

// e ln(2) + t + tail, small terms first.
KD_LANES VecF assemble_log(VecF e, VecF t, VecF tail) {
  return fma(e, VecF(0x1.62e4p-1f), t + fma(e, VecF(0x1.7f7d1cp-20f), tail));
}

// What a logarithm returns where split_exponent has no answer.
KD_LANES VecF log_edges(VecF x, VecF result) {
#if KDK_ISA_LEVEL == 2
  return static_cast<void>(x), result;  // getexp and getmant have answered
#else
  const VecF infinity(__builtin_inff());
  const VecF outside = select(x == VecF::zero(), -infinity, VecF(__builtin_nanf("")));
  return select(x == infinity, x, select(x > VecF::zero(), result, outside));
#endif
}

}  // namespace detail

KD_LANES VecF exp2(VecF x) {
#if KDK_ISA_LEVEL == 2
  return detail::exp2_by_table(x, [x](VecF n) { return x - n; });
#else
  x = min(VecF(128.0f), max(VecF(-127.0f), x));  // constants first: NaN passes
  const VecF n = detail::floor_small(x);
  return detail::exp2_fraction(x - n) * detail::power_of_two(n);
#endif
}

// 2^x for x <= 0 (right up to 126): saves three instructions outside AVX-512. Below 2^-126 the
// result is some value in [0, 2^-126], and 0 from 2^-127 down.
KD_LANES VecF exp2_nonpositive(VecF x) {
#if KDK_ISA_LEVEL == 2
  return exp2(x);
#else
  x = max(VecF(-127.0f), x);
  const VecF n = detail::floor_small(x);
  return detail::add_exponent(detail::exp2_fraction(x - n), n);
#endif
}

// 2^(a b + c) for a sum up to 126, without the sum's rounding, which costs |a b + c| / 2^24 of the
// result. Sums beyond 2^80 in size may give NaN.
KD_LANES VecF exp2_sum(VecF a, VecF b, VecF c) {
  const VecF x = fma(a, b, c);
#if KDK_ISA_LEVEL == 2
  return detail::exp2_by_table(x, [=](VecF n) { return fma(a, b, c - n); });
#else
  const VecF n = detail::floor_small(min(VecF(126.0f), max(VecF(-127.0f), x)));
  const VecF f = min(VecF(1.0f), max(VecF::zero(), fma(a, b, c - n)));
  return detail::exp2_fraction(f) * detail::power_of_two(n);
#endif
}

KD_LANES VecF exp(VecF x) {
  x = min(VecF(89.0f), max(VecF(-104.0f), x));
  VecF n;
  const VecF r = detail::reduce_ln2(x, &n);
  const VecF p = fma(fma(detail::expm1_tail(r), r, VecF(1.0f)), r, VecF(1.0f));
  return detail::scale2(p, n);
}

KD_LANES VecF expm1(VecF x) {
  x = min(VecF(89.0f), max(VecF(-20.0f), x));  // below -17.4 the result rounds to -1
  VecF n;
  const VecF r = detail::reduce_ln2(x, &n);
  const VecF q = fma(r * r, detail::expm1_tail(r), r);
  // 2^n (q + 1) - 1 = 2^n (q + (1 - 2^-n)): n = 0 leaves q as it is, and 2^128 is not formed.
  return detail::scale2(q + (VecF(1.0f) - detail::scale2(VecF(1.0f), -n)), n);
}

KD_LANES VecF log(VecF x) {
  VecF e;
  const VecF t = detail::split_exponent(x, &e) - VecF(1.0f);
  return detail::log_edges(x, detail::assemble_log(e, t, detail::log1p_tail(t)));
}

KD_LANES VecF log2(VecF x) {
  VecF e;
  const VecF t = detail::split_exponent(x, &e) - VecF(1.0f);
  // t enters with factor 1 and with log2(e) - 1: the rounding of the product weighs less.
  const VecF tail = detail::log1p_tail(t);
  const VecF low = fma(t + tail, VecF(0x1.c551d9p-2f), tail);
  return detail::log_edges(x, e + (t + low));
}

// log2 where an absolute error of 1.5e-7 max(1, |log2 x|) and a relative one of 4e-7 will do:
// faster on AVX-512.
KD_LANES VecF log2_absolute(VecF x) {
#if KDK_ISA_LEVEL == 2
  return detail::log2_by_table(x);
#else
  return log2(x);
#endif
}

KD_LANES VecF log1p(VecF x) {
  const VecF one(1.0f), infinity(__builtin_inff());
  const VecF u = one + x;
  // What rounding 1 + x lost, exactly; the mantissa takes it back at its own scale.
  const VecF back = u - one;
  const VecF lost = (x - back) + (one - (u - back));
  VecF e;
  const VecF m = detail::split_exponent(u, &e);
  const VecF t = (m - one) + detail::scale2(lost, -e);
  const VecF result = detail::assemble_log(e, t, detail::log1p_tail(t));
  return select(x == infinity, infinity,
                select(x == VecF(-1.0f), -infinity, detail::log_edges(u, result)));
}

// x^y for x >= 0 as 2^(y log2 x); pow(x, 0) = 1. The relative error grows with |y log2 x|: about
// 2^-24 (3 + |y log2 x|).
KD_LANES VecF pow(VecF x, VecF y) {
  return select(y == VecF::zero(), VecF(1.0f), exp2(y * log2(x)));
}

#define KD_LANES_FROM_LIBRARY(name)                                           \
  KD_LANES VecD name(VecD x) {                                                \
    for (int i = 0; i < VecD::kLanes; ++i) x.v[i] = __builtin_##name(x.v[i]); \
    return x;                                                                 \
  }
KD_LANES_FROM_LIBRARY(exp2)
KD_LANES_FROM_LIBRARY(exp)
KD_LANES_FROM_LIBRARY(expm1)
KD_LANES_FROM_LIBRARY(log2)
KD_LANES_FROM_LIBRARY(log)
KD_LANES_FROM_LIBRARY(log1p)
#undef KD_LANES_FROM_LIBRARY

KD_LANES VecD log2_absolute(VecD x) {
  return log2(x);
}
KD_LANES VecD exp2_sum(VecD a, VecD b, VecD c) {
  return exp2(fma(a, b, c));
}
KD_LANES VecD exp2_nonpositive(VecD x) {
  return exp2(x);
}
KD_LANES VecD pow(VecD x, VecD y) {
  for (int i = 0; i < VecD::kLanes; ++i) x.v[i] = __builtin_pow(x.v[i], y.v[i]);
  return x;
}

KD_LANES VecD widen_sum(VecD a) {
  return a;
}
KD_LANES double reduce_add_double(VecF a) {
  return reduce_add(widen_sum(a));
}
KD_LANES double reduce_add_double(VecD a) {
  return reduce_add(a);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
