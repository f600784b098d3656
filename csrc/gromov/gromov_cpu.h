// The seam between gromov_host.cpp (compiled once) and gromov_cpu.cpp (compiled once per ISA).
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"
#include "gromov/gromov.h"

namespace kd {

// Rows [begin, end) of one call; all pointers are checked.
struct NodeRows {
  const void* logits;
  int64_t row_stride, columns, k;
  const uint8_t* mask;  // or null
  int64_t mask_stride;
  int32_t* indices;  // (N, k)
  void* values;      // (N, k)
  void* stats;       // (N, kNodeStats)
  // Backward.
  void* grad;  // (N, V), rows of `columns`
  const double* upstream;
  const double* count;
  int64_t rows_per_graph;
  GraphNodesSpec spec;
};

// One function a dtype, indexed by DType (float32, float16, bfloat16, float64).
struct NodeTable {
  void (*forward[4])(const NodeRows& rows, int64_t begin, int64_t end, void* scratch);
  void (*backward[4])(const NodeRows& rows, int64_t begin, int64_t end);
};

KD_DECLARE_PER_ISA(const NodeTable* node_table())

}  // namespace kd
