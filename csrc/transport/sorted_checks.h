// What the CPU and the CUDA entry of sorted transport check alike.
#pragma once

#include "transport/sinkhorn_checks.h"

namespace kd {

inline void check_sorted(const SortedArgs& args, int64_t workspace) {
  const View &z = args.student, &a = args.teacher;
  KD_CHECK(z.ndim == 2 && a.ndim == 2, "student, teacher: expected (N, V), got ", shape_text(z),
           " and ", shape_text(a));
  const int64_t rows = z.shape[0];
  check_rows(z, "student", rows, z.shape[1]);
  check_rows(a, "teacher", rows, a.shape[1]);
  KD_CHECK(z.shape[1] > 0 && a.shape[1] > 0, "student, teacher: expected at least one column");
  const auto floats = [](const View& v, const char* argument) {
    KD_CHECK(v.dtype <= DType::kFloat64, argument, ": expected a float dtype, got ", name(v.dtype));
  };
  floats(z, "student");
  floats(a, "teacher");
  const DType compute = z.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  KD_CHECK((a.dtype == DType::kFloat64) == (z.dtype == DType::kFloat64),
           "teacher: float64 goes with float64 only, got ", name(a.dtype), " and ", name(z.dtype));
  const auto per_row = [&](const View& v, const char* argument, DType dtype) {
    if (!v) return;
    check_per_row(v, argument, rows);
    check_dtype(v, argument, dtype);
  };
  per_row(args.mask, "mask", DType::kBool);
  per_row(args.student_scale, "student_row_scale", compute);
  per_row(args.teacher_scale, "teacher_row_scale", compute);
  per_row(args.coefficient, "coefficient", compute);
  detail::check_dense(args.student_excluded, "exclude_student", {z.shape[1]}, DType::kBool);
  detail::check_dense(args.teacher_excluded, "exclude_teacher", {a.shape[1]}, DType::kBool);
  detail::check_dense(args.value, "value", {rows}, compute);
  detail::check_dense(args.slopes, "slopes", {rows, 2}, compute);
  detail::check_dense(args.grad_student, "grad_student", {rows, z.shape[1]}, z.dtype);
  KD_CHECK(rows == 0 || args.workspace.shape[0] >= 1, "workspace: expected at least one slot");
  detail::check_dense(args.workspace, "workspace", {args.workspace.shape[0], workspace},
                      DType::kInt32);
}

}  // namespace kd
