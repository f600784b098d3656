// Terms of a row from its logits by divergence_math.h, any kind and any dtype, with d = log p - log
// q taken from the difference of the logits themselves: right at every gap between student and
// teacher.
#pragma once

#include "divergence/divergence_ratio.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

template <DivergenceGroup G>
struct GroupTag {
  static constexpr DivergenceGroup value = G;
};

// Reads a row pair block by block.
template <class TS, class TT>
struct Entries {
  using V = Lanes<TS>;
  using S = compute_t<TS>;
  Side<TS> z;
  Side<TT> a;
  V gap, shift_high, shift_low, unit;
  bool same_tau;

  Entries(const Side<TS>& student, const Side<TT>& teacher, const RowNumbers<S>& row)
      : z(student), a(teacher), gap(row.gap) {
    // In the logits' own units, which the rounded scale defines (not tau): then sum p = sum q = 1
    // and d fit each other to second order, whatever constant was added to one row.
    same_tau = z.scale == a.scale;
    const double shift = (row.exact_gap + (double(a.max) - double(z.max))) / double(z.scale);
    const S high = static_cast<S>(shift);
    shift_high = V(high);
    shift_low = V(static_cast<S>(shift - double(high)));
    unit = V(static_cast<S>(double(z.scale) * kLn2));
  }

  // u, v and the natural log p - log q of n entries (whole vectors, at most kBlock) from `begin`
  // on.
  void load(int64_t begin, int64_t n, S* u_out, S* v_out, S* d_out) const {
    const V dead(kDead), ln2(kLn2);
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const V u = scaled_logits<V>(z, begin + i), v = scaled_logits<V>(a, begin + i);
      V d = ((v - u) - gap) * ln2;
      if (same_tau) {
        const V x = load_logits<V>(a.logits + begin + i, a.columns - begin - i);
        const V y = load_logits<V>(z.logits + begin + i, z.columns - begin - i);
        // x - y with the part that rounding loses.
        const V high = x - y, back = high - x;
        const V low = (x - (high - back)) - (y + back);
        const V close = ((high - shift_high) + (low - shift_low)) * unit;
        d = select((u > dead) & (v > dead), close, d);
      }
      store(u_out + i, u);
      store(v_out + i, v);
      store(d_out + i, d);
    }
  }
};

template <class V, class S>
KD_LANES Entry<V> entry_at(const S* u, const S* v, const S* d, const RowNumbers<S>& row) {
  const V ln2(kLn2), x = V::load(u), y = V::load(v);
  return {exp2(y) * V(row.inverse_t), exp2(x) * V(row.inverse_s), V::load(d),
          (y - V(row.lse_t)) * ln2, (x - V(row.lse_s)) * ln2};
}

// Sums over one block.
template <DivergenceGroup G, class V, class S>
RowTerms sum_block(const S* u, const S* v, const S* d, int64_t n, const RowNumbers<S>& row) {
  V value = V::zero(), student = value, teacher = value, excess = value;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const Entry<V> e = entry_at<V>(u + i, v + i, d + i, row);
    const Terms<V> t = kd::terms<G>(e, row.kind);
    value += t.value;
    student += t.student;
    teacher += t.teacher;
    excess += excess_of(e);
  }
  return {reduce_add_double(value), reduce_add_double(student), reduce_add_double(teacher), 0,
          reduce_add_double(excess)};
}

// u, v, d of one block become q, s, p; t comes beside them.
template <DivergenceGroup G, class V, class S>
void transform_block(S* u, S* v, S* d, S* t_out, int64_t n, const RowNumbers<S>& numbers) {
  const RowNumbers<S> row = numbers;  // a copy that the stores below cannot alias
  const V dead(kDead);
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const auto possible = V::load(u + i) > dead;
    const Entry<V> e = entry_at<V>(u + i, v + i, d + i, row);
    const Terms<V> t = kd::terms<G>(e, row.kind);
    store(u + i, e.q);
    // An impossible logit has no gradient, although its p counts in S.
    store(v + i, select(possible, t.student, V::zero()));
    store(d + i, e.p);
    store(t_out + i, t.teacher);
  }
}

// The group whose formulas a row needs: its kind's, or the linear one alone.
template <class S>
DivergenceGroup group_of_row(const RowKind<S>& kind, DivergenceGroup group) {
  return kind.other == S(0) ? DivergenceGroup::kLinear : group;
}

template <class Fn>
KD_LANES void with_group(DivergenceGroup group, const Fn& fn) {
  switch (group) {
    case DivergenceGroup::kLinear:
      return fn(GroupTag<DivergenceGroup::kLinear>{});
    case DivergenceGroup::kMixture:
      return fn(GroupTag<DivergenceGroup::kMixture>{});
    case DivergenceGroup::kProbability:
      return fn(GroupTag<DivergenceGroup::kProbability>{});
    case DivergenceGroup::kPower:
      return fn(GroupTag<DivergenceGroup::kPower>{});
  }
}

// D, S and T of a row. The normalisers' rounding moves all d alike, which is much where the rows
// differ by little; sum (q - p) shows by how much. Where that counts, row->exact_gap and gap are
// corrected and the row is read once more: by its square where d enters squared, by itself in the
// probability and power groups, never for rows that differ by more than rounding does.
template <class TS, class TT, class S>
RowTerms exact_terms(const Side<TS>& z, const Side<TT>& a, RowNumbers<S>* row,
                     DivergenceGroup group) {
  using V = Lanes<TS>;
  alignas(64) S u[kBlock], v[kBlock], d[kBlock];
  const int64_t columns = z.columns > a.columns ? z.columns : a.columns;
  const bool linearly = group == DivergenceGroup::kProbability || group == DivergenceGroup::kPower;
  for (int attempt = 0;; ++attempt) {
    const Entries<TS, TT> entries(z, a, *row);
    RowTerms total;
    for (int64_t begin = (columns - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
      const int64_t n = padded<V>(columns - begin < kBlock ? columns - begin : kBlock);
      entries.load(begin, n, u, v, d);
      with_group(group,
                 [&](auto tag) { total += sum_block<decltype(tag)::value, V>(u, v, d, n, *row); });
    }
    const double size = __builtin_fabs(total.excess);
    const double moved = linearly ? size : size * size;
    if (attempt == 1 || !(moved > 1e-6 * total.value) || !(size < 1e-3)) return total;
    row->exact_gap -= kLog2E * __builtin_log1p(total.excess);
    row->gap = static_cast<S>(row->exact_gap);
  }
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
