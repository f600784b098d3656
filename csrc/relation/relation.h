// Divergences between two maps of pairwise similarities: the contract of the row kernels.
//
// A caller walks over the maps in chunks of rows. For each chunk it makes the raw products
//
//   student[h, i, j] = <q_i, k_j>  of the student,   teacher[h, i, j] likewise     (H, R, M)
//
// by matrix products, and relation_rows turns them, in place, into the gradient of the row values
// with respect to these products; two further matrix products then give the gradients of q and k.
// So no map of N x N is ever held: a chunk has R rows, whatever N is.
//
//   a = clamp(scale * product)      the similarity, for both sides
//   softmax kinds                   p = softmax(a_teacher), q = softmax(a_student) over the
//   selected
//                                   columns of a row
//
// Kind                     row value (sums over the selected columns)
//   softmax_kl             sum p log(p/q)
//   softmax_cross_entropy  - sum p log q
//   softmax_reverse_kl     sum q log(q/p)
//   softmax_mse            sum (q - p)^2
//   mse, l1, smooth_l1, huber, margin_l1    sum rho(a_s - a_t); margin_l1: max(|x| - margin, 0)
//   gram_row_l2            sum (r_s - r_t)^2, r = a / max(|a|_2, 1e-12)         (row norms)
//   gram_row_l1            sum P_t log((P_t + 1e-7) / (P_s + 1e-7)), P = (a + 1) / sum (a + 1)
//   log_sum_exp            log sum exp a_s                                      (no teacher)
//   distance_sum           sum d_s; d = Euclidean distance from the products and the squared norms
//   distance               sum smooth_l1(d_s / mean_s - d_t / mean_t)
//
// Softmax kinds but log_sum_exp: (1 - label_mix) D + label_mix (- log q of the row's own column).
// The last two do not write gradients but weights W_ij = (d value / d d_ij) / d_ij: the gradient of
// x_i is sum_j W_ij (x_i - x_j). Distances of duplicates count as 1e-6 and carry none.
// A row without a selected column: value 0, gradient 0. Unselected entries: gradient exactly 0.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace kd {

enum class RelationKind : int {
  kSoftmaxKl = 0,
  kSoftmaxCrossEntropy = 1,
  kSoftmaxReverseKl = 2,
  kSoftmaxMse = 3,
  kMse = 4,
  kL1 = 5,
  kSmoothL1 = 6,
  kHuber = 7,
  kMarginL1 = 8,
  kGramRowL2 = 9,
  kGramRowL1 = 10,
  kLogSumExp = 11,
  kDistanceSum = 12,
  kDistance = 13,
};
constexpr int kRelationKinds = 14;

// The numbers of a call; Python passes them as a flat tuple in this order.
struct RelationSpec {
  double kind = 0;
  double need_student = 0, need_teacher = 0;  // overwrite the products by gradients
  double causal = 0;                          // column <= row
  double exclude_diagonal = 0;                // column != row
  double block = 0;                           // 1: same block only, 2: different blocks only
  double beta = 1;                            // smooth_l1, huber, distance
  double margin = 0;
  double clamped = 0, clamp = 0;  // lower bound on both maps
  double label_mix = 0;
  double first_row = 0;  // number of the chunk's first row in the map
  double diagonal = 0;   // column of row 0's own entry (sharded rows)
  double half = 0;       // the tokens hold float16 (1) or bfloat16 (2) numbers; for Python's choice
};

// clang-format off
#define KD_RELATION_SPEC_FIELDS(X) \
  X(kind) X(need_student) X(need_teacher) X(causal) X(exclude_diagonal) X(block) X(beta) \
  X(margin) X(clamped) X(clamp) X(label_mix) X(first_row) X(diagonal) X(half)
// clang-format on

// What forward reports of each row, float64.
enum RelationRow : int {
  kRowValue = 0,    // the row value, not weighted
  kRowCount = 1,    // selected columns
  kRowScaleS = 2,   // sum of (d value / d product) * product / scale: d value / d student scale
  kRowScaleT = 3,   //   distance: sum over d > 0 of (d value / d (d_s / mean_s)) d_s
  kRowWeightS = 4,  // distance kinds: sum of the row's weights W
  kRowWeightT = 5,
  kRowSumS = 6,  // distance_sum: sum d_s, and the columns with d_s > 0
  kRowSumT = 7,
  kRowPositiveS = 8,
  kRowPositiveT = 9,
  kRelationRow = 10,
};

struct RelationArgs {
  View student;        // (H, R, M) float32 | float64, contiguous: products in, gradients out
  View teacher;        // (H, R, M) same dtype; none for log_sum_exp
  View student_scale;  // () compute dtype
  View teacher_scale;  // () compute dtype
  View row_mask;       // (H, R) bool, or none
  View column_mask;    // (H, M) bool, or none
  View pair_mask;      // (P, R, M) bool, or none
  View pair_index;     // (H,) int64: which of the P masks serves graph h
  View row_block;      // (H, R) int64, with spec.block
  View column_block;   // (H, M) int64
  View row_weight;     // (H, R) compute dtype: multiplies the gradients, or none
  View pair_weight;    // (H, R, M) compute dtype: multiplies each entry's gradient, or none
  View norms;  // (4, H, max(N, M)) distance kinds: squared norms: student rows, student columns,
               //   teacher rows, teacher columns; rows counted in the whole map
  View means;  // (H, 2) distance: mean positive distance of student and teacher
  View pair_value;  // (H, R, M) compute dtype: the element kinds' entries, or none
  View rows;        // (H, R, kRelationRow) float64
  RelationSpec spec;
  void* stream = nullptr;
};

namespace cpu {
void relation_rows(const RelationArgs& args);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void relation_rows(const RelationArgs& args);
}  // namespace cuda

}  // namespace kd
