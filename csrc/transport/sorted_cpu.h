// What sorted_cpu.cpp (compiled once per ISA) offers to sorted_host.cpp: one row pair.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/view.h"

namespace kd {

// One side of a row pair.
struct SortedSide {
  const void* row;
  DType dtype;
  int64_t columns;
  const uint8_t* excluded;  // (columns) or null
  double scale;
  double temperature;
};

struct SortedRow {
  SortedSide student, teacher;
  double coefficient;
  void* gradient;  // (student.columns) of the student's dtype, or null
  int32_t* scratch;
  // Out, in the compute dtype's precision.
  double value, student_slope, teacher_slope;
};

// int32 elements of scratch for a row pair.
constexpr int64_t kSortedBins = 65536;
inline int64_t sorted_scratch(int64_t student_columns, int64_t teacher_columns) {
  const int64_t longer = student_columns > teacher_columns ? student_columns : teacher_columns;
  // Radix: two rows as floats, two of keys, one to sort into, two of run boundaries; 8 bytes each
  // at most. Histogram: nine tables.
  return 2 * 7 * (longer + 16) + 9 * kSortedBins;
}

struct SortedTable {
  void (*half)(SortedRow&);    // both sides float16 or bfloat16
  void (*single)(SortedRow&);  // neither side float64
  void (*dbl)(SortedRow&);     // both float64
};

KD_DECLARE_PER_ISA(const SortedTable* sorted_table())

}  // namespace kd
