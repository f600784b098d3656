// What must hold between the arguments of a divergence call before a kernel may touch them. Host
// only; looks at shapes, dtypes and numbers, never at data.
#pragma once

#include "common/check.h"
#include "divergence/divergence.h"

namespace kd {

inline bool is_floating(DType dtype) {
  return dtype <= DType::kFloat64;
}

inline DType compute_dtype(DType logits) {
  return logits == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Columns that count: 0, or more than there are, means all of them.
inline int64_t valid_columns(double asked, int64_t columns) {
  return asked > 0 && asked < static_cast<double>(columns) ? static_cast<int64_t>(asked) : columns;
}

namespace detail {

inline void check_same_place(const View& view, const char* argument, const View& student) {
  KD_CHECK(view.device == student.device && view.device_index == student.device_index, argument,
           ": expected a tensor on ", name(student.device), ':', student.device_index,
           " like student, got ", name(view.device), ':', view.device_index);
}

inline void check_optional_per_row(const View& view, const char* argument, const View& student,
                                   DType dtype) {
  if (!view) return;
  check_per_row(view, argument, student.shape[0]);
  check_dtype(view, argument, dtype);
  check_same_place(view, argument, student);
}

inline void check_gradient(const View& gradient, const char* argument, const View& of,
                           const char* of_name) {
  if (!gradient) return;
  KD_CHECK(of, argument, ": given without ", of_name);
  check_rows(gradient, argument, of.shape[0], of.shape[1]);
  check_dtype(gradient, argument, of.dtype);
  check_same_place(gradient, argument, of);
}

// A number on the device: () or one element.
inline void check_number(const View& view, const char* argument, DType dtype) {
  KD_CHECK(view.size() == 1, argument, ": expected one number, got shape ", shape_text(view));
  check_dtype(view, argument, dtype);
}

inline void check_spec(const DivergenceArgs& args) {
  const DivergenceSpec& spec = args.spec;
  const bool linear = spec.forward_kl != 0 || spec.reverse_kl != 0 || spec.cross_entropy != 0;
  KD_CHECK(spec.kind >= 0 && spec.kind <= static_cast<double>(Kind::kAlpha),
           "kind: expected 0 to 9, got ", spec.kind);
  KD_CHECK(spec.outer >= 0 && spec.outer <= static_cast<double>(Outer::kRenyi),
           "outer: expected 0 to 3, got ", spec.outer);
  KD_CHECK(spec.reduction >= 0 && spec.reduction <= static_cast<double>(Reduction::kSequenceMean),
           "reduction: expected 0 to 4, got ", spec.reduction);
  KD_CHECK(args.teacher || (!linear && spec.kind == 0),
           "teacher: every divergence but entropy needs it, got None");
  KD_CHECK(args.labels || spec.label_weight == 0, "labels: label_weight is ", spec.label_weight,
           " but labels is None");
  KD_CHECK(args.student_temperature || spec.student_temperature > 0,
           "student_temperature: expected a positive number, got ", spec.student_temperature);
  KD_CHECK(args.teacher_temperature || spec.teacher_temperature > 0,
           "teacher_temperature: expected a positive number, got ", spec.teacher_temperature);
}

}  // namespace detail

inline void check_divergence(const DivergenceArgs& args, bool forward) {
  const View& student = args.student;
  KD_CHECK(student.ndim == 2, "student: expected shape (N, V), got ", shape_text(student));
  KD_CHECK(is_floating(student.dtype), "student: expected a floating dtype, got ",
           name(student.dtype));
  const int64_t rows = student.shape[0];
  check_rows(student, "student", rows, student.shape[1]);
  const DType compute = compute_dtype(student.dtype);
  if (args.teacher) {
    KD_CHECK(args.teacher.ndim == 2, "teacher: expected shape (N, V), got ",
             shape_text(args.teacher));
    KD_CHECK(is_floating(args.teacher.dtype), "teacher: expected a floating dtype, got ",
             name(args.teacher.dtype));
    check_rows(args.teacher, "teacher", rows, args.teacher.shape[1]);
    detail::check_same_place(args.teacher, "teacher", student);
  }
  detail::check_optional_per_row(args.labels, "labels", student, DType::kInt64);
  detail::check_optional_per_row(args.mask, "mask", student, DType::kBool);
  detail::check_optional_per_row(args.weight, "weight", student, compute);
  detail::check_optional_per_row(args.student_temperature, "student_temperature", student, compute);
  detail::check_optional_per_row(args.teacher_temperature, "teacher_temperature", student, compute);
  detail::check_optional_per_row(args.first, "first", student, compute);
  detail::check_optional_per_row(args.second, "second", student, compute);
  if (args.num_items) detail::check_number(args.num_items, "num_items", compute);
  detail::check_spec(args);

  check_rows(args.stats, "stats", rows, kStats);
  check_dtype(args.stats, "stats", compute);
  detail::check_gradient(args.grad_student, "grad_student", student, "student");
  detail::check_gradient(args.grad_teacher, "grad_teacher", args.teacher, "teacher");
  if (args.grad_temperature) {
    check_rows(args.grad_temperature, "grad_temperature", rows, 2);
    check_dtype(args.grad_temperature, "grad_temperature", compute);
  }
  if (!forward) {
    if (args.upstream.ndim == 1 && args.upstream.shape[0] == rows) {
      check_dtype(args.upstream, "upstream", compute);
    } else {
      detail::check_number(args.upstream, "upstream", compute);
    }
    return;
  }
  if (static_cast<Reduction>(static_cast<int>(args.spec.reduction)) == Reduction::kNone) {
    check_per_row(args.value, "value", rows);
    check_dtype(args.value, "value", compute);
  } else {
    detail::check_number(args.value, "value", compute);
  }
  if (static_cast<Reduction>(static_cast<int>(args.spec.reduction)) == Reduction::kSequenceMean) {
    const int64_t batch = static_cast<int64_t>(args.spec.batch);
    KD_CHECK(rows == 0 || (batch >= 1 && rows % batch == 0), "batch: ", rows,
             " rows do not divide into ", args.spec.batch, " entries");
  }
}

// What the parts of a sum must have in common.
inline void check_sum(const DivergenceArgs* parts, int64_t count) {
  KD_CHECK(count >= 1, "parts: expected at least one, got ", count);
  const auto same = [](const View& x, const View& y) {
    bool equal = x.data == y.data && x.ndim == y.ndim && x.dtype == y.dtype;
    for (int i = 0; equal && i < x.ndim; ++i) {
      equal = x.shape[i] == y.shape[i] && x.stride[i] == y.stride[i];
    }
    return equal;
  };
  for (int64_t k = 0; count > 1 && k < count; ++k) {
    const DivergenceArgs& part = parts[k];
    KD_CHECK(same(part.student, parts->student) && same(part.grad_student, parts->grad_student),
             "student, grad_student: expected the same in every part of a sum");
    KD_CHECK(same(part.labels, parts->labels) && same(part.mask, parts->mask),
             "labels, mask: expected the same in every part of a sum");
    KD_CHECK(part.spec.student_columns == parts->spec.student_columns &&
                 part.spec.ignore_index == parts->spec.ignore_index,
             "student_columns, ignore_index: expected the same in every part of a sum");
    KD_CHECK(!part.grad_teacher && !part.grad_temperature,
             "grad_teacher, grad_temperature: a sum of several has a student gradient alone");
  }
}

}  // namespace kd
