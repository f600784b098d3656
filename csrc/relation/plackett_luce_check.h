// Argument checks and strides of plackett_luce, for both backends.
#pragma once

#include "common/check.h"
#include "common/dispatch.h"
#include "relation/plackett_luce.h"

namespace kd {

inline void check_plackett_luce(const PlackettLuceArgs& a) {
  KD_CHECK(a.scores.ndim == 2, "student: expected shape (N, V), got ", shape_text(a.scores));
  const int64_t rows = a.scores.shape[0];
  check_rows(a.scores, "student", rows, a.scores.shape[1]);
  KD_CHECK(a.order.ndim == 2 && a.order.shape[0] == rows && a.order.shape[1] <= a.scores.shape[1],
           "order: expected shape (", rows, ", K), K <= ", a.scores.shape[1], ", got ",
           shape_text(a.order));
  check_rows(a.order, "order", rows, a.order.shape[1]);
  check_dtype(a.order, "order", DType::kInt64);
  const DType compute = a.scores.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  if (a.weights) {
    check_rows(a.weights, "weights", rows, a.order.shape[1]);
    check_dtype(a.weights, "weights", compute);
  }
  check_per_row(a.value, "value", rows);
  check_dtype(a.value, "value", DType::kFloat64);
  if (a.gradient) {
    check_rows(a.gradient, "gradient", rows, a.scores.shape[1]);
    check_dtype(a.gradient, "gradient", compute);
  }
}

}  // namespace kd
