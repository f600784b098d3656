// Argument checks of the feature kernels, for both backends.
#pragma once

#include "common/check.h"
#include "relation/feature_rows.h"

namespace kd {

inline DType feature_compute(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline void check_feature_dtype(const View& view, const char* argument) {
  KD_CHECK(view.dtype == DType::kFloat32 || view.dtype == DType::kFloat16 ||
               view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat64,
           argument, ": expected float32, float16, bfloat16 or float64, got ", name(view.dtype));
}

// A contiguous output or upstream (N, d).
inline void check_feature_dense(const View& view, const char* argument, int64_t rows,
                                int64_t columns, DType dtype) {
  check_rows(view, argument, rows, columns);
  check_dtype(view, argument, dtype);
  KD_CHECK(rows <= 1 || view.stride[0] == columns, argument, ": expected a contiguous tensor");
}

inline FeatureRows resolve_feature(const FeatureArgs& a) {
  FeatureRows out;
  KD_CHECK(a.kind >= 0 && a.kind < kFeatureKinds, "kind: expected 0 to ", kFeatureKinds - 1,
           ", got ", a.kind);
  KD_CHECK(a.normalize >= 0 && a.normalize < kFeatureNormalizes, "normalize: expected 0 to ",
           kFeatureNormalizes - 1, ", got ", a.normalize);
  out.kind = static_cast<FeatureKind>(a.kind);
  out.normalize = static_cast<FeatureNormalize>(a.normalize);
  out.beta = a.beta, out.margin = a.margin;
  KD_CHECK(a.student.ndim == 2, "student: expected shape (N, d), got ", shape_text(a.student));
  check_feature_dtype(a.student, "student");
  const int64_t n = a.student.shape[0], d = a.student.shape[1];
  const DType compute = feature_compute(a.student.dtype);
  out.count = n, out.width = d, out.dtype = a.student.dtype;
  check_rows(a.student, "student", n, d);
  check_rows(a.teacher, "teacher", n, d);
  check_dtype(a.teacher, "teacher", a.student.dtype);
  out.student = a.student.data, out.student_stride = a.student.stride[0];
  out.teacher = a.teacher.data, out.teacher_stride = a.teacher.stride[0];
  if (a.mask) {
    check_per_row(a.mask, "mask", n);
    check_dtype(a.mask, "mask", DType::kBool);
    out.mask = a.mask.as<const uint8_t>(), out.mask_stride = a.mask.stride[0];
  }
  const bool elementwise = out.kind <= FeatureKind::kHuber;
  if (a.weight) {
    KD_CHECK(elementwise, "weight: for the element kinds");
    KD_CHECK(a.weight.ndim == 2 && a.weight.shape[0] == n && a.weight.shape[1] == d,
             "weight: expected shape (", n, ", ", d, "), got ", shape_text(a.weight));
    check_dtype(a.weight, "weight", compute);
    out.weight = a.weight.data;
    out.weight_stride[0] = a.weight.stride[0], out.weight_stride[1] = a.weight.stride[1];
  }
  if (out.normalize == FeatureNormalize::kStandardize) {
    KD_CHECK(a.columns.ndim == 3 && a.columns.shape[0] == 4 && a.columns.shape[2] == d,
             "columns: expected shape (4, G, ", d, "), got ", shape_text(a.columns));
    check_dtype(a.columns, "columns", compute);
    const int64_t groups = a.columns.shape[1];
    KD_CHECK(n == 0 || (groups > 0 && n % groups == 0), "columns: ", groups,
             " groups do not divide ", n, " rows");
    out.columns = a.columns.data;
    out.group_rows = n > 0 ? n / groups : 1, out.column_plane = groups * d;
  }
  const auto dense = [&](const View& view, const char* argument, DType dtype) -> void* {
    if (!view) return nullptr;
    check_feature_dense(view, argument, n, d, dtype);
    return view.data;
  };
  if (a.rows) {
    check_per_row(a.rows, "rows", n);
    check_dtype(a.rows, "rows", DType::kFloat64);
    KD_CHECK(n <= 1 || a.rows.stride[0] == 1, "rows: expected a contiguous tensor");
    out.rows = a.rows.as<double>();
  }
  if (a.row_upstream) {
    check_per_row(a.row_upstream, "row_upstream", n);
    check_dtype(a.row_upstream, "row_upstream", DType::kFloat64);
    out.row_upstream = a.row_upstream.as<const double>();
    out.row_upstream_stride = a.row_upstream.stride[0];
  }
  KD_CHECK(elementwise || (!a.elements && !a.element_upstream && !a.weight_gradient),
           "elements: for the element kinds");
  out.elements = dense(a.elements, "elements", compute);
  out.element_upstream = dense(a.element_upstream, "element_upstream", compute);
  out.weight_gradient = dense(a.weight_gradient, "weight_gradient", compute);
  const DType gradient =
      out.normalize == FeatureNormalize::kStandardize ? compute : a.student.dtype;
  out.student_gradient = dense(a.student_gradient, "student_gradient", gradient);
  out.teacher_gradient = dense(a.teacher_gradient, "teacher_gradient", gradient);
  KD_CHECK(!(a.student_gradient || a.teacher_gradient || a.weight_gradient) || a.row_upstream ||
               a.element_upstream,
           "row_upstream: gradients need an upstream");
  return out;
}

inline FeatureColumns resolve_feature_columns(const FeatureColumnsArgs& a) {
  FeatureColumns out;
  KD_CHECK(a.tokens.ndim == 3, "tokens: expected shape (G, L, d), got ", shape_text(a.tokens));
  check_feature_dtype(a.tokens, "tokens");
  const int64_t groups = a.tokens.shape[0], rows = a.tokens.shape[1], width = a.tokens.shape[2];
  const DType compute = feature_compute(a.tokens.dtype);
  out.groups = groups, out.rows = rows, out.width = width, out.dtype = a.tokens.dtype;
  const auto cube = [&](const View& v, const char* argument, int64_t x, int64_t y, DType dtype) {
    KD_CHECK(v.ndim == 3 && v.shape[0] == x && v.shape[1] == y && v.shape[2] == width, argument,
             ": expected shape (", x, ", ", y, ", ", width, "), got ", shape_text(v));
    check_dtype(v, argument, dtype);
    KD_CHECK(
        v.size() == 0 || ((width == 1 || v.stride[2] == 1) && (y == 1 || v.stride[1] == width) &&
                          (x == 1 || v.stride[0] == y * width)),
        argument, ": expected a contiguous tensor");
    return v.data;
  };
  out.tokens = cube(a.tokens, "tokens", groups, rows, a.tokens.dtype);
  out.columns = cube(a.columns, "columns", 2, groups, compute);
  if (a.mask) {
    KD_CHECK(a.mask.ndim == 2 && a.mask.shape[0] == groups && a.mask.shape[1] == rows,
             "mask: expected shape (", groups, ", ", rows, "), got ", shape_text(a.mask));
    check_dtype(a.mask, "mask", DType::kBool);
    out.mask = a.mask.as<const uint8_t>();
    out.mask_stride[0] = a.mask.stride[0], out.mask_stride[1] = a.mask.stride[1];
  }
  if (a.gradient) {
    out.gradient = cube(a.gradient, "gradient", groups, rows, compute);
    out.out = cube(a.out, "out", groups, rows, a.tokens.dtype);
  }
  return out;
}

}  // namespace kd
