// What relation_host.cpp and relation.cu hand to their row loops: everything checked and resolved,
// plain numbers and pointers. Strides count elements.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/macros.h"
#include "relation/relation.h"

namespace kd {

// The selected columns of a row: the conjunction of all that was given.
struct RelationSelection {
  const uint8_t* row_mask = nullptr;
  const uint8_t* column_mask = nullptr;
  const uint8_t* pair_mask = nullptr;
  const int64_t* pair_index = nullptr;
  const int64_t* row_block = nullptr;
  const int64_t* column_block = nullptr;
  int64_t row_stride[2] = {}, column_stride[2] = {}, pair_stride[3] = {}, index_stride = 0;
  int64_t row_block_stride[2] = {}, column_block_stride[2] = {};
  int64_t first_row = 0, diagonal = 0;
  bool causal = false, exclude_diagonal = false, same_block = false, different_block = false;

  KD_HOST_DEVICE bool row(int64_t h, int64_t r) const {
    return row_mask == nullptr || row_mask[h * row_stride[0] + r * row_stride[1]] != 0;
  }
  // Column j of row r of this chunk, in graph h; the row itself is selected.
  KD_HOST_DEVICE bool entry(int64_t h, int64_t r, int64_t j) const {
    const int64_t own = first_row + r + diagonal;
    bool on =
        column_mask == nullptr || column_mask[h * column_stride[0] + j * column_stride[1]] != 0;
    if (pair_mask != nullptr) {
      const int64_t p = pair_index == nullptr ? h : pair_index[h * index_stride];
      on = on && pair_mask[p * pair_stride[0] + r * pair_stride[1] + j * pair_stride[2]] != 0;
    }
    if (causal) on = on && j <= own;
    if (exclude_diagonal) on = on && j != own;
    if (row_block != nullptr) {
      const bool same = row_block[h * row_block_stride[0] + r * row_block_stride[1]] ==
                        column_block[h * column_block_stride[0] + j * column_block_stride[1]];
      on = on && (same_block ? same : !same);
    }
    return on;
  }
};

struct RelationRows {
  void* student = nullptr;  // (H, R, M) contiguous
  void* teacher = nullptr;
  const void* student_scale = nullptr;
  const void* teacher_scale = nullptr;
  const void* row_weight = nullptr;
  const void* pair_weight = nullptr;
  void* pair_value = nullptr;
  const void* norms = nullptr;
  const double* means = nullptr;
  double* rows = nullptr;
  int64_t row_weight_stride[2] = {}, pair_weight_stride[3] = {};
  int64_t norms_stride[2] = {}, means_stride[2] = {};
  int64_t graphs = 0, chunk_rows = 0, columns = 0;
  int64_t row_stride = 0;  // between rows of products; columns but in blocks of the CPU's walk
  bool is_double = false;
  bool masked = false;  // anything but whole rows is selected
  RelationKind kind = RelationKind::kSoftmaxKl;
  bool need_student = false, need_teacher = false, clamped = false;
  double beta = 1, margin = 0, clamp = 0, label_mix = 0;
  RelationSelection selection;
};

// Rows [begin, end) of the H * R rows of the chunk, which are independent of each other.
KD_DECLARE_PER_ISA(void relation_row_range(const RelationRows& call, int64_t begin, int64_t end))

}  // namespace kd
