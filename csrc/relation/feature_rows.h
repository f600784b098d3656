// What feature_host.cpp and feature.cu hand to their loops: everything checked and resolved.
// Strides count elements; the last dimension of every matrix is contiguous but for the weight's.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "relation/feature.h"

namespace kd {

struct FeatureRows {
  const void *student = nullptr, *teacher = nullptr;
  const uint8_t* mask = nullptr;
  const void *weight = nullptr, *columns = nullptr, *element_upstream = nullptr;
  const double* row_upstream = nullptr;
  double* rows = nullptr;
  void *elements = nullptr, *weight_gradient = nullptr;
  void *student_gradient = nullptr, *teacher_gradient = nullptr;
  int64_t student_stride = 0, teacher_stride = 0, mask_stride = 0, row_upstream_stride = 0;
  int64_t weight_stride[2] = {};
  int64_t count = 0, width = 0;              // N, d
  int64_t group_rows = 1, column_plane = 0;  // rows a group; G d
  DType dtype = DType::kFloat32;
  FeatureKind kind = FeatureKind::kMse;
  FeatureNormalize normalize = FeatureNormalize::kNone;
  double beta = 1, margin = 0;
};

struct FeatureColumns {
  const void *tokens = nullptr, *gradient = nullptr;
  const uint8_t* mask = nullptr;
  void *columns = nullptr, *out = nullptr;
  int64_t mask_stride[2] = {};
  int64_t groups = 0, rows = 0, width = 0;  // G, L, d; all contiguous
  DType dtype = DType::kFloat32;
};

// Columns a piece of feature_column_range takes at a time: few enough that a group stays in cache.
constexpr int64_t kFeatureStrip = 64;

// Rows [begin, end), which are independent of each other.
KD_DECLARE_PER_ISA(void feature_row_range(const FeatureRows& call, int64_t begin, int64_t end))
// Strips [begin, end) of the groups' ceil(d / kFeatureStrip) strips of columns.
KD_DECLARE_PER_ISA(void feature_column_range(const FeatureColumns& call, int64_t begin,
                                             int64_t end))

}  // namespace kd
