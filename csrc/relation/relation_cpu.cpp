// The row loops against SIMD lanes, compiled once per ISA.
//
// A row of products is short (some KiB), so its walks after the first run in the L1 or L2 cache.
// Lanes are summed in blocks of 512 columns, blocks in double. The exponentials of a softmax row
// are taken once: the walk that sums them leaves them in the thread's scratch for the next. The
// same scratch holds the row's selection as lanes.
#include "common/parallel.h"
#include "common/simd.h"
#include "relation/lane_sum.h"
#include "relation/relation_math.h"
#include "relation/relation_rows.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

using relation::Constants;
using relation::Kind;
using relation::Terms;

constexpr int64_t kBlock = 512;

// One row of the chunk: where it lies and what is selected of it.
template <class T>
struct Row {
  const RelationRows& call;
  int64_t h, r;
  T* student;  // (M)
  T* teacher;  // (M), or the student again
  T scale_s, scale_t;
  const T *column_norms_s, *column_norms_t;  // distance kinds
  T row_norm_s, row_norm_t;
  T* selected = nullptr;  // (M) 1 or 0; none: not masked, or too long for the scratch
  T *chance_s = nullptr, *chance_t = nullptr;  // (M) e^(a - max), softmax kinds; none: too long

  KD_LANES Row(const RelationRows& c, int64_t index)
      : call(c), h(index / c.chunk_rows), r(index % c.chunk_rows) {
    student = static_cast<T*>(c.student) + index * c.row_stride;
    teacher = c.teacher ? static_cast<T*>(c.teacher) + index * c.row_stride : student;
    scale_s = *static_cast<const T*>(c.student_scale);
    scale_t = c.teacher_scale ? *static_cast<const T*>(c.teacher_scale) : scale_s;
    column_norms_s = column_norms_t = nullptr;
    row_norm_s = row_norm_t = 0;
    if (c.norms) {
      const T* norms = static_cast<const T*>(c.norms) + h * c.norms_stride[1];
      const int64_t i = c.selection.first_row + r;
      row_norm_s = norms[i], row_norm_t = norms[2 * c.norms_stride[0] + i];
      column_norms_s = norms + c.norms_stride[0];
      column_norms_t = norms + 3 * c.norms_stride[0];
    }
  }
  KD_LANES int64_t own() const { return call.selection.first_row + r + call.selection.diagonal; }
};

// Calls fn(j, n, selected) for the vectors of a row (n valid lanes from column j) and flush() after
// each block of columns.
template <class T, bool kMasked, class Fn, class Flush>
KD_LANES void each_vector(const Row<T>& row, const Fn& fn, const Flush& flush) {
  using V = Lanes<T>;
  const int64_t columns = row.call.columns;
  T block[kMasked ? kBlock + V::kLanes : 1];
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
    const T* selected = block;
    if constexpr (kMasked) {
      if (row.selected) {
        selected = row.selected + begin;
      } else {
        for (int64_t j = begin; j < end; ++j) {
          block[j - begin] = row.call.selection.entry(row.h, row.r, j) ? T(1) : T(0);
        }
        for (int64_t j = end; j < end + V::kLanes; ++j) block[j - begin] = T(0);
      }
    }
    for (int64_t j = begin; j < end; j += V::kLanes) {
      const int64_t n = end - j < V::kLanes ? end - j : V::kLanes;
      if constexpr (kMasked) {
        fn(j, n, V::load(selected + (j - begin)) > V::zero());
      } else {
        fn(j, n, V::Mask::first(n));
      }
    }
    flush();
  }
}

// 1 or 0 for each column of a row, and how many are 1: RelationSelection::entry condition by
// condition, so that each loop is simple enough to run in lanes.
template <class T>
int64_t select_columns(const RelationSelection& from, int64_t h, int64_t r, int64_t columns,
                       T* __restrict selected) {
  const RelationSelection s = from;
  for (int64_t j = 0; j < columns; ++j) selected[j] = T(1);
  if (s.column_mask != nullptr) {
    const uint8_t* __restrict mask = s.column_mask + h * s.column_stride[0];
    const int64_t step = s.column_stride[1];
    for (int64_t j = 0; j < columns; ++j) selected[j] = mask[j * step] != 0 ? T(1) : T(0);
  }
  if (s.pair_mask != nullptr) {
    const int64_t p = s.pair_index == nullptr ? h : s.pair_index[h * s.index_stride];
    const uint8_t* __restrict mask = s.pair_mask + p * s.pair_stride[0] + r * s.pair_stride[1];
    if (s.pair_stride[2] == 1) {
      for (int64_t j = 0; j < columns; ++j) selected[j] = mask[j] != 0 ? selected[j] : T(0);
    } else {
      for (int64_t j = 0; j < columns; ++j) {
        selected[j] = mask[j * s.pair_stride[2]] != 0 ? selected[j] : T(0);
      }
    }
  }
  const int64_t own = s.first_row + r + s.diagonal;
  if (s.causal) {
    for (int64_t j = own < 0 ? 0 : own + 1; j < columns; ++j) selected[j] = T(0);
  }
  if (s.exclude_diagonal && own >= 0 && own < columns) selected[own] = T(0);
  if (s.row_block != nullptr) {
    const int64_t mine = s.row_block[h * s.row_block_stride[0] + r * s.row_block_stride[1]];
    const int64_t* __restrict blocks = s.column_block + h * s.column_block_stride[0];
    const int64_t step = s.column_block_stride[1];
    for (int64_t j = 0; j < columns; ++j) {
      selected[j] = (blocks[j * step] == mine) == s.same_block ? selected[j] : T(0);
    }
  }
  int64_t count = 0;
  for (int64_t j = 0; j < columns; ++j) count += selected[j] != T(0);
  return count;
}

template <class V>
struct Similarities {
  V as, at;                // a of both sides; distances for the distance kinds
  V product_s, product_t;  // as they came
};

template <Kind kKind, class T, class V>
KD_LANES Similarities<V> similarities(const Row<T>& row, const Constants<V>& c, int64_t j,
                                      int64_t n) {
  Similarities<V> x;
  x.product_s = load_lanes<V>(row.student + j, n);
  x.product_t = relation::has_teacher(kKind) ? load_lanes<V>(row.teacher + j, n) : x.product_s;
  if constexpr (relation::is_distance(kKind)) {
    const V floor(static_cast<T>(relation::kSquaredFloor));
    const V off = select(V::iota() + V(static_cast<T>(j)) == V(static_cast<T>(row.own())),
                         V::zero(), V(T(1)));
    const V s2 = relation::squared_distance(x.product_s, V(row.row_norm_s),
                                            load_lanes<V>(row.column_norms_s + j, n));
    const V t2 = relation::squared_distance(x.product_t, V(row.row_norm_t),
                                            load_lanes<V>(row.column_norms_t + j, n));
    x.as = off * sqrt(select(s2 > floor, s2, floor));
    x.at = off * sqrt(select(t2 > floor, t2, floor));
    // From here on the products say where a distance carries a gradient: 1 / d, or 0.
    x.product_s = select((s2 > floor) & (off > V::zero()), V(T(1)) / x.as, V::zero());
    x.product_t = select((t2 > floor) & (off > V::zero()), V(T(1)) / x.at, V::zero());
  } else {
    x.as = V(row.scale_s) * x.product_s;
    x.at = V(row.scale_t) * x.product_t;
    if (c.clamped) {
      x.as = max(x.as, c.clamp);
      x.at = max(x.at, c.clamp);
    }
  }
  return x;
}

// Normalisers of softmax and Gram rows.
template <Kind kKind, class T, bool kMasked, class V>
KD_LANES void normalisers(const Row<T>& row, Constants<V>& c, double* lse_s) {
  const auto nothing = [] {};
  Sum<V> s, t;
  const auto flush = [&] { s.flush(), t.flush(); };
  if constexpr (relation::is_softmax(kKind)) {
    const V lowest(static_cast<T>(-__builtin_inff()));
    V top_s = lowest, top_t = lowest;
    each_vector<T, kMasked>(
        row,
        [&](int64_t j, int64_t n, typename V::Mask m) {
          const auto x = similarities<kKind>(row, c, j, n);
          top_s = max(top_s, select(m, x.as, lowest));
          if constexpr (relation::has_teacher(kKind)) top_t = max(top_t, select(m, x.at, lowest));
        },
        nothing);
    const T max_s = reduce_max(top_s);
    const T max_t = relation::has_teacher(kKind) ? reduce_max(top_t) : max_s;
    each_vector<T, kMasked>(
        row,
        [&](int64_t j, int64_t n, typename V::Mask m) {
          const auto x = similarities<kKind>(row, c, j, n);
          const V q = select(m, exp(x.as - V(max_s)), V::zero());
          s.add(q);
          if (row.chance_s) store(row.chance_s + j, q);
          if constexpr (relation::has_teacher(kKind)) {
            const V p = select(m, exp(x.at - V(max_t)), V::zero());
            t.add(p);
            if (row.chance_t) store(row.chance_t + j, p);
          }
        },
        flush);
    c.inverse_s = V(static_cast<T>(1 / s.total));
    c.inverse_t = relation::has_teacher(kKind) ? V(static_cast<T>(1 / t.total)) : V::zero();
    const double s_lse = static_cast<double>(max_s) + __builtin_log(s.total);
    const double t_lse =
        relation::has_teacher(kKind) ? static_cast<double>(max_t) + __builtin_log(t.total) : s_lse;
    c.s = V(static_cast<T>(s_lse)), c.t = V(static_cast<T>(t_lse));
    c.shift = V(static_cast<T>(t_lse - s_lse));
    *lse_s = s_lse;
  } else if constexpr (relation::is_gram(kKind)) {
    each_vector<T, kMasked>(
        row,
        [&](int64_t j, int64_t n, typename V::Mask m) {
          const auto x = similarities<kKind>(row, c, j, n);
          if constexpr (kKind == Kind::kGramRowL2) {
            s.add(select(m, x.as * x.as, V::zero()));
            t.add(select(m, x.at * x.at, V::zero()));
          } else {
            s.add(select(m, (x.as + V(T(1))) * V(T(0.5)), V::zero()));
            t.add(select(m, (x.at + V(T(1))) * V(T(0.5)), V::zero()));
          }
        },
        flush);
    if constexpr (kKind == Kind::kGramRowL2) {
      const double ns = __builtin_sqrt(s.total), nt = __builtin_sqrt(t.total);
      c.floored_s = ns <= relation::kNormFloor, c.floored_t = nt <= relation::kNormFloor;
      c.s = V(static_cast<T>(1 / (c.floored_s ? relation::kNormFloor : ns)));
      c.t = V(static_cast<T>(1 / (c.floored_t ? relation::kNormFloor : nt)));
    } else {
      c.s = V(static_cast<T>(1 / s.total)), c.t = V(static_cast<T>(1 / t.total));
    }
  } else if constexpr (kKind == Kind::kDistance) {
    const double* means = row.call.means + row.h * row.call.means_stride[0];
    const double ms = means[0], mt = means[row.call.means_stride[1]];
    c.s = V(static_cast<T>(ms > 0 ? 1 / ms : 0)), c.t = V(static_cast<T>(mt > 0 ? 1 / mt : 0));
  }
}

template <class T>
KD_LANES void clear_row(const Row<T>& row, bool selected) {
  const RelationRows& call = row.call;
  const int64_t index = row.h * call.chunk_rows + row.r;
  double* out = call.rows + index * kRelationRow;
  for (int k = 0; k < kRelationRow; ++k) out[k] = 0;
  if (selected) return;
  const size_t bytes = static_cast<size_t>(call.columns) * sizeof(T);
  if (call.need_student) memset(row.student, 0, bytes);
  if (call.need_teacher) memset(row.teacher, 0, bytes);
  if (call.pair_value) memset(static_cast<T*>(call.pair_value) + index * call.columns, 0, bytes);
}

template <Kind kKind, class T, bool kMasked>
KD_LANES void run_row(const RelationRows& call, int64_t index) {
  using V = Lanes<T>;
  using M = typename V::Mask;
  Row<T> row(call, index);
  double* out = call.rows + index * kRelationRow;
  int64_t count = 0;
  // Rows of the scratch: whole vectors, so that a walk may store past the last column.
  const int64_t padded = (call.columns + V::kLanes) / V::kLanes * V::kLanes;
  const size_t length = static_cast<size_t>(padded);
  const size_t planes = (kMasked ? 1 : 0) + (relation::is_softmax(kKind) ? 2 : 0);
  const bool fits = planes > 0 && length <= kScratchLimit / sizeof(T) / planes;
  if (call.selection.row(row.h, row.r)) {
    count = call.columns;
    T* memory = fits ? reinterpret_cast<T*>(scratch(planes * length * sizeof(T))) : nullptr;
    if constexpr (kMasked) {
      if (fits) {
        row.selected = memory, memory += padded;
        count = select_columns(call.selection, row.h, row.r, call.columns, row.selected);
        for (int64_t j = call.columns; j < padded; ++j) row.selected[j] = T(0);
      } else {
        count = 0;
        for (int64_t j = 0; j < call.columns; ++j) {
          count += call.selection.entry(row.h, row.r, j) ? 1 : 0;
        }
      }
    }
    if constexpr (relation::is_softmax(kKind)) {
      if (fits) row.chance_s = memory, row.chance_t = memory + padded;
    }
  }
  clear_row(row, count > 0);
  if (count == 0) return;
  out[kRowCount] = static_cast<double>(count);

  Constants<V> c;
  c.s = c.t = c.shift = c.es = c.et = c.inverse_s = c.inverse_t = V::zero();
  c.beta = V(static_cast<T>(call.beta)), c.margin = V(static_cast<T>(call.margin));
  c.clamp = V(static_cast<T>(call.clamp)), c.clamped = call.clamped;
  c.floored_s = c.floored_t = false;
  double lse_s = 0;
  normalisers<kKind, T, kMasked>(row, c, &lse_s);

  // The row's own column, for label_mix.
  const int64_t own = row.own();
  const bool labelled = call.label_mix != 0 && own >= 0 && own < call.columns &&
                        (!kMasked || call.selection.entry(row.h, row.r, own));
  [[maybe_unused]] double label_product = 0, label_a = 0;
  if (labelled) {
    label_product = static_cast<double>(row.student[own]);
    label_a = label_product * static_cast<double>(row.scale_s);
    if (call.clamped && label_a < call.clamp) label_a = call.clamp;
  }
  const T kept = labelled ? static_cast<T>(1 - call.label_mix) : T(1);

  T weight(1);
  if (call.row_weight) {
    weight = static_cast<const T*>(
        call.row_weight)[row.h * call.row_weight_stride[0] + row.r * call.row_weight_stride[1]];
  }
  const T* pair_weight = nullptr;
  if (call.pair_weight) {
    pair_weight = static_cast<const T*>(call.pair_weight) + row.h * call.pair_weight_stride[0] +
                  row.r * call.pair_weight_stride[1];
  }
  T* pair_value =
      call.pair_value ? static_cast<T*>(call.pair_value) + index * call.columns : nullptr;
  const bool need_s = call.need_student, need_t = call.need_teacher;
  Sum<V> value, es, et, scale_s, scale_t, weight_s, weight_t, sum_s, sum_t, positive_s, positive_t;

  // The chances of one vector of entries, softmax kinds.
  const auto chances = [&](const Similarities<V>& x, int64_t j, V* p, V* q) {
    if (row.chance_s) {
      *q = V::load(row.chance_s + j) * c.inverse_s;
      *p = relation::has_teacher(kKind) ? V::load(row.chance_t + j) * c.inverse_t : V::zero();
    } else {
      *q = exp(x.as - c.s);
      *p = relation::has_teacher(kKind) ? exp(x.at - c.t) : V::zero();
    }
  };
  // Writes the gradient of one vector of entries over its products.
  const auto write = [&](const Similarities<V>& x, int64_t j, int64_t n, M m) {
    V gs, gt;
    [[maybe_unused]] V p, q;
    if constexpr (relation::is_softmax(kKind)) {
      chances(x, j, &p, &q);
      relation::softmax_gradient<kKind>(p, q, x.as, x.at, c, &gs, &gt);
    } else {
      relation::gradient<kKind>(x.as, x.at, c, &gs, &gt);
    }
    if (pair_weight) {
      T gathered[V::kLanes];
      for (int64_t i = 0; i < n; ++i)
        gathered[i] = pair_weight[(j + i) * call.pair_weight_stride[2]];
      const V w = load_lanes<V>(gathered, n);
      gs *= w, gt *= w;
    }
    if constexpr (relation::is_distance(kKind)) {
      const V mean_s = kKind == Kind::kDistance ? c.s : V(T(1));
      const V mean_t = kKind == Kind::kDistance ? c.t : V(T(1));
      // The means' share of the gradient counts every positive distance, duplicates too.
      scale_s.add(select(m, gs * x.as, V::zero()));
      scale_t.add(select(m, gt * x.at, V::zero()));
      gs = select(m, gs * mean_s * x.product_s, V::zero());
      gt = select(m, gt * mean_t * x.product_t, V::zero());
      weight_s.add(gs), weight_t.add(gt);
      if (need_s) store_lanes(row.student + j, gs * V(weight), n);
      if (need_t) store_lanes(row.teacher + j, gt * V(weight), n);
    } else {
      if constexpr (relation::is_softmax(kKind)) {
        if (labelled) {
          gs = fma(V(static_cast<T>(call.label_mix)), q, gs * V(kept));
          gt *= V(kept);
        }
      }
      gs = select(m, gs, V::zero()), gt = select(m, gt, V::zero());
      if (c.clamped) {
        gs = select(x.as > c.clamp, gs, V::zero());
        gt = select(x.at > c.clamp, gt, V::zero());
      }
      if (need_s) {
        scale_s.add(select(m, gs * x.product_s, V::zero()));
        store_lanes(row.student + j, gs * V(weight * row.scale_s), n);
      }
      if (need_t) {
        scale_t.add(select(m, gt * x.product_t, V::zero()));
        store_lanes(row.teacher + j, gt * V(weight * row.scale_t), n);
      }
    }
  };

  const bool needs_second = !relation::is_fused(kKind) || (need_t && relation::is_softmax(kKind));
  const bool fused = (need_s || need_t) && !needs_second;
  each_vector<T, kMasked>(
      row,
      [&](int64_t j, int64_t n, M m) {
        const auto x = similarities<kKind>(row, c, j, n);
        if constexpr (kKind != Kind::kLogSumExp) {
          Terms<V> term;
          if constexpr (relation::is_softmax(kKind)) {
            V p, q;
            chances(x, j, &p, &q);
            term = relation::softmax_terms<kKind>(p, q, x.as, x.at, c);
          } else {
            term = relation::terms<kKind>(x.as, x.at, c);
          }
          value.add(select(m, term.value, V::zero()));
          if (needs_second) {
            es.add(select(m, term.es, V::zero()));
            et.add(select(m, term.et, V::zero()));
          }
          if constexpr (relation::is_element(kKind)) {
            if (pair_value) store_lanes(pair_value + j, select(m, term.value, V::zero()), n);
          }
          if constexpr (kKind == Kind::kDistanceSum) {
            const V one(T(1));
            sum_s.add(select(m, x.as, V::zero())), sum_t.add(select(m, x.at, V::zero()));
            positive_s.add(select(m & (x.as > V::zero()), one, V::zero()));
            positive_t.add(select(m & (x.at > V::zero()), one, V::zero()));
          }
        }
        if (fused) write(x, j, n, m);
      },
      [&] {
        value.flush();
        if (needs_second) es.flush(), et.flush();
        if (fused) {
          if (need_s) scale_s.flush();
          if (need_t) scale_t.flush();
        }
        if constexpr (relation::is_distance(kKind)) {
          scale_s.flush(), scale_t.flush(), weight_s.flush(), weight_t.flush();
          sum_s.flush(), sum_t.flush(), positive_s.flush(), positive_t.flush();
        }
      });
  if ((need_s || need_t) && !fused) {
    c.es = V(static_cast<T>(es.total)), c.et = V(static_cast<T>(et.total));
    each_vector<T, kMasked>(
        row, [&](int64_t j, int64_t n, M m) { write(similarities<kKind>(row, c, j, n), j, n, m); },
        [&] { scale_s.flush(), scale_t.flush(); });
  }

  out[kRowValue] = kKind == Kind::kLogSumExp ? lse_s : value.total;
  out[kRowScaleS] = scale_s.total, out[kRowScaleT] = scale_t.total;
  out[kRowWeightS] = weight_s.total * static_cast<double>(weight);
  out[kRowWeightT] = weight_t.total * static_cast<double>(weight);
  out[kRowSumS] = sum_s.total, out[kRowSumT] = sum_t.total;
  out[kRowPositiveS] = positive_s.total, out[kRowPositiveT] = positive_t.total;
  if (labelled) {
    out[kRowValue] = (1 - call.label_mix) * value.total + call.label_mix * (lse_s - label_a);
    if (need_s && !(call.clamped && label_a <= call.clamp)) {
      out[kRowScaleS] -= call.label_mix * label_product;
      row.student[own] -= static_cast<T>(call.label_mix) * weight * row.scale_s;
    }
  }
}

template <Kind kKind, class T>
void run_rows(const RelationRows& call, int64_t begin, int64_t end) {
  if (call.masked) {
    for (int64_t i = begin; i < end; ++i) run_row<kKind, T, true>(call, i);
  } else {
    for (int64_t i = begin; i < end; ++i) run_row<kKind, T, false>(call, i);
  }
}

template <Kind kKind>
void run_typed(const RelationRows& call, int64_t begin, int64_t end) {
  if (call.is_double) {
    run_rows<kKind, double>(call, begin, end);
  } else {
    run_rows<kKind, float>(call, begin, end);
  }
}

}  // namespace

void relation_row_range(const RelationRows& call, int64_t begin, int64_t end) {
  switch (call.kind) {
    case Kind::kSoftmaxKl:
      return run_typed<Kind::kSoftmaxKl>(call, begin, end);
    case Kind::kSoftmaxCrossEntropy:
      return run_typed<Kind::kSoftmaxCrossEntropy>(call, begin, end);
    case Kind::kSoftmaxReverseKl:
      return run_typed<Kind::kSoftmaxReverseKl>(call, begin, end);
    case Kind::kSoftmaxMse:
      return run_typed<Kind::kSoftmaxMse>(call, begin, end);
    case Kind::kMse:
      return run_typed<Kind::kMse>(call, begin, end);
    case Kind::kL1:
      return run_typed<Kind::kL1>(call, begin, end);
    case Kind::kSmoothL1:
      return run_typed<Kind::kSmoothL1>(call, begin, end);
    case Kind::kHuber:
      return run_typed<Kind::kHuber>(call, begin, end);
    case Kind::kMarginL1:
      return run_typed<Kind::kMarginL1>(call, begin, end);
    case Kind::kGramRowL2:
      return run_typed<Kind::kGramRowL2>(call, begin, end);
    case Kind::kGramRowL1:
      return run_typed<Kind::kGramRowL1>(call, begin, end);
    case Kind::kLogSumExp:
      return run_typed<Kind::kLogSumExp>(call, begin, end);
    case Kind::kDistanceSum:
      return run_typed<Kind::kDistanceSum>(call, begin, end);
    case Kind::kDistance:
      return run_typed<Kind::kDistance>(call, begin, end);
  }
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
