// The maths of the feature kinds: what a row needs once, in double, and what each entry needs.
//
// A row is walked up to five times: mean, squares, unit norms, values, gradients. Each walk gives
// sums; the functions here turn them into the few numbers that the next walk needs.
#pragma once

#include "common/macros.h"
#include "common/scalar.h"
#include "relation/feature.h"
#include "relation/relation_math.h"

namespace kd::feature {

using Kind = FeatureKind;
using Normalize = FeatureNormalize;

constexpr double kNormFloor = 1e-12;
constexpr double kLayerEpsilon = 1e-5;
constexpr double kDeviationEpsilon = 1e-6;

constexpr bool is_element(Kind kind) {
  return kind <= Kind::kHuber;
}
// rho of the element kinds is that of the relation kinds of the same name.
constexpr RelationKind rho_of(Kind kind) {
  return static_cast<RelationKind>(static_cast<int>(RelationKind::kMse) + static_cast<int>(kind));
}
static_assert(rho_of(Kind::kHuber) == RelationKind::kHuber, "same names, same order");

// How one side of a row is read: x = (entry - shift) rate, u = x unit.
struct Side {
  double shift = 0, rate = 1, unit = 1;
  bool floored = false;       // l2: the norm is at its floor and carries no gradient
  bool unit_floored = false;  // the same of the unit rows of the vector kinds
};

KD_HOST_DEVICE double inverse_norm(double squares, bool* floored) {
  const double norm = sqrt(squares);
  *floored = norm < kNormFloor;
  return 1 / (*floored ? kNormFloor : norm);
}

// From the sum of squares of the (centred) entries.
KD_HOST_DEVICE void set_rate(Side& side, Normalize how, double squares, int64_t width) {
  if (how == Normalize::kL2) side.rate = inverse_norm(squares, &side.floored);
  if (how == Normalize::kLayerNorm) {
    side.rate = 1 / sqrt(squares / static_cast<double>(width) + kLayerEpsilon);
  }
}

// Sums over a row of D = u - v: |D|^2, <D, u>, <D, v>, <u, v>.
struct VectorSums {
  double square, along_s, along_t, inner;
};

// The row value of a vector kind, and g_j = slope unit ((own_j - other_j) - along own_j) for both
// sides: the gradient by the row that the unit row was made of.
struct VectorValue {
  double value, slope, along_s, along_t;
};

KD_HOST_DEVICE VectorValue vector_value(Kind kind, const VectorSums& sums, const Side& s,
                                        const Side& t, double margin) {
  const bool plain = s.unit_floored || t.unit_floored;
  const double gap = plain ? 1 - sums.inner : sums.square / 2;  // 1 - cos
  VectorValue out{};
  if (kind == Kind::kNormalizedMse) {
    out.value = sums.square, out.slope = 2;
  } else if (kind == Kind::kCosine) {
    out.value = gap, out.slope = 1;
  } else if (kind == Kind::kMarginCosine) {
    const double over = gap - margin;
    // NaN is not below 0 and stays.
    out.value = over < 0 ? 0 : over, out.slope = over > 0 ? 1 : 0;
  } else {
    const double cosine = 1 - gap;
    out.value = log1p(exp(-cosine)), out.slope = 1 / (1 + exp(cosine));
  }
  // A floored norm is a constant: D itself for the squared distance, - other for the cosine.
  const double constant = kind == Kind::kNormalizedMse ? 0 : 1;
  out.along_s = s.unit_floored ? constant : sums.along_s;
  out.along_t = t.unit_floored ? constant : -sums.along_t;
  return out;
}

template <class F>
KD_HOST_DEVICE F vector_gradient(F own, F other, F scale, F along) {
  return scale * ((own - other) - along * own);
}

// The gradient by the entries, from g by the normalised row: rate (g_j - offset - along x_j).
struct Through {
  double rate = 1, offset = 0, along = 0;
};

// sum_g = sum of g, sum_gx = <g, x>. Of a vector kind both are 0: its g is orthogonal to x already.
KD_HOST_DEVICE Through through_normaliser(const Side& side, Normalize how, double sum_g,
                                          double sum_gx, int64_t width) {
  Through out;
  out.rate = side.rate;
  if (how == Normalize::kL2 && !side.floored) out.along = sum_gx;
  if (how == Normalize::kLayerNorm) {
    out.offset = sum_g / static_cast<double>(width);
    out.along = sum_gx / static_cast<double>(width);
  }
  return out;
}

// Standardize, one column of a group of `count` tokens. x = c inverse, c = entry - mean;
// d entry = inverse (g - sum g / count) - c pull, from sum_gc = sum g c.
KD_HOST_DEVICE double inverse_deviation(double squares, double count) {
  return 1 / (sqrt(squares / (count > 0 ? count : 1)) + kDeviationEpsilon);
}
KD_HOST_DEVICE double column_pull(double inverse, double sum_gc, double count) {
  const double deviation = 1 / inverse - kDeviationEpsilon;
  // A column without spread: its deviation carries no gradient.
  return deviation > 1e-3 * kDeviationEpsilon ? sum_gc * inverse * inverse / (count * deviation)
                                              : 0;
}

}  // namespace kd::feature
