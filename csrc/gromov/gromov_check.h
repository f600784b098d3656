// Argument checks shared by the CPU and the CUDA entry points.
#pragma once

#include <limits>

#include "common/check.h"
#include "common/topk.h"
#include "gromov/gromov.h"

namespace kd {

inline void check_dense(const View& view, const char* argument) {
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    KD_CHECK(view.shape[i] <= 1 || view.stride[i] == expected, argument,
             ": must be contiguous, got stride ", view.stride[i], " in dimension ", i);
    expected *= view.shape[i];
  }
}

inline void check_output(const View& view, const char* argument, DType dtype, int64_t rows,
                         int64_t columns) {
  check_rows(view, argument, rows, columns);
  check_dtype(view, argument, dtype);
  check_dense(view, argument);
}

inline void check_nodes(const GraphNodesArgs& args, bool backward) {
  const View& x = args.logits;
  KD_CHECK(x.ndim == 2, "logits: expected shape (N, V), got ", shape_text(x));
  const int64_t rows = x.shape[0], columns = x.shape[1];
  check_rows(x, "logits", rows, columns);
  KD_CHECK(columns <= std::numeric_limits<int32_t>::max(), "logits: V = ", columns,
           " is beyond 2^31 - 1");
  KD_CHECK(args.values.ndim == 2, "values: expected shape (N, k), got ", shape_text(args.values));
  const int64_t k = args.values.shape[1];
  KD_CHECK(k >= 1 && k <= columns && k <= kMaxTopK, "k: expected 1 to ",
           columns < kMaxTopK ? columns : kMaxTopK, ", got ", k);
  const DType compute = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  check_output(args.values, "values", compute, rows, k);
  check_output(args.indices, "indices", DType::kInt32, rows, k);
  check_output(args.stats, "stats", compute, rows, kNodeStats);
  KD_CHECK(args.count.ndim == 1, "count: expected shape (G,), got ", shape_text(args.count));
  const int64_t graphs = args.count.shape[0];
  KD_CHECK(graphs >= 1 ? rows % graphs == 0 : rows == 0, "count: ", rows, " rows do not make ",
           graphs, " graphs");
  check_dtype(args.count, "count", DType::kFloat64);
  check_dense(args.count, "count");
  if (backward) {
    check_output(args.upstream, "upstream", DType::kFloat64, graphs, k);
    check_output(args.grad, "grad", x.dtype, rows, columns);
  } else {
    check_output(args.nodes, "nodes", DType::kFloat64, graphs, k);
  }
  if (args.mask) {
    check_per_row(args.mask, "mask", rows);
    check_dtype(args.mask, "mask", DType::kBool);
  }
  KD_CHECK(args.spec.temperature > 0, "temperature: expected a number > 0, got ",
           args.spec.temperature);
}

}  // namespace kd
