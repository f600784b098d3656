// Statistics of each row pair without a loss, and the log-probability of a label with its gradient:
// the contract between callers and every backend.
//
//   p = softmax(a / tau_t)   teacher logits a   (N, V')
//   q = softmax(z / tau_s)   student logits z   (N, V)
//
// Two reads of the logits at most: normalisers and largest entries, then every sum with
// log p - log q taken from the difference of the logits. A row that is not selected (label ==
// ignore_index, or mask false) is 0 everywhere, whatever it holds; NaN or +inf in a row makes its
// numbers NaN and its ids 0. A label or a temperature out of range makes the row NaN too. A teacher
// row of only -inf has pair statistics 0. Ties of the largest logit go to the lowest id.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace kd {

// Rows of `numbers`, each (N,). What a call has no teacher or label for is written, but means
// nothing.
enum TokenNumber : int {
  kStudentLse = 0,  // log sum exp(z / tau_s)
  kTeacherLse = 1,
  kStudentEntropy = 2,
  kTeacherEntropy = 3,
  kForwardKl = 4,
  kReverseKl = 5,
  kTotalVariationOf = 6,
  kHellinger = 7,
  kStudentLabelLogProb = 8,  // log q[label]; 0 without labels
  kTeacherLabelLogProb = 9,
  kAgreement = 10,        // 1 where both argmaxes are the same id, else 0
  kStudentMaxLogit = 11,  // max z, not divided by tau_s
  kTeacherMaxLogit = 12,
  kStudentMaxProb = 13,
  kTeacherMaxProb = 14,
  kDot = 15,            // sum p q
  kStudentSquare = 16,  // sum q^2
  kTeacherSquare = 17,
  kTokenNumbers = 18,
};

struct TokenStatsArgs {
  View student;              // (N, V) float32 | float16 | bfloat16 | float64
  View teacher;              // (N, V'), or none; dtype independent of student's
  View labels;               // (N,) int64, or none
  View mask;                 // (N,) bool, or none
  View student_temperature;  // (N,) compute dtype, or none: tau_s
  View teacher_temperature;  // (N,) compute dtype, or none: tau_t
  View numbers;              // (kTokenNumbers, N) float32, out
  View ids;                  // (2, N) int64, out: argmax of the student, of the teacher
  double tau_s = 1, tau_t = 1;
  double ignore_index = -100;
  double student_columns = 0, teacher_columns = 0;  // valid ones; 0: all
  void* stream = nullptr;                           // CUDA stream
};

// Forward:  value = log q[label] = z[label] / tau - log sum exp(z / tau), and `stats`.
// Backward: upstream (onehot - q) / tau on possible logits, and upstream d value / d tau.
// A label whose logit is -inf has value -inf; its own logit has no gradient, nor has tau.
struct LabelLogProbsArgs {
  View logits;       // (N, V) float32 | float16 | bfloat16 | float64
  View labels;       // (N,) int64
  View mask;         // (N,) bool, or none
  View temperature;  // (N,) compute dtype, or none: tau
  View value;        // (N,) compute dtype; out
  // (N, 2) compute dtype: a reference near the row's maximum, and the sum of exponentials about it:
  // NaN where the logits are, -1 for a row without gradient (refused or not selected). Backward
  // runs where forward ran.
  View stats;
  View upstream;          // (N,) compute dtype; backward only
  View gradient;          // (N, V) dtype of logits, or none
  View grad_temperature;  // (N,) compute dtype, or none
  double tau = 1;
  double ignore_index = -100;
  double columns = 0;
  void* stream = nullptr;
};

namespace cpu {
void token_stats(const TokenStatsArgs& args);
void label_log_probs_fwd(const LabelLogProbsArgs& args);
void label_log_probs_bwd(const LabelLogProbsArgs& args);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void token_stats(const TokenStatsArgs& args);
void label_log_probs_fwd(const LabelLogProbsArgs& args);
void label_log_probs_bwd(const LabelLogProbsArgs& args);
}  // namespace cuda

}  // namespace kd
