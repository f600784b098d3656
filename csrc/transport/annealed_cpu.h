// What annealed_cpu.cpp (compiled once per ISA) offers to annealed_host.cpp: one update of some
// rows of a side. T is float or double.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace kd {

template <class T>
struct SoftminSweep {
  const T* rows;     // (dims, row_count) points of the rows
  const T* columns;  // (dims, column_count)
  int64_t dims, row_count, column_count;
  bool root;   // the cost is the distance, otherwise half its square
  T* cost;     // (row_count, column_count), or null: made from the points
  const T* h;  // (column_count) log2 of the columns' weights at this epsilon
  T k;         // log2(e) / epsilon
  T damping;
  const T* before;  // (row_count) the potential before, or null
  T* after;         // (row_count)
  bool average;     // with the potential before
  T* slopes;        // (dims, slope_stride), or null: derivatives by the rows' points
  int64_t slope_stride;
  bool weights;  // the softmin's weights take the cost's place
};

template <class T>
struct AnnealedTable {
  void (*softmin)(const SoftminSweep<T>&, int64_t begin, int64_t end);
};

KD_DECLARE_PER_ISA(const AnnealedTable<float>* annealed_float();
                   const AnnealedTable<double>* annealed_double())

}  // namespace kd
