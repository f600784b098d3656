// Softmax relations in tiles: products, softmax and gradients in one kernel, no row of the maps in
// memory. The contract is that of relation.h (kinds, selection, scales, label_mix, clamp); this one
// takes the tokens themselves where relation_rows takes their products.
//
// forward    row values, and the statistics of each row that the gradients need
// backward   gradients of the queries and keys of one side, from the same statistics
//
// Both make the products of float16 or bfloat16 tokens tile by tile on tensor cores (sm_80 and
// later), exactly and summed in float32. Softmax and slopes are float32, sums over a row double;
// slopes meet the tokens as the sum of two tf32 numbers (22 bits). No atomics: one block owns its
// rows, or its columns. (float32 tokens would take three tf32 products each, more work than the
// chunks of relation.h.)
#pragma once

#include "relation/relation.h"

namespace kd {

// What forward leaves of a row, float32.
enum SoftmaxStatistic : int {
  kStatTopS = 0,      // largest a of the student
  kStatInverseS = 1,  // 1 / sum e^(a - top); 0 for a row without a selected column
  kStatTopT = 2,
  kStatInverseT = 3,
  kStatLseS = 4,
  kStatShift = 5,  // log-sum-exp of the teacher minus that of the student
  kStatMeanS = 6,  // Terms::es and Terms::et summed over the row
  kStatMeanT = 7,
  kStatMix = 8,  // label_mix, or 0 where the row's own column is not selected
  kSoftmaxStatistics = 9,
};

struct SoftmaxRelationArgs {
  View q_s;         // (H, N, d) float16 | bfloat16, contiguous
  View k_s;         // (H, M, d)
  View q_t;         // (H, N, e) same dtype; none for log_sum_exp
  View k_t;         // (H, M, e)
  View statistics;  // (H, N, kSoftmaxStatistics) float32
  View dq_s;        // (H, N, d) float32, or none
  View dk_s;        // (H, M, d)
  View dq_t;        // (H, N, e)
  View dk_t;        // (H, M, e)
  // Scales, masks, blocks, row_weight, rows and spec of relation_rows; its products are not used.
  RelationArgs map;
};

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void softmax_relation(const SoftmaxRelationArgs& args);
}  // namespace cuda

}  // namespace kd
