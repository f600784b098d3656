// Divergences between softmaxed rows: the contract between callers and every backend.
//
//   p = softmax(a / tau_t)   teacher logits a   (N, V)
//   q = softmax(z / tau_s)   student logits z   (N, V)
//
// For each selected row, in this order:
//   D      the divergence (a linear combination of kinds, see Kind), each entry's non-negative
//          generator bounded by clip_element                      [if > 0]
//   clip   min(D, clip_token)                                     [if finite]
//   x      tau_s^2                                                [if temperature_squared]
//   +      label_weight * cross entropy(softmax(z), label)
//   x      weight
//   reduce "none": the row values; otherwise sum of row values / divisor
//
// Conventions: 0 * inf = 0; -inf logits are legal; a teacher row of only -inf gives 0 and gradient
// 0; an unselected row gives exactly 0 whatever it holds; NaN in a selected row stays in that row.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace kd {

// Kernels are templated on the group; the kind inside it is a run-time coefficient.
enum class DivergenceGroup : int { kLinear = 0, kMixture = 1, kProbability = 2, kPower = 3 };

// The kind beside the linear group (forward_kl, reverse_kl, cross_entropy and entropy, which are
// coefficients of their own and combine freely).
enum class Kind : int {
  kNone = 0,
  kJensenShannon = 1,  // first = beta
  kSkewForward = 2,    // first = alpha
  kSkewReverse = 3,    // first = alpha
  kTotalVariation = 4,
  kSquaredHellinger = 5,  // also hellinger and bhattacharyya, by Outer
  kTriangular = 6,
  kChiSquared = 7,
  kAlphaBeta = 8,  // first = alpha, second = beta
  kAlpha = 9,      // first = alpha; = kAlphaBeta with beta = 1 - alpha; also renyi, by Outer
};

constexpr DivergenceGroup group_of(Kind kind) {
  return kind == Kind::kNone          ? DivergenceGroup::kLinear
         : kind <= Kind::kSkewReverse ? DivergenceGroup::kMixture
         : kind <= Kind::kChiSquared  ? DivergenceGroup::kProbability
                                      : DivergenceGroup::kPower;
}

// What happens to the row's sum before it is clipped and scaled.
enum class Outer : int {
  kIdentity = 0,
  kSqrt = 1,           // hellinger = sqrt(squared_hellinger)
  kBhattacharyya = 2,  // -log(1 - squared_hellinger)
  kRenyi = 3,          // log1p(alpha (alpha - 1) D_alpha) / (alpha - 1)
};

enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2, kBatchMean = 3, kSequenceMean = 4 };

// Every number of a call that is the same for all rows. The Python side builds it as a flat tuple
// in exactly this order (kdkernels/backends/spec.py); KD_DIVERGENCE_SPEC_FIELDS lists the names.
struct DivergenceSpec {
  // Linear group: coefficients of each kind.
  double forward_kl = 1, reverse_kl = 0, cross_entropy = 0, entropy = 0;
  // One kind of another group beside it.
  double kind = 0;   // Kind
  double other = 0;  // its coefficient
  double first = 0;  // its parameters
  double second = 0;
  double detach_mixture = 0;  // mixture: the student part of M carries no gradient
  double outer = 0;           // Outer
  // Rows.
  double student_temperature = 1, teacher_temperature = 1;
  double temperature_squared = 0;
  double label_weight = 0;
  double ignore_index = -100;
  double clip_token = 0;  // <= 0: no clip
  // > 0: bound of each vocabulary entry's summand, whose gradient is 0 above it. The summands are
  // the non-negative generators of divergence_math.h, or, signed, the raw ones (p log(p/q), ...).
  double clip_element = 0, clip_signed = 0;
  // Reduction.
  double reduction = 2;          // Reduction
  double normalize_weights = 0;  // mean divides by the sum of weights instead of selected rows
  double num_items = 0;          // > 0: divisor instead of the mean's
  double batch = 1;              // size of dim 0, for batchmean and sequence_mean
  // Valid columns; beyond them a logit counts as -inf.
  double student_columns = 0, teacher_columns = 0;
};

// clang-format off
#define KD_DIVERGENCE_SPEC_FIELDS(X) \
  X(forward_kl) X(reverse_kl) X(cross_entropy) X(entropy) X(kind) X(other) X(first) \
  X(second) X(detach_mixture) X(outer) X(student_temperature) X(teacher_temperature) \
  X(temperature_squared) X(label_weight) X(ignore_index) X(clip_token) X(clip_element) \
  X(clip_signed) X(reduction) X(normalize_weights) X(num_items) X(batch) \
  X(student_columns) X(teacher_columns)
// clang-format on

// Saved statistics, a row of kStats numbers (float32; float64 for float64 logits). The first four
// are the business of the backend that wrote them: any reference near the row's maximum, in base 2
// (cpu: u = z * log2(e) / tau_s, so q = 2^(u - max_s) / sum_s) or as a logit (cuda: q = 2^((z -
// max_s) * log2(e) / tau_s) / sum_s), and the sum that goes with it; the teacher's as a
// code of its quotient by the student's, because at small gaps the logarithm of the quotient needs
// more digits than two rounded sums have. Backward runs where forward ran.
enum Stat : int {
  kMaxS = 0,  // reference of the student's exponentials, finite
  kSumS = 1,  // their sum
  kMaxT = 2,
  kSumT = 3,
  kDivergence = 4,  // D, before clip
  kCentreS = 5,     // sum_v q_v dD/dq_v up to the constants that cancel
  kCentreT = 6,     // sum_v p_v dD/dp_v, likewise
  kSlope = 7,       // d(row value)/d(sum): outer, clip and tau^2 in one factor. Negative: the sum
                    // is the overlap of two rows that hardly have one (divergence_math.h)
  kLabelLse = 8,    // natural log-sum-exp of z at tau = 1 (0 without label_weight)
  kValue = 9,       // the row's value before its weight
  kFactor = 10,     // what multiplies the row's value: selected * weight / divisor
  kUnit = 11,       // kFactor without the weight: selected / divisor
  kStats = 12,
};

struct DivergenceArgs {
  // Inputs.
  View student;              // (N, V) float32 | float16 | bfloat16 | float64
  View teacher;              // (N, V'), or none for kind entropy; dtype independent of student's
  View labels;               // (N,) int64, or none
  View mask;                 // (N,) bool, or none
  View weight;               // (N,) compute dtype, or none
  View student_temperature;  // (N,) compute dtype, or none: spec's number
  View teacher_temperature;  // (N,) compute dtype, or none
  View first;                // (N,) compute dtype: per-row spec.first, or none
  View second;               // (N,) compute dtype, or none
  View num_items;            // () compute dtype: divisor on the device, or none
  // Outputs of forward. The caller allocates; everything given is written whole.
  View value;  // () or, for Reduction::kNone, (N,): compute dtype
  View stats;  // (N, kStats) compute dtype
  // Gradients for upstream 1 in forward, for `upstream` in backward; none: not wanted.
  View grad_student;      // (N, V) dtype of student; may alias student (in place)
  View grad_teacher;      // (N, V') dtype of teacher
  View grad_temperature;  // (N, 2) compute dtype: d/d tau_s, d/d tau_t of each row
  // Backward only.
  View upstream;  // () or (N,) compute dtype
  DivergenceSpec spec;
  void* stream = nullptr;  // CUDA stream
};

// Forward: value and stats, and the gradients that are given.
// Backward: gradients from the logits, the stats of the forward and `upstream`.
// Both throw std::invalid_argument for arguments that do not fit together, and for labels out of
// range where the data can be looked at (CPU).
//
// The sum of several divergences of one student, `count` parts: their args have student, labels,
// mask, num_items, upstream and grad_student in common; teacher, weight (with the part's
// coefficient in it), temperatures, parameters, value, stats and spec are each part's own.
// grad_student gets the sum of the parts' gradients: one write, rounded once. No part has another
// gradient.
//   cpu    row by row all parts, their gradients gathered in one row in the cache
//   cuda   each part's statistics, then one pass over the student and all teachers for the gradient
constexpr int kMostSumParts = 8;  // of one call on cuda: the kernel's parameters are bounded

namespace cpu {
void divergence_fwd(const DivergenceArgs& args);
void divergence_bwd(const DivergenceArgs& args);
void divergence_sum_fwd(const DivergenceArgs* parts, int64_t count);
void divergence_sum_bwd(const DivergenceArgs* parts, int64_t count);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void divergence_fwd(const DivergenceArgs& args);
void divergence_bwd(const DivergenceArgs& args);
void divergence_sum_fwd(const DivergenceArgs* parts, int64_t count);
void divergence_sum_bwd(const DivergenceArgs* parts, int64_t count);
}  // namespace cuda

}  // namespace kd
