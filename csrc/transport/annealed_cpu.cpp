// One softmin update of a side, written once against VecF / VecD and compiled once per ISA. Costs
// of few coordinates are made where they are used: three differences cost less than a load from
// beyond the cache. Four rows share the columns' coordinates and weights.
#include "transport/annealed_cpu.h"

#include "common/scalar.h"
#include "common/simd.h"
#include "transport/transport_lanes.h"
#include "transport/transport_math.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

// How costs are found: read, or made from this many coordinates (kAny: `dims` of them).
enum Source : int { kMatrix = 0, kAny = -1 };

// The exponents' terms of kRows rows at a group of columns: what epsilon divides is k times these.
template <class V, int kSource, bool kRoot, int kRows, class At, class T>
KD_LANES void costs_at(const At& at, const SoftminSweep<T>& s, int64_t i, V* out) {
  if constexpr (kSource == kMatrix) {
    for (int r = 0; r < kRows; ++r) out[r] = at.load(s.cost + (i + r) * s.column_count, T(0));
    return;
  }
  const int64_t dims = kSource > 0 ? kSource : s.dims;
  for (int r = 0; r < kRows; ++r) out[r] = V::zero();
  for (int64_t c = 0; c < dims; ++c) {
    const V column = at.load(s.columns + c * s.column_count, T(0));
    for (int r = 0; r < kRows; ++r) {
      const V difference = V(s.rows[c * s.row_count + i + r]) - column;
      out[r] = fma(difference, difference, out[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kRoot) {
      const V least = V(T(kLeastSquare));
      out[r] = sqrt(select(out[r] < least, least, out[r]));  // NaN stays
    } else {
      out[r] *= V(T(0.5));
    }
  }
}

// sum_j 2^(h_j - k C_ij + base_i) of kRows rows.
template <class V, int kSource, bool kRoot, int kRows, class T>
KD_LANES void sums_of(const SoftminSweep<T>& s, int64_t i, const T* base, T* out) {
  V total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = V::zero();
  for_lanes<V>(
      s.column_count, KD_BODY {
        V cost[kRows];
        costs_at<V, kSource, kRoot, kRows>(at, s, i, cost);
        // Lanes that do not exist have no weight.
        const V h = at.load(s.h, T(-kInfinity));
        for (int r = 0; r < kRows; ++r) {
          total[r] += exp2(fnma(V(s.k), cost[r], h) + V(base[r]));
        }
      });
  for (int r = 0; r < kRows; ++r) out[r] = reduce_add(total[r]);
}

// The base that makes the largest term of row i one.
template <class V, int kSource, bool kRoot, class T>
T safe_base(const SoftminSweep<T>& s, int64_t i) {
  V top(T(-kInfinity));
  for_lanes<V>(
      s.column_count, KD_BODY {
        V cost;
        costs_at<V, kSource, kRoot, 1>(at, s, i, &cost);
        top = max(fnma(V(s.k), cost, at.load(s.h, T(-kInfinity))), top);
      });
  const T highest = reduce_max(top);
  return highest == T(-kInfinity) ? T(0) : -highest;
}

// D sum_j P_ij dC_ij / dx_i, once the row's sum is known.
template <class V, int kSource, bool kRoot, class T>
void slopes_of(const SoftminSweep<T>& s, int64_t i, T base, T factor) {
  constexpr int kMost = kSource > 0 ? kSource : static_cast<int>(kMostCoordinates);
  const int64_t dims = kSource > 0 ? kSource : s.dims;
  V total[kMost];
  for (int64_t c = 0; c < dims; ++c) total[c] = V::zero();
  for_lanes<V>(
      s.column_count, KD_BODY {
        V cost;
        costs_at<V, kSource, kRoot, 1>(at, s, i, &cost);
        V weight = exp2(fnma(V(s.k), cost, at.load(s.h, T(-kInfinity))) + V(base));
        if constexpr (kRoot) {
          weight = select(cost > V(T(kLeastDistance)), weight / cost, V::zero());
        }
        for (int64_t c = 0; c < dims; ++c) {
          const V column = at.load(s.columns + c * s.column_count, T(0));
          total[c] = fma(weight, V(s.rows[c * s.row_count + i]) - column, total[c]);
        }
      });
  for (int64_t c = 0; c < dims; ++c) {
    s.slopes[c * s.slope_stride + i] = factor * reduce_add(total[c]);
  }
}

// The weights themselves, in the cost's place.
template <class V, bool kRoot, class T>
void weights_of(const SoftminSweep<T>& s, int64_t i, T base, T factor) {
  T* row = s.cost + i * s.column_count;
  for_lanes<V>(
      s.column_count, KD_BODY {
        const V cost = at.load(row, T(0));
        V weight = V(factor) * exp2(fnma(V(s.k), cost, at.load(s.h, T(-kInfinity))) + V(base));
        if constexpr (kRoot) {
          weight = select(cost > V(T(kLeastDistance)), weight / cost, V::zero());
        }
        at.save(row, weight);
      });
}

template <class V, int kSource, bool kRoot, int kRows, class T>
KD_LANES void softmin_group(const SoftminSweep<T>& s, int64_t i) {
  T base[kRows], sum[kRows];
  // With the potential before as base the sum is near one.
  for (int r = 0; r < kRows; ++r) {
    base[r] = s.before != nullptr ? s.before[i + r] * s.k / s.damping
                                  : safe_base<V, kSource, kRoot>(s, i + r);
  }
  sums_of<V, kSource, kRoot, kRows>(s, i, base, sum);
  for (int r = 0; r < kRows; ++r) {
    if (!(sum[r] > T(kSmallSum) && sum[r] < T(kLargeSum))) {
      base[r] = safe_base<V, kSource, kRoot>(s, i + r);
      sums_of<V, kSource, kRoot, 1>(s, i + r, &base[r], &sum[r]);
    }
    const T potential = softmin(sum[r], base[r], T(1) / s.k, s.damping);
    s.after[i + r] = s.average ? (s.before[i + r] + potential) / T(2) : potential;
    const T factor = s.damping / sum[r];
    if constexpr (kSource == kMatrix) {
      if (s.weights) weights_of<V, kRoot>(s, i + r, base[r], factor);
    } else {
      if (s.slopes != nullptr) slopes_of<V, kSource, kRoot>(s, i + r, base[r], factor);
    }
  }
}

template <class V, int kSource, bool kRoot, class T>
void softmin_rows(const SoftminSweep<T>& s, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  int64_t i = begin;
  for (; i + kRows <= end; i += kRows) softmin_group<V, kSource, kRoot, kRows>(s, i);
  for (; i < end; ++i) softmin_group<V, kSource, kRoot, 1>(s, i);
}

template <class V, bool kRoot, class T>
void softmin_source(const SoftminSweep<T>& s, int64_t begin, int64_t end) {
  if (s.cost != nullptr) return softmin_rows<V, kMatrix, kRoot>(s, begin, end);
  if (s.dims == 1) return softmin_rows<V, 1, kRoot>(s, begin, end);
  if (s.dims == 2) return softmin_rows<V, 2, kRoot>(s, begin, end);
  if (s.dims == 3) return softmin_rows<V, 3, kRoot>(s, begin, end);
  softmin_rows<V, kAny, kRoot>(s, begin, end);
}

template <class V, class T>
void softmin_sweep(const SoftminSweep<T>& s, int64_t begin, int64_t end) {
  s.root ? softmin_source<V, true>(s, begin, end) : softmin_source<V, false>(s, begin, end);
}

template <class V>
struct Filled {
  using T = typename V::Scalar;
  static constexpr AnnealedTable<T> table = {&softmin_sweep<V, T>};
};

}  // namespace

const AnnealedTable<float>* annealed_float() {
  return &Filled<VecF>::table;
}
const AnnealedTable<double>* annealed_double() {
  return &Filled<VecD>::table;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
