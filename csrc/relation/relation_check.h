// resolve_relation for both backends (each compiles it into its own library).
#pragma once

#include "common/check.h"
#include "relation/relation_math.h"
#include "relation/relation_rows.h"

namespace kd {

inline RelationRows resolve_relation_inline(const RelationArgs& a) {
  RelationRows out;
  const RelationSpec& spec = a.spec;
  const int kind = static_cast<int>(spec.kind);
  KD_CHECK(kind >= 0 && kind < kRelationKinds, "kind: expected 0 to ", kRelationKinds - 1, ", got ",
           kind);
  out.kind = static_cast<RelationKind>(kind);
  KD_CHECK(a.student.ndim == 3, "student: expected products (H, R, M), got ",
           shape_text(a.student));
  KD_CHECK(a.student.dtype == DType::kFloat32 || a.student.dtype == DType::kFloat64,
           "student: expected float32 or float64 products, got ", name(a.student.dtype));
  const int64_t H = a.student.shape[0], R = a.student.shape[1], M = a.student.shape[2];
  out.graphs = H, out.chunk_rows = R, out.columns = out.row_stride = M;
  out.is_double = a.student.dtype == DType::kFloat64;
  const DType compute = a.student.dtype;
  const auto cube = [&](const View& v, const char* argument) {
    KD_CHECK(v.ndim == 3 && v.shape[0] == H && v.shape[1] == R && v.shape[2] == M, argument,
             ": expected shape (", H, ", ", R, ", ", M, "), got ", shape_text(v));
    check_dtype(v, argument, compute);
  };
  const auto dense = [&](const View& v, const char* argument) {
    cube(v, argument);
    KD_CHECK(v.size() == 0 || ((M <= 1 || v.stride[2] == 1) && (R <= 1 || v.stride[1] == M) &&
                               (H <= 1 || v.stride[0] == R * M)),
             argument, ": expected a contiguous tensor");
  };
  const auto matrix = [&](const View& v, const char* argument, int64_t columns, DType dtype,
                          int64_t (&stride)[2]) {
    KD_CHECK(v.ndim == 2 && v.shape[0] == H && v.shape[1] == columns, argument,
             ": expected shape (", H, ", ", columns, "), got ", shape_text(v));
    check_dtype(v, argument, dtype);
    stride[0] = v.stride[0], stride[1] = v.stride[1];
  };
  const auto scalar = [&](const View& v, const char* argument) {
    KD_CHECK(v.size() == 1, argument, ": expected one number, got shape ", shape_text(v));
    check_dtype(v, argument, compute);
    return v.data;
  };
  dense(a.student, "student");
  out.student = a.student.data;
  out.student_scale = scalar(a.student_scale, "student_scale");
  if (relation::has_teacher(out.kind)) {
    dense(a.teacher, "teacher");
    out.teacher = a.teacher.data;
    out.teacher_scale = scalar(a.teacher_scale, "teacher_scale");
  }
  RelationSelection& select = out.selection;
  if (a.row_mask) {
    matrix(a.row_mask, "row_mask", R, DType::kBool, select.row_stride);
    select.row_mask = a.row_mask.as<const uint8_t>();
  }
  if (a.column_mask) {
    matrix(a.column_mask, "column_mask", M, DType::kBool, select.column_stride);
    select.column_mask = a.column_mask.as<const uint8_t>();
  }
  if (a.pair_mask) {
    KD_CHECK(a.pair_mask.ndim == 3 && a.pair_mask.shape[1] == R && a.pair_mask.shape[2] == M,
             "pair_mask: expected shape (P, ", R, ", ", M, "), got ", shape_text(a.pair_mask));
    check_dtype(a.pair_mask, "pair_mask", DType::kBool);
    select.pair_mask = a.pair_mask.as<const uint8_t>();
    for (int i = 0; i < 3; ++i) select.pair_stride[i] = a.pair_mask.stride[i];
    if (a.pair_index) {
      check_per_row(a.pair_index, "pair_index", H);
      check_dtype(a.pair_index, "pair_index", DType::kInt64);
      select.pair_index = a.pair_index.as<const int64_t>();
      select.index_stride = a.pair_index.stride[0];
    } else {
      KD_CHECK(a.pair_mask.shape[0] == H, "pair_mask: expected one mask a graph, got ",
               a.pair_mask.shape[0], " for ", H);
    }
  }
  if (spec.block != 0) {
    matrix(a.row_block, "row_block", R, DType::kInt64, select.row_block_stride);
    matrix(a.column_block, "column_block", M, DType::kInt64, select.column_block_stride);
    select.row_block = a.row_block.as<const int64_t>();
    select.column_block = a.column_block.as<const int64_t>();
    select.same_block = spec.block == 1;
    select.different_block = spec.block == 2;
  }
  select.causal = spec.causal != 0;
  select.exclude_diagonal = spec.exclude_diagonal != 0;
  select.first_row = static_cast<int64_t>(spec.first_row);
  select.diagonal = static_cast<int64_t>(spec.diagonal);
  out.masked =
      a.column_mask || a.pair_mask || spec.block != 0 || select.causal || select.exclude_diagonal;
  if (a.row_weight) {
    matrix(a.row_weight, "row_weight", R, compute, out.row_weight_stride);
    out.row_weight = a.row_weight.data;
  }
  if (a.pair_weight) {
    cube(a.pair_weight, "pair_weight");
    out.pair_weight = a.pair_weight.data;
    for (int i = 0; i < 3; ++i) out.pair_weight_stride[i] = a.pair_weight.stride[i];
  }
  if (a.pair_value) {
    dense(a.pair_value, "pair_value");
    out.pair_value = a.pair_value.data;
  }
  if (relation::is_distance(out.kind)) {
    const int64_t end = static_cast<int64_t>(spec.first_row) + R, longest = end > M ? end : M;
    KD_CHECK(a.norms.ndim == 3 && a.norms.shape[0] == 4 && a.norms.shape[1] == H &&
                 a.norms.shape[2] >= longest && a.norms.stride[2] == 1,
             "norms: expected shape (4, ", H, ", ", longest, " or more), got ",
             shape_text(a.norms));
    check_dtype(a.norms, "norms", compute);
    out.norms = a.norms.data;
    out.norms_stride[0] = a.norms.stride[0], out.norms_stride[1] = a.norms.stride[1];
  }
  if (out.kind == RelationKind::kDistance) {
    matrix(a.means, "means", 2, DType::kFloat64, out.means_stride);
    out.means = a.means.as<const double>();
  }
  KD_CHECK(a.rows.ndim == 3 && a.rows.shape[0] == H && a.rows.shape[1] == R &&
               a.rows.shape[2] == kRelationRow,
           "rows: expected shape (", H, ", ", R, ", ", static_cast<int>(kRelationRow), "), got ",
           shape_text(a.rows));
  check_dtype(a.rows, "rows", DType::kFloat64);
  KD_CHECK(a.rows.size() == 0 || (a.rows.stride[2] == 1 && a.rows.stride[1] == kRelationRow &&
                                  (H == 1 || a.rows.stride[0] == R * kRelationRow)),
           "rows: expected a contiguous tensor");
  out.rows = a.rows.as<double>();
  out.need_student = spec.need_student != 0;
  out.need_teacher = spec.need_teacher != 0 && out.teacher != nullptr;
  out.clamped = spec.clamped != 0;
  out.beta = spec.beta, out.margin = spec.margin, out.clamp = spec.clamp;
  out.label_mix =
      relation::is_softmax(out.kind) && relation::has_teacher(out.kind) ? spec.label_mix : 0.0;
  return out;
}

}  // namespace kd
