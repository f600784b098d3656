// Row loops of the graph features against SIMD lanes; compiled once per ISA.
#include "gromov/gromov_cpu.h"

#include "common/parallel.h"
#include "common/topk_rows.h"
#include "gromov/gromov_math.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

namespace {

template <class T>
using Compute = typename Lanes<T>::Scalar;

template <class T>
void forward(const NodeRows& rows, int64_t begin, int64_t end, void* scratch) {
  using S = Compute<T>;
  const int64_t k = rows.k;
  S* kept = static_cast<S*>(scratch);
  int32_t* kept_indices = reinterpret_cast<int32_t*>(kept + TopKBuffer<S>::capacity(k));
  for (int64_t r = begin; r < end; ++r) {
    S* values = static_cast<S*>(rows.values) + r * k;
    S* stats = static_cast<S*>(rows.stats) + r * kNodeStats;
    int32_t* indices = rows.indices + r * k;
    if (rows.mask != nullptr && !rows.mask[r * rows.mask_stride]) {
      for (int64_t j = 0; j < k; ++j) {
        values[j] = S(0);
        indices[j] = -1;
      }
      for (int s = 0; s < kNodeStats; ++s) stats[s] = S(0);
      continue;
    }
    const T* row = static_cast<const T*>(rows.logits) + r * rows.row_stride;
    TopKBuffer<S> top(k, kept, kept_indices);
    Moments<double> moments;
    if (rows.spec.standardize) {
      scan_row<true>(row, rows.columns, top, moments);
    } else {
      scan_row<false>(row, rows.columns, top, moments);
    }
    const RowScale scale = row_scale(moments, rows.spec.standardize, rows.spec.temperature);
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      const double z = node_value(kept[j], scale);
      values[j] = static_cast<S>(z);
      indices[j] = kept_indices[j];
      sum += z;
    }
    stats[kNodeMean] = static_cast<S>(scale.mean);
    stats[kNodeDeviation] = static_cast<S>(scale.deviation);
    stats[kNodeScale] = static_cast<S>(scale.scale);
    stats[kNodeCount] = static_cast<S>(scale.count);
    stats[kNodeSum] = static_cast<S>(sum);
  }
}

// One row of n zeros, past the cache: a gradient row is not read again soon.
template <class T>
void fill_zero(T* out, int64_t n) {
  using V = Lanes<T>;
  int64_t i = 0;
  for (; i < n && !is_aligned(out + i); ++i) out[i] = T{};
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) stream2(out + i, V::zero(), V::zero());
  for (; i < n; ++i) out[i] = T{};
}

template <class T>
void dense_gradient(const T* row, int64_t n, const RowScale& scale, const RowGradient& gradient,
                    T* out) {
  using V = Lanes<T>;
  using S = typename V::Scalar;
  const V mean(static_cast<S>(scale.mean)), slope(static_cast<S>(gradient.slope));
  const V constant(static_cast<S>(gradient.constant));
  const auto scalar = [&](int64_t i) {
    const S x = static_cast<S>(to_float(row[i]));
    out[i] = cast<T>(entry_gradient(x, static_cast<S>(scale.mean), static_cast<S>(gradient.slope),
                                    static_cast<S>(gradient.constant)));
  };
  int64_t i = 0;
  for (; i < n && !is_aligned(out + i); ++i) scalar(i);
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    const V x = V::load(row + i), y = V::load(row + i + V::kLanes);
    stream2(out + i, entry_gradient(x, mean, slope, constant),
            entry_gradient(y, mean, slope, constant));
  }
  for (; i < n; ++i) scalar(i);
}

template <class T>
void backward(const NodeRows& rows, int64_t begin, int64_t end) {
  using S = Compute<T>;
  const int64_t k = rows.k, n = rows.columns;
  for (int64_t r = begin; r < end; ++r) {
    T* out = static_cast<T*>(rows.grad) + r * n;
    if (rows.mask != nullptr && !rows.mask[r * rows.mask_stride]) {
      fill_zero(out, n);
      continue;
    }
    const T* row = static_cast<const T*>(rows.logits) + r * rows.row_stride;
    const S* values = static_cast<const S*>(rows.values) + r * k;
    const S* stats = static_cast<const S*>(rows.stats) + r * kNodeStats;
    const int32_t* indices = rows.indices + r * k;
    const int64_t graph = r / rows.rows_per_graph;
    const double* h = rows.upstream + graph * k;
    const double share = node_share(rows.count[graph], k, rows.spec.average);
    double dot = 0, h_sum = 0, kept = 0;
    for (int64_t j = 0; j < k; ++j) {
      dot += h[j] * values[j];
      if (is_masked_logit(to_float(row[indices[j]]))) continue;
      h_sum += h[j];
      kept += 1;
    }
    const RowScale scale = {stats[kNodeMean], stats[kNodeDeviation], stats[kNodeScale],
                            stats[kNodeCount]};
    const RowGradient gradient = row_gradient(scale, share, stats[kNodeSum], dot, h_sum, kept,
                                              rows.spec.standardize, rows.spec.temperature);
    if (rows.spec.standardize) {
      dense_gradient(row, n, scale, gradient, out);
    } else {
      fill_zero(out, n);
    }
    stream_fence();  // the kept entries are written twice, in this order
    for (int64_t j = 0; j < k; ++j) {
      const double x = to_float(row[indices[j]]);
      if (is_masked_logit(x)) continue;
      const double rest = gradient.constant + gradient.slope * (x - scale.mean);
      out[indices[j]] = cast<T>(static_cast<S>(rest + gradient.per_h * h[j] + gradient.flat));
    }
  }
  stream_fence();
}

}  // namespace

const NodeTable* node_table() {
  static const NodeTable table = {
      {forward<float>, forward<f16>, forward<bf16>, forward<double>},
      {backward<float>, backward<f16>, backward<bf16>, backward<double>},
  };
  return &table;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
