// CUDA: one block a row of the chunk. The row's products lie in L2 (a chunk was just written by a
// matrix product), so the walks over it cost no DRAM traffic.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "relation/relation_check.h"

namespace kd::cuda {
namespace {

using relation::Constants;
using relation::Kind;
using relation::Terms;

constexpr int kThreads = 256;

// ---- kernels -----------------------------------------------------------------------------------

// Sums of a row: a thread's share in F, over the block in double.
template <int n>
struct Sums {
  double value[n];
  KD_HOST_DEVICE Sums() {
    for (int i = 0; i < n; ++i) value[i] = 0;
  }
  KD_HOST_DEVICE void merge(const Sums& other) {
    for (int i = 0; i < n; ++i) value[i] += other.value[i];
  }
};

template <class F>
struct Entry {
  F as, at;                // a of both sides; distances for the distance kinds
  F product_s, product_t;  // as they came; distance kinds: 1 / d, 0 where it carries no gradient
};

template <class F>
struct RowContext {
  int64_t h, r, own;
  F *student, *teacher;
  F scale_s, scale_t;
  const F *column_norms_s, *column_norms_t;
  F row_norm_s, row_norm_t;

  KD_DEVICE RowContext(const RelationRows& call, int64_t index)
      : h(index / call.chunk_rows), r(index % call.chunk_rows) {
    own = call.selection.first_row + r + call.selection.diagonal;
    student = static_cast<F*>(call.student) + index * call.columns;
    teacher = call.teacher ? static_cast<F*>(call.teacher) + index * call.columns : student;
    scale_s = *static_cast<const F*>(call.student_scale);
    scale_t = call.teacher_scale ? *static_cast<const F*>(call.teacher_scale) : scale_s;
    column_norms_s = column_norms_t = nullptr;
    row_norm_s = row_norm_t = F(0);
    if (call.norms) {
      const F* norms = static_cast<const F*>(call.norms) + h * call.norms_stride[1];
      const int64_t i = call.selection.first_row + r;
      row_norm_s = norms[i], row_norm_t = norms[2 * call.norms_stride[0] + i];
      column_norms_s = norms + call.norms_stride[0];
      column_norms_t = norms + 3 * call.norms_stride[0];
    }
  }
};

template <Kind kKind, class F>
KD_DEVICE Entry<F> entry_at(const RowContext<F>& row, const Constants<F>& c, int64_t j) {
  Entry<F> x;
  x.product_s = row.student[j];
  x.product_t = relation::has_teacher(kKind) ? row.teacher[j] : x.product_s;
  if constexpr (relation::is_distance(kKind)) {
    const F floor(static_cast<F>(relation::kSquaredFloor));
    const F s2 = relation::squared_distance(x.product_s, row.row_norm_s, row.column_norms_s[j]);
    const F t2 = relation::squared_distance(x.product_t, row.row_norm_t, row.column_norms_t[j]);
    const bool off = j != row.own;
    x.as = off ? sqrt(s2 > floor ? s2 : floor) : F(0);
    x.at = off ? sqrt(t2 > floor ? t2 : floor) : F(0);
    x.product_s = off && s2 > floor ? F(1) / x.as : F(0);
    x.product_t = off && t2 > floor ? F(1) / x.at : F(0);
  } else {
    x.as = row.scale_s * x.product_s;
    x.at = row.scale_t * x.product_t;
    if (c.clamped) {
      x.as = max(x.as, c.clamp);
      x.at = max(x.at, c.clamp);
    }
  }
  return x;
}

template <Kind kKind, class F>
KD_DEVICE void normalisers(const RelationRows& call, const RowContext<F>& row, Constants<F>& c,
                           double* lse_s) {
  if constexpr (relation::is_softmax(kKind)) {
    F top_s = F(-kInfinity), top_t = F(-kInfinity);
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      if (!call.selection.entry(row.h, row.r, j)) continue;
      const Entry<F> x = entry_at<kKind>(row, c, j);
      top_s = max(top_s, x.as);
      top_t = max(top_t, x.at);
    }
    top_s = block_max(top_s);
    top_t = block_max(top_t);
    F s(0), t(0);
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      if (!call.selection.entry(row.h, row.r, j)) continue;
      const Entry<F> x = entry_at<kKind>(row, c, j);
      s += exp(x.as - top_s);
      t += exp(x.at - top_t);
    }
    Sums<2> sums;
    sums.value[0] = static_cast<double>(s), sums.value[1] = static_cast<double>(t);
    sums = block_reduce(sums);
    const double s_lse = static_cast<double>(top_s) + log(sums.value[0]);
    const double t_lse =
        relation::has_teacher(kKind) ? static_cast<double>(top_t) + log(sums.value[1]) : s_lse;
    c.s = static_cast<F>(s_lse), c.t = static_cast<F>(t_lse);
    c.shift = static_cast<F>(t_lse - s_lse);
    *lse_s = s_lse;
  } else if constexpr (relation::is_gram(kKind)) {
    F s(0), t(0);
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      if (!call.selection.entry(row.h, row.r, j)) continue;
      const Entry<F> x = entry_at<kKind>(row, c, j);
      if constexpr (kKind == Kind::kGramRowL2) {
        s += x.as * x.as, t += x.at * x.at;
      } else {
        s += (x.as + F(1)) * F(0.5), t += (x.at + F(1)) * F(0.5);
      }
    }
    Sums<2> sums;
    sums.value[0] = static_cast<double>(s), sums.value[1] = static_cast<double>(t);
    sums = block_reduce(sums);
    if constexpr (kKind == Kind::kGramRowL2) {
      const double ns = sqrt(sums.value[0]), nt = sqrt(sums.value[1]);
      c.floored_s = ns <= relation::kNormFloor, c.floored_t = nt <= relation::kNormFloor;
      c.s = static_cast<F>(1 / (c.floored_s ? relation::kNormFloor : ns));
      c.t = static_cast<F>(1 / (c.floored_t ? relation::kNormFloor : nt));
    } else {
      c.s = static_cast<F>(1 / sums.value[0]), c.t = static_cast<F>(1 / sums.value[1]);
    }
  } else if constexpr (kKind == Kind::kDistance) {
    const double* means = call.means + row.h * call.means_stride[0];
    const double ms = means[0], mt = means[call.means_stride[1]];
    c.s = static_cast<F>(ms > 0 ? 1 / ms : 0), c.t = static_cast<F>(mt > 0 ? 1 / mt : 0);
  }
}

// Rows: one block each. Threads: kThreads. Products in, gradients out, in place.
template <Kind kKind, class F>
__global__ void __launch_bounds__(kThreads, 2) relation_row_kernel(RelationRows call) {
  const int64_t index = blockIdx.x + static_cast<int64_t>(blockIdx.y) * gridDim.x;
  if (index >= call.graphs * call.chunk_rows) return;
  const RowContext<F> row(call, index);
  double* out = call.rows + index * kRelationRow;
  const bool need_s = call.need_student, need_t = call.need_teacher;
  F* pair_value =
      call.pair_value ? static_cast<F*>(call.pair_value) + index * call.columns : nullptr;
  Sums<1> selected;
  if (call.selection.row(row.h, row.r)) {
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      selected.value[0] += call.selection.entry(row.h, row.r, j) ? 1 : 0;
    }
  }
  selected = block_reduce(selected);
  if (selected.value[0] == 0) {
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      if (need_s) row.student[j] = F(0);
      if (need_t) row.teacher[j] = F(0);
      if (pair_value) pair_value[j] = F(0);
    }
    if (threadIdx.x < kRelationRow) out[threadIdx.x] = 0;
    return;
  }

  Constants<F> c;
  c.s = c.t = c.shift = c.es = c.et = c.inverse_s = c.inverse_t = F(0);
  c.beta = static_cast<F>(call.beta), c.margin = static_cast<F>(call.margin);
  c.clamp = static_cast<F>(call.clamp), c.clamped = call.clamped;
  c.floored_s = c.floored_t = false;
  double lse_s = 0;
  normalisers<kKind>(call, row, c, &lse_s);

  // The row's own column, for label_mix. Read before any thread writes gradients.
  const bool labelled = call.label_mix != 0 && row.own >= 0 && row.own < call.columns &&
                        call.selection.entry(row.h, row.r, row.own);
  double label_product = 0, label_a = 0;
  if (labelled) {
    label_product = static_cast<double>(row.student[row.own]);
    label_a = label_product * static_cast<double>(row.scale_s);
    if (call.clamped && label_a < call.clamp) label_a = call.clamp;
  }
  __syncthreads();
  const F mix = static_cast<F>(call.label_mix), kept = labelled ? F(1) - mix : F(1);
  F weight(1);
  if (call.row_weight) {
    weight = static_cast<const F*>(
        call.row_weight)[row.h * call.row_weight_stride[0] + row.r * call.row_weight_stride[1]];
  }
  const F* pair_weight = nullptr;
  if (call.pair_weight) {
    pair_weight = static_cast<const F*>(call.pair_weight) + row.h * call.pair_weight_stride[0] +
                  row.r * call.pair_weight_stride[1];
  }

  // scale_s, scale_t, weight_s, weight_t of the gradient walk.
  F shares[4] = {F(0), F(0), F(0), F(0)};
  const auto write = [&](const Entry<F>& x, int64_t j) {
    F gs, gt;
    relation::gradient<kKind>(x.as, x.at, c, &gs, &gt);
    if (pair_weight) {
      const F w = pair_weight[j * call.pair_weight_stride[2]];
      gs *= w, gt *= w;
    }
    if constexpr (relation::is_distance(kKind)) {
      shares[0] += gs * x.as, shares[1] += gt * x.at;
      gs *= (kKind == Kind::kDistance ? c.s : F(1)) * x.product_s;
      gt *= (kKind == Kind::kDistance ? c.t : F(1)) * x.product_t;
      shares[2] += gs, shares[3] += gt;
      if (need_s) row.student[j] = gs * weight;
      if (need_t) row.teacher[j] = gt * weight;
    } else {
      if constexpr (relation::is_softmax(kKind)) {
        if (labelled) {
          gs = fma(mix, exp(x.as - c.s), gs * kept);
          if (j == row.own) gs -= mix;
          gt *= kept;
        }
      }
      if (c.clamped) {
        gs = x.as > c.clamp ? gs : F(0);
        gt = x.at > c.clamp ? gt : F(0);
      }
      if (need_s) {
        shares[0] += gs * x.product_s;
        row.student[j] = gs * (weight * row.scale_s);
      }
      if (need_t) {
        shares[1] += gt * x.product_t;
        row.teacher[j] = gt * (weight * row.scale_t);
      }
    }
  };

  // value, es, et, and distance_sum's sums and counts.
  F sums[7] = {F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
  const bool needs_second = !relation::is_fused(kKind) || (need_t && relation::is_softmax(kKind));
  const bool fused = (need_s || need_t) && !needs_second;
  for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
    if (!call.selection.entry(row.h, row.r, j)) {
      if (fused && need_s) row.student[j] = F(0);
      if (fused && need_t) row.teacher[j] = F(0);
      if (pair_value) pair_value[j] = F(0);
      continue;
    }
    const Entry<F> x = entry_at<kKind>(row, c, j);
    const Terms<F> term = relation::terms<kKind>(x.as, x.at, c);
    sums[0] += term.value, sums[1] += term.es, sums[2] += term.et;
    if constexpr (relation::is_element(kKind)) {
      if (pair_value) pair_value[j] = term.value;
    }
    if constexpr (kKind == Kind::kDistanceSum) {
      sums[3] += x.as, sums[4] += x.at;
      sums[5] += x.as > F(0) ? F(1) : F(0), sums[6] += x.at > F(0) ? F(1) : F(0);
    }
    if (fused) write(x, j);
  }
  Sums<7> total;
  for (int i = 0; i < 7; ++i) total.value[i] = static_cast<double>(sums[i]);
  total = block_reduce(total);
  if ((need_s || need_t) && !fused) {
    c.es = static_cast<F>(total.value[1]), c.et = static_cast<F>(total.value[2]);
    for (int64_t j = threadIdx.x; j < call.columns; j += kThreads) {
      if (!call.selection.entry(row.h, row.r, j)) {
        if (need_s) row.student[j] = F(0);
        if (need_t) row.teacher[j] = F(0);
        continue;
      }
      write(entry_at<kKind>(row, c, j), j);
    }
  }
  Sums<4> share;
  for (int i = 0; i < 4; ++i) share.value[i] = static_cast<double>(shares[i]);
  share = block_reduce(share);
  if (threadIdx.x != 0) return;
  double value = kKind == Kind::kLogSumExp ? lse_s : total.value[0];
  if (labelled) {
    value = (1 - call.label_mix) * total.value[0] + call.label_mix * (lse_s - label_a);
  }
  out[kRowValue] = value, out[kRowCount] = selected.value[0];
  out[kRowScaleS] = share.value[0], out[kRowScaleT] = share.value[1];
  out[kRowWeightS] = share.value[2] * static_cast<double>(weight);
  out[kRowWeightT] = share.value[3] * static_cast<double>(weight);
  out[kRowSumS] = total.value[3], out[kRowSumT] = total.value[4];
  out[kRowPositiveS] = total.value[5], out[kRowPositiveT] = total.value[6];
}

// ---- launchers ---------------------------------------------------------------------------------

template <Kind kKind, class F>
void launch_relation_row(const RelationRows& call, Stream stream) {
  const int64_t rows = call.graphs * call.chunk_rows;
  // A grid's x dimension goes to 2^31 - 1, y to 65535.
  constexpr int64_t kWide = int64_t{1} << 30;
  const dim3 grid(static_cast<unsigned>(rows < kWide ? rows : kWide),
                  static_cast<unsigned>((rows + kWide - 1) / kWide));
  LaunchInfo info{"relation_row",
                  grid,
                  dim3(kThreads),
                  0,
                  stream,
                  "H=" + std::to_string(call.graphs) + ", R=" + std::to_string(call.chunk_rows) +
                      ", M=" + std::to_string(call.columns)};
  launch(info, relation_row_kernel<kKind, F>, call);
}

template <Kind kKind>
void launch_typed(const RelationRows& call, Stream stream) {
  if (!call.is_double) return launch_relation_row<kKind, float>(call, stream);
#if defined(__CUDACC__)
  detail::fail("student: CUDA kernels take float32 products, got float64");
#else
  launch_relation_row<kKind, double>(call, stream);
#endif
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void relation_rows(const RelationArgs& args) {
  const RelationRows call = resolve_relation_inline(args);
  if (call.graphs * call.chunk_rows == 0) return;
  DeviceGuard guard(args.student.device_index);
  const Stream stream = static_cast<Stream>(args.stream);
  switch (call.kind) {
    case Kind::kSoftmaxKl:
      return launch_typed<Kind::kSoftmaxKl>(call, stream);
    case Kind::kSoftmaxCrossEntropy:
      return launch_typed<Kind::kSoftmaxCrossEntropy>(call, stream);
    case Kind::kSoftmaxReverseKl:
      return launch_typed<Kind::kSoftmaxReverseKl>(call, stream);
    case Kind::kSoftmaxMse:
      return launch_typed<Kind::kSoftmaxMse>(call, stream);
    case Kind::kMse:
      return launch_typed<Kind::kMse>(call, stream);
    case Kind::kL1:
      return launch_typed<Kind::kL1>(call, stream);
    case Kind::kSmoothL1:
      return launch_typed<Kind::kSmoothL1>(call, stream);
    case Kind::kHuber:
      return launch_typed<Kind::kHuber>(call, stream);
    case Kind::kMarginL1:
      return launch_typed<Kind::kMarginL1>(call, stream);
    case Kind::kGramRowL2:
      return launch_typed<Kind::kGramRowL2>(call, stream);
    case Kind::kGramRowL1:
      return launch_typed<Kind::kGramRowL1>(call, stream);
    case Kind::kLogSumExp:
      return launch_typed<Kind::kLogSumExp>(call, stream);
    case Kind::kDistanceSum:
      return launch_typed<Kind::kDistanceSum>(call, stream);
    case Kind::kDistance:
      return launch_typed<Kind::kDistance>(call, stream);
  }
}

}  // namespace kd::cuda
