// Distances between vectors, token by token: the contract of the feature kernels.
//
// Rows s_i (student) and t_i (teacher), i < N, of d numbers. First both sides are normalised:
//
//   none           x
//   l2             x / max(|x|, 1e-12)
//   layer_norm     (x - mean) / sqrt(variance + 1e-5) over the row
//   standardize    (x - mean) / (deviation + 1e-6) over the tokens of a group, column by column
//
// Kind                  value (x, y the normalised rows; u, v their unit rows, norms >= 1e-12)
//   mse                 (x_j - y_j)^2                     one value an element
//   l1                  |x_j - y_j|
//   smooth_l1, huber    of x_j - y_j, with beta
//   normalized_mse      |u - v|^2                         one value a row
//   cosine              1 - <u, v>
//   margin_cosine       max(1 - <u, v> - margin, 0)
//   log_sigmoid_cosine  -log sigmoid(<u, v>)
//
// The value of a row is the sum of its elements. 1 - <u, v> is computed as |u - v|^2 / 2, which is
// exact where the rows are close; only a zero row takes the plain form.
//
// feature_rows reads each side from memory once (a row lies in cache while it is walked) and writes
// what it is given room for: values, or the gradients for an upstream. A row without mask is not
// read: its values and gradients are 0.
//
// feature_columns makes the means and the inverse deviations of standardize (one read), or, given
// the gradient of the standardised tokens, the gradient of the tokens.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace kd {

enum class FeatureKind : int {
  kMse = 0,
  kL1 = 1,
  kSmoothL1 = 2,
  kHuber = 3,
  kNormalizedMse = 4,
  kCosine = 5,
  kMarginCosine = 6,
  kLogSigmoidCosine = 7,
};
constexpr int kFeatureKinds = 8;

enum class FeatureNormalize : int { kNone = 0, kL2 = 1, kLayerNorm = 2, kStandardize = 3 };
constexpr int kFeatureNormalizes = 4;

struct FeatureArgs {
  View student;   // (N, d) float32 | float16 | bfloat16 | float64; "compute" is float32 or float64
  View teacher;   // (N, d) same dtype
  View mask;      // (N,) bool, or none
  View weight;    // (N, d) compute: multiplies the elements, or none; element kinds only
  View columns;   // (4, G, d) compute: mean and inverse deviation of student and teacher, for the
                  //   groups of N / G rows; standardize only
  View rows;      // (N,) float64: row values, or none
  View elements;  // (N, d) compute: the elements, not weighted, or none
  View row_upstream;      // (N,) float64: of the row values, or none
  View element_upstream;  // (N, d) compute: of the elements, or none
  View student_gradient;  // (N, d) the dtype of the rows (standardize: compute, and the gradient is
  View teacher_gradient;  //   that of the standardised tokens), or none
  View weight_gradient;   // (N, d) compute, or none
  int kind = 0, normalize = 0;
  double beta = 1, margin = 0;
  void* stream = nullptr;
};

struct FeatureColumnsArgs {
  View tokens;    // (G, L, d) float32 | float16 | bfloat16 | float64
  View mask;      // (G, L) bool, or none
  View columns;   // (2, G, d) compute: mean and inverse deviation; written, or with `gradient` read
  View gradient;  // (G, L, d) compute: of the standardised tokens, or none
  View out;       // (G, L, d) dtype of the tokens: their gradient, with `gradient`
  void* stream = nullptr;
};

namespace cpu {
void feature_rows(const FeatureArgs& args);
void feature_columns(const FeatureColumnsArgs& args);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void feature_rows(const FeatureArgs& args);
void feature_columns(const FeatureColumnsArgs& args);
}  // namespace cuda

}  // namespace kd
