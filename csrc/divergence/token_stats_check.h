// What must hold between the arguments of token_stats and label_log_probs before a kernel may touch
// them, for both backends. Looks at shapes, dtypes and numbers, never at data.
#pragma once

#include "divergence/divergence_check.h"
#include "divergence/token_stats.h"

namespace kd {

namespace detail {

inline void check_logits(const View& view, const char* argument) {
  KD_CHECK(view.ndim == 2, argument, ": expected shape (N, V), got ", shape_text(view));
  KD_CHECK(is_floating(view.dtype), argument, ": expected a floating dtype, got ",
           name(view.dtype));
  check_rows(view, argument, view.shape[0], view.shape[1]);
  KD_CHECK(view.shape[1] > 0 || view.shape[0] == 0, argument, ": expected at least one column");
}

}  // namespace detail

inline void check_token_stats(const TokenStatsArgs& a) {
  const View& student = a.student;
  detail::check_logits(student, "student");
  const int64_t rows = student.shape[0];
  const DType compute = compute_dtype(student.dtype);
  if (a.teacher) {
    detail::check_logits(a.teacher, "teacher");
    KD_CHECK(a.teacher.shape[0] == rows, "teacher: expected ", rows, " rows, got ",
             a.teacher.shape[0]);
    KD_CHECK(compute_dtype(a.teacher.dtype) == compute,
             "teacher: float64 goes with float64 only; student is ", name(student.dtype),
             ", teacher ", name(a.teacher.dtype));
    detail::check_same_place(a.teacher, "teacher", student);
  }
  detail::check_optional_per_row(a.labels, "labels", student, DType::kInt64);
  detail::check_optional_per_row(a.mask, "mask", student, DType::kBool);
  detail::check_optional_per_row(a.student_temperature, "temperature", student, compute);
  detail::check_optional_per_row(a.teacher_temperature, "teacher_temperature", student, compute);
  check_rows(a.numbers, "numbers", kTokenNumbers, rows);
  check_dtype(a.numbers, "numbers", DType::kFloat32);
  detail::check_same_place(a.numbers, "numbers", student);
  check_rows(a.ids, "ids", 2, rows);
  check_dtype(a.ids, "ids", DType::kInt64);
  detail::check_same_place(a.ids, "ids", student);
}

inline void check_label_log_probs(const LabelLogProbsArgs& a, bool forward) {
  detail::check_logits(a.logits, "logits");
  const int64_t rows = a.logits.shape[0];
  const DType compute = compute_dtype(a.logits.dtype);
  KD_CHECK(a.labels, "labels: expected a tensor, got None");
  detail::check_optional_per_row(a.labels, "labels", a.logits, DType::kInt64);
  detail::check_optional_per_row(a.mask, "mask", a.logits, DType::kBool);
  detail::check_optional_per_row(a.temperature, "temperature", a.logits, compute);
  check_rows(a.stats, "stats", rows, 2);
  check_dtype(a.stats, "stats", compute);
  if (forward) {
    check_per_row(a.value, "value", rows);
    check_dtype(a.value, "value", compute);
    return;
  }
  check_per_row(a.upstream, "upstream", rows);
  check_dtype(a.upstream, "upstream", compute);
  detail::check_gradient(a.gradient, "gradient", a.logits, "logits");
  detail::check_optional_per_row(a.grad_temperature, "grad_temperature", a.logits, compute);
}

}  // namespace kd
