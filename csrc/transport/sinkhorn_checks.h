// What the CPU and the CUDA entry check alike before anything is read or launched.
#pragma once

#include "common/check.h"
#include "transport/transport.h"

namespace kd {

namespace detail {

inline void check_dense(const View& view, const char* argument,
                        std::initializer_list<int64_t> shape, DType dtype) {
  if (!view) return;
  bool same = view.ndim == static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int i = view.ndim - 1; same && i >= 0; --i) {
    same = view.shape[i] == shape.begin()[i];
    if (same && view.shape[i] > 1) {
      KD_CHECK(view.stride[i] == stride, argument, ": expected a contiguous tensor");
    }
    stride *= view.shape[i];
  }
  KD_CHECK(same, argument, ": got shape ", shape_text(view), ", expected ", [&] {
    std::ostringstream text;
    for (int64_t n : shape) text << n << ' ';
    return text.str();
  }());
  check_dtype(view, argument, dtype);
}

inline void check_marginal(const View& view, const char* argument, int64_t batch, int64_t size,
                           DType dtype) {
  if (!view) return;
  check_rows(view, argument, batch, size);
  check_dtype(view, argument, dtype);
}

}  // namespace detail

inline void check_sinkhorn(const SinkhornArgs& args, int64_t workspace) {
  const View& cost = args.cost;
  KD_CHECK(cost.ndim == 3, "cost: expected shape (B, N, M), got ", shape_text(cost));
  KD_CHECK(cost.dtype == DType::kFloat32 || cost.dtype == DType::kFloat64,
           "cost: expected float32 or float64, got ", name(cost.dtype));
  const int64_t batch = cost.shape[0], n = cost.shape[1], m = cost.shape[2];
  KD_CHECK(m <= 1 || cost.stride[2] == 1, "cost: the last dimension must be contiguous");
  const int64_t kept = args.f.ndim == 3 ? args.f.shape[0] : 0;
  KD_CHECK(kept == 1 || kept == static_cast<int64_t>(args.spec.iterations),
           "f: expected 1 or all iterations to be kept, got ", kept);
  KD_CHECK(args.spec.epsilon > 0, "epsilon: expected a number > 0, got ", args.spec.epsilon);
  KD_CHECK(args.spec.iterations >= 1, "iterations: expected at least 1, got ",
           args.spec.iterations);
  const DType dtype = cost.dtype;
  detail::check_marginal(args.a, "a", batch, n, dtype);
  detail::check_marginal(args.b, "b", batch, m, dtype);
  if (args.student_lengths) check_per_row(args.student_lengths, "student_lengths", batch);
  if (args.teacher_lengths) check_per_row(args.teacher_lengths, "teacher_lengths", batch);
  detail::check_dense(args.f, "f", {kept, batch, n}, dtype);
  detail::check_dense(args.g, "g", {kept, batch, m}, dtype);
  detail::check_dense(args.done, "done", {batch}, DType::kInt64);
  detail::check_dense(args.linear, "linear", {batch}, dtype);
  detail::check_dense(args.rows, "rows", {batch, n}, dtype);
  detail::check_dense(args.columns, "columns", {batch, m}, dtype);
  detail::check_dense(args.plan, "plan", {batch, n, m}, dtype);
  detail::check_dense(args.grad_cost, "grad_cost", {batch, n, m}, dtype);
  detail::check_dense(args.grad_a, "grad_a", {batch, n}, dtype);
  detail::check_dense(args.grad_b, "grad_b", {batch, m}, dtype);
  detail::check_dense(args.linear_bar, "linear_bar", {batch}, dtype);
  detail::check_dense(args.rows_bar, "rows_bar", {batch, n}, dtype);
  detail::check_dense(args.columns_bar, "columns_bar", {batch, m}, dtype);
  detail::check_dense(args.plan_bar, "plan_bar", {batch, n, m}, dtype);
  detail::check_dense(args.f_bar, "f_bar", {batch, n}, dtype);
  detail::check_dense(args.g_bar, "g_bar", {batch, m}, dtype);
  detail::check_dense(args.workspace, "workspace", {batch, workspace}, dtype);
}

}  // namespace kd
