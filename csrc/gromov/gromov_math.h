// The maths of graph features, once, for every backend. Per row it is k numbers, so it runs in
// double everywhere; the loops over V use what stands here as constants of the row.
#pragma once

#include "common/macros.h"
#include "common/scalar.h"
#include "common/topk.h"
#include "gromov/gromov.h"

namespace kd {

constexpr double kDeviationFloor = 1e-6;

// How a row's logits become z.
struct RowScale {
  double mean, deviation, scale, count;
};

KD_HOST_DEVICE RowScale row_scale(const Moments<double>& moments, bool standardize,
                                  double temperature) {
  if (!standardize) return {0, 0, 1 / temperature, 0};
  const double deviation = moments.deviation();
  return {moments.mean, deviation, 1 / ((deviation + kDeviationFloor) * temperature),
          moments.count};
}

template <class S>
KD_HOST_DEVICE bool is_masked_logit(S x) {
  return x == S(-kInfinity);
}

// z of a kept logit.
template <class S>
KD_HOST_DEVICE double node_value(S x, const RowScale& row) {
  return is_masked_logit(x) ? 0.0 : (static_cast<double>(x) - row.mean) * row.scale;
}

// What a graph's sums are multiplied by. No selected row: 0, so that f = 0.
KD_HOST_DEVICE double node_share(double selected, int64_t k, bool average) {
  if (selected == 0) return 0;
  return 1 / (selected * (average ? static_cast<double>(k) : 1.0));
}

// The row's gradient, with h = dL/df (k) of its graph:
//
//   g_j   = dL/dz_j = share (h_j S + D),  D = sum_i h_i z_i
//   dL/dx_v = constant + slope (x_v - mean) + [v kept] scale g_v
//
// where the first two terms are the paths through mean and deviation:
//   constant = - scale sum_j g_j / n,   slope = - scale tau sum_j g_j z_j / (n deviation),
//   sum_j g_j z_j = 2 share S D.
struct RowGradient {
  double constant, slope, per_h, flat;  // scale g_j = per_h h_j + flat
};

// `h_sum` is over the kept entries that are not -inf, `kept` their number; `dot` is D.
KD_HOST_DEVICE RowGradient row_gradient(const RowScale& row, double share, double sum, double dot,
                                        double h_sum, double kept, bool standardize,
                                        double temperature) {
  RowGradient out = {0, 0, row.scale * share * sum, row.scale * share * dot};
  if (!standardize || row.count == 0) return out;
  out.constant = -(out.per_h * h_sum + out.flat * kept) / row.count;
  // A row of equal logits has no direction in which its deviation grows: the subgradient 0.
  if (row.deviation != 0) {
    out.slope = -2 * row.scale * temperature * share * sum * dot / (row.count * row.deviation);
  }
  return out;
}

// One entry that is not kept; F a scalar or SIMD lanes.
template <class F>
KD_HOST_DEVICE F entry_gradient(F x, F mean, F slope, F constant) {
  return select(x == F(-kInfinity), F(0), fma(slope, x - mean, constant));
}

}  // namespace kd
