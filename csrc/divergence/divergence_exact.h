// The value of a row pair whose two sides are close, from the logits: divergence_math.h with
// d = log p - log q taken from the difference of the logits themselves.
#pragma once

#include "divergence/divergence_fast.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

template <DivergenceGroup G, class TS, class TT, class S>
double exact_value(const Side<TS>& z, const Side<TT>& a, const RowNumbers<S>& row) {
  using V = Lanes<TS>;
  const int64_t columns = z.columns > a.columns ? z.columns : a.columns;
  const V inverse_s(row.inverse_s), inverse_t(row.inverse_t), lse_s(row.lse_s), lse_t(row.lse_t);
  const V dead(kDead), ln2(kLn2);
  // In the logits' own units, which the rounded scale defines (not tau): then sum p = sum q = 1 and
  // d fit each other to second order, whatever constant was added to one row.
  const bool same_tau = z.scale == a.scale;
  const double shift = (row.gap + (double(a.max) - double(z.max))) / double(z.scale);
  const V shift_high(static_cast<S>(shift));
  const V shift_low(static_cast<S>(shift - static_cast<double>(static_cast<S>(shift))));
  const V unit(static_cast<S>(double(z.scale) * kLn2));
  double total = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    V value = V::zero();
    for (int64_t i = begin; i < end; i += V::kLanes) {
      const V u = scaled_logits<V>(z, i), v = scaled_logits<V>(a, i);
      const V lq = (u - lse_s) * ln2, lp = (v - lse_t) * ln2;
      V d = lp - lq;
      if (same_tau) {
        const V x = load_logits<V>(a.logits + i, a.columns - i);
        const V y = load_logits<V>(z.logits + i, z.columns - i);
        // x - y with the part that rounding loses.
        const V high = x - y, back = high - x;
        const V low = (x - (high - back)) - (y + back);
        const V close = ((high - shift_high) + (low - shift_low)) * unit;
        d = select((u > dead) & (v > dead), close, d);
      }
      const Entry<V> entry{exp2(v) * inverse_t, exp2(u) * inverse_s, d, lp, lq};
      value += kd::terms<G>(entry, row.kind).value;
    }
    total += reduce_add_double(value);
  }
  return total;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
