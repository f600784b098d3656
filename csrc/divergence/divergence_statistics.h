// First pass over a row pair: normalisers and the sums that the KL-type values need, in base 2.
//
//   u = z log2(e) / tau_s - max_s      v = a log2(e) / tau_t - max_t      (one fma each)
//
// "max" is a lazy reference: the maximum of the row's first block. Any reference serves as long as
// 2^u stays far from overflow, so no pass looks for the true maximum and nothing is rescaled; a
// block that exceeds 2^60 restarts the row with the exact maxima, which happens once at most.
//
// The fast loop knows neither -inf nor NaN. Either one makes the block's sum of 2^v (v - u)
// infinite or NaN; only then the block is done again with selects. A logit that is -inf, or so low
// that it overflows in base 2, becomes kDead: finite, so that 0 * kDead = 0 in every later pass.
#pragma once

#include "common/simd.h"
#include "divergence/divergence_rows.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

constexpr int64_t kBlock = 512;      // entries between two checks
constexpr float kDead = -1e30f;      // stands for log2(0)
constexpr float kCeiling = 0x1p60f;  // of a block's sum
constexpr float kUnderflow = -1050;  // 2^this is 0 even in float64

// Columns rounded up to whole vectors.
template <class V>
KD_LANES int64_t padded(int64_t columns) {
  return (columns + V::kLanes - 1) / V::kLanes * V::kLanes;
}

// One side of a row pair.
template <class T>
struct Side {
  const T* logits;
  int64_t columns;     // valid ones
  compute_t<T> scale;  // log2(e) / tau
  compute_t<T> max;    // the reference, base 2
};

template <class S>
struct RowSums {
  double sum_s = 0, sum_t = 0;      // of 2^u and 2^v
  double gap = 0;                   // of 2^v (v - u)
  double cross = 0;                 // of 2^v u
  double reverse = 0;               // of 2^u (v - u)
  double entropy = 0;               // of 2^u u
  double power = 0;                 // of w = 2^(u + alpha (v - u))
  double power_square = 0;          // of its square
  double top_gap = 0;               // largest v - u
  bool no_q = false, no_p = false;  // q = 0 < p, p = 0 < q somewhere
  bool is_nan = false;
};

// RowSums under way: lanes of doubles, folded once a row.
template <class V>
struct LaneSums {
  VecD sum_s = VecD::zero(), sum_t = VecD::zero(), gap = VecD::zero(), cross = VecD::zero();
  VecD reverse = VecD::zero(), entropy = VecD::zero();
  VecD power = VecD::zero(), power_square = VecD::zero();
  V top_gap = V(kDead);

  template <class S>
  void fold(RowSums<S>* row) const {
    row->sum_s = reduce_add(sum_s);
    row->sum_t = reduce_add(sum_t);
    row->gap = reduce_add(gap);
    row->cross = reduce_add(cross);
    row->reverse = reduce_add(reverse);
    row->entropy = reduce_add(entropy);
    row->power = reduce_add(power);
    row->power_square = reduce_add(power_square);
    const double top = reduce_max(top_gap);
    row->top_gap = top > 0 ? top : 0;
  }
};

// What the pass leaves in the scratch buffers x and y: nothing; 2^u and 2^v, ready for forward KL's
// gradient; the same as they are; 2^u and v - u; u and v - u; 2^u and w = 2^(u + alpha (v - u)).
enum class Keep { kNothing, kExponentials, kPair, kRatio, kLogRatio, kPower };

// Sums that a fast pass makes beside the normalisers and the gap.
constexpr bool needs_cross(Keep k) {
  return k == Keep::kNothing || k == Keep::kExponentials;
}
constexpr bool needs_reverse(Keep k) {
  return k == Keep::kNothing || k == Keep::kRatio;
}
constexpr bool needs_top_gap(Keep k) {
  return k == Keep::kPair || k == Keep::kRatio || k == Keep::kLogRatio;
}

// 2^x where x is at most a little above 0 in a healthy row; anything above the ceiling otherwise.
template <class V>
KD_LANES V lazy_exp2(V x) {
#if KDK_ISA_LEVEL == 2
  return exp2(x);
#else
  return exp2_nonpositive(min(V(126), x));  // a NaN passes
#endif
}

template <class V, class T>
KD_LANES V load_logits(const T* p, int64_t left) {
  constexpr auto kNothing = -static_cast<typename V::Scalar>(__builtin_inff());
  if (left >= V::kLanes) return V::load(p);
  if (left <= 0) return V(kNothing);
  return V::load_partial(p, left, kNothing);
}

// Logits i .. i + kLanes - 1 in base 2 with kDead for what is not there or -inf. NaN stays.
template <class V, class T>
KD_LANES V scaled_logits(const Side<T>& side, int64_t i) {
  const V x = load_logits<V>(side.logits + i, side.columns - i);
  return max(V(kDead), fms(x, V(side.scale), V(side.max)));
}

// Largest logit in [begin, end); *bad if one is NaN or +inf.
template <class T>
KD_LANES compute_t<T> largest(const Side<T>& side, int64_t begin, int64_t end, bool* bad) {
  using V = Lanes<T>;
  const V infinity(static_cast<compute_t<T>>(__builtin_inff()));
  V top = -infinity;
  auto broken = V::Mask::first(0);
  for (int64_t i = begin; i < end; i += V::kLanes) {
    const V x = load_logits<V>(side.logits + i, (end < side.columns ? end : side.columns) - i);
    broken = broken | !(x < infinity);
    top = max(x, top);
  }
  *bad = any(broken);
  return reduce_max(top);
}

// Fast block of full vectors; true if every sum is finite and below the ceiling.
template <Keep K, class TS, class TT, class V, class S>
KD_LANES bool fast_block(const Side<TS>& z, const Side<TT>& a, int64_t begin, int64_t end, S alpha,
                         S* x, S* y, LaneSums<V>* row) {
  constexpr int kUnroll = 2;
  constexpr int64_t kStep = kUnroll * V::kLanes;
  constexpr int64_t kAhead = 4096;  // bytes; longer than the memory's latency, inside the page walk
  const V scale_s(z.scale), scale_t(a.scale), max_s(z.max), max_t(a.max);
  V sum_s[kUnroll], sum_t[kUnroll], gap[kUnroll], cross[kUnroll], reverse = V::zero();
  V entropy = V::zero(), top_gap(kDead), power = V::zero(), power_square = V::zero();
  for (int j = 0; j < kUnroll; ++j) sum_s[j] = sum_t[j] = gap[j] = cross[j] = V::zero();
  for (int64_t i = begin; i < end; i += kStep) {
    constexpr int64_t kLineS = 64 / sizeof(TS), kLineT = 64 / sizeof(TT);
    for (int64_t j = 0; j < kStep; j += kLineS) {
      prefetch(reinterpret_cast<const char*>(z.logits + i + j) + kAhead);
    }
    for (int64_t j = 0; j < kStep; j += kLineT) {
      prefetch(reinterpret_cast<const char*>(a.logits + i + j) + kAhead);
    }
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t at = i + j * V::kLanes;
      const V u = fms(V::load(z.logits + at), scale_s, max_s);
      const V v = fms(V::load(a.logits + at), scale_t, max_t);
      const V eu = lazy_exp2(u), ev = lazy_exp2(v);
      sum_s[j] += eu;
      sum_t[j] += ev;
      const V d = v - u;
      gap[j] = fma(ev, d, gap[j]);
      if constexpr (needs_cross(K)) cross[j] = fma(ev, u, cross[j]);
      if constexpr (needs_reverse(K)) reverse = fma(eu, d, reverse);
      if constexpr (needs_top_gap(K)) top_gap = max(d, top_gap);
      if constexpr (K == Keep::kNothing) entropy = fma(eu, u, entropy);
      if constexpr (K != Keep::kNothing) store(x + at, K == Keep::kLogRatio ? u : eu);
      if constexpr (K == Keep::kExponentials || K == Keep::kPair) store(y + at, ev);
      if constexpr (K == Keep::kRatio || K == Keep::kLogRatio) store(y + at, d);
      if constexpr (K == Keep::kPower) {
        const V ew = exp2_sum(V(alpha), d, u);
        power += ew;
        power_square = fma(ew, ew, power_square);
        store(y + at, ew);
      }
    }
  }
  for (int j = 1; j < kUnroll; ++j) {
    sum_s[0] += sum_s[j];
    sum_t[0] += sum_t[j];
    gap[0] += gap[j];
    cross[0] += cross[j];
  }
  const V ceiling(kCeiling);
  if (!all((sum_s[0] < ceiling) & (sum_t[0] < ceiling) & is_finite(gap[0]))) return false;
  row->sum_s += widen_sum(sum_s[0]);
  row->sum_t += widen_sum(sum_t[0]);
  row->gap += widen_sum(gap[0]);
  if constexpr (needs_cross(K)) row->cross += widen_sum(cross[0]);
  if constexpr (needs_reverse(K)) row->reverse += widen_sum(reverse);
  if constexpr (needs_top_gap(K)) row->top_gap = max(top_gap, row->top_gap);
  if constexpr (K == Keep::kNothing) row->entropy += widen_sum(entropy);
  if constexpr (K == Keep::kPower) {
    row->power += widen_sum(power);
    row->power_square += widen_sum(power_square);
  }
  return true;
}

// The same with every special case; also tails, and columns that only one side has. False: the
// reference is too low.
template <Keep K, class TS, class TT, class V, class S>
bool careful_block(const Side<TS>& z, const Side<TT>& a, int64_t begin, int64_t end, S alpha, S* x,
                   S* y, LaneSums<V>* lanes, RowSums<S>* row) {
  const V dead(kDead), underflow(kUnderflow), zero = V::zero();
  V sum_s = zero, sum_t = zero, gap = zero, cross = zero, reverse = zero;
  V entropy = zero, top_gap(kDead), power = zero, power_square = zero;
  auto no_q = V::Mask::first(0), no_p = no_q, broken = no_q;
  for (int64_t i = begin; i < end; i += V::kLanes) {
    const V u = scaled_logits<V>(z, i), v = scaled_logits<V>(a, i);
    const auto impossible_q = u <= dead, impossible_p = v <= dead;
    const V eu = lazy_exp2(u), ev = lazy_exp2(v);
    sum_s += eu;
    sum_t += ev;
    const V d = v - u;
    gap = fma(ev, d, gap);
    cross = fma(ev, u, cross);
    reverse = fma(eu, d, reverse);
    entropy = fma(eu, u, entropy);
    top_gap = max(d, top_gap);
    broken = broken | is_nan(u) | is_nan(v);
    no_q = no_q | (impossible_q & (v > underflow));
    no_p = no_p | (impossible_p & (u > underflow));
    // The gradient of an impossible logit is 0.
    if constexpr (K != Keep::kNothing) store(x + i, K == Keep::kLogRatio ? u : eu);
    if constexpr (K == Keep::kExponentials) store(y + i, select(impossible_q, zero, ev));
    if constexpr (K == Keep::kPair) store(y + i, ev);
    if constexpr (K == Keep::kRatio || K == Keep::kLogRatio) store(y + i, d);
    if constexpr (K == Keep::kPower) {
      const auto impossible = impossible_q | impossible_p;
      const V ew = select(impossible, zero, exp2_sum(V(alpha), d, u));
      power += ew;
      power_square = fma(ew, ew, power_square);
      store(y + i, ew);
    }
  }
  row->is_nan |= any(broken);
  row->no_q |= any(no_q);
  row->no_p |= any(no_p);
  const V ceiling(kCeiling);
  if (!all((sum_s < ceiling) & (sum_t < ceiling))) return false;
  lanes->sum_s += widen_sum(sum_s);
  lanes->sum_t += widen_sum(sum_t);
  lanes->gap += widen_sum(gap);
  lanes->cross += widen_sum(cross);
  lanes->reverse += widen_sum(reverse);
  lanes->entropy += widen_sum(entropy);
  lanes->power += widen_sum(power);
  lanes->power_square += widen_sum(power_square);
  lanes->top_gap = max(top_gap, lanes->top_gap);
  return true;
}

// Sets the references of both sides and fills x and y (padded to whole vectors); before entries up
// to `end` of those are written, before_write(end) is called. alpha: for the powers.
template <Keep K, class TS, class TT, class S, class BeforeWrite>
RowSums<S> row_statistics(Side<TS>* z, Side<TT>* a, S* x, S* y, const BeforeWrite& before_write,
                          S alpha = 0) {
  using V = Lanes<TS>;
  const int64_t common = z->columns < a->columns ? z->columns : a->columns;
  const int64_t longer = z->columns < a->columns ? a->columns : z->columns;
  for (bool exact = false;; exact = true) {
    RowSums<S> row;
    LaneSums<V> lanes;
    const auto reference = [&](auto* side) {
      const int64_t end = exact || side->columns < kBlock ? side->columns : kBlock;
      bool bad = false;
      S top = largest(*side, 0, end, &bad) * side->scale;
      if (!exact && !bad && !(top > S(kDead))) {  // a first block of only -inf says nothing
        top = largest(*side, 0, side->columns, &bad) * side->scale;
      }
      row.is_nan |= bad;
      side->max = top > S(kDead) && !bad ? top : S(0);
    };
    reference(z);
    reference(a);
    if (row.is_nan) return row;
    bool good = true;
    int64_t done = 0;
    for (int64_t i = 0; good && i < common; i += kBlock) {
      const int64_t end = i + kBlock < common ? i + kBlock : common;
      const int64_t whole = i + (end - i) / (2 * V::kLanes) * (2 * V::kLanes);
      before_write(whole);
      if (whole > i && !fast_block<K, TS, TT, V>(*z, *a, i, whole, alpha, x, y, &lanes)) {
        good = careful_block<K, TS, TT, V>(*z, *a, i, whole, alpha, x, y, &lanes, &row);
      }
      done = whole;
    }
    // The last block's rest, and the columns that only one side has.
    for (; good && done < longer; done += kBlock) {
      const int64_t end = done + kBlock < longer ? done + kBlock : longer;
      before_write(padded<V>(end));
      good = careful_block<K, TS, TT, V>(*z, *a, done, end, alpha, x, y, &lanes, &row);
    }
    if (good || row.is_nan || exact) {
      row.is_nan |= !good;
      lanes.fold(&row);
      return row;
    }
  }
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
