// CPU entry points of the graph features: checks, threads, and the sum over positions.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "gromov/gromov_check.h"
#include "gromov/gromov_cpu.h"
#include "gromov/gromov_math.h"

namespace kd {
namespace cpu {

namespace {

NodeRows rows_of(const GraphNodesArgs& args) {
  NodeRows rows = {};
  rows.logits = args.logits.data;
  rows.row_stride = args.logits.stride[0];
  rows.columns = args.logits.shape[1];
  rows.k = args.values.shape[1];
  if (args.mask) {
    rows.mask = args.mask.as<const uint8_t>();
    rows.mask_stride = args.mask.stride[0];
  }
  rows.indices = args.indices.as<int32_t>();
  rows.values = args.values.data;
  rows.stats = args.stats.data;
  rows.count = args.count.as<const double>();
  const int64_t graphs = args.count.shape[0];
  rows.rows_per_graph = graphs == 0 ? 1 : args.logits.shape[0] / graphs;
  rows.spec = args.spec;
  return rows;
}

int dtype_slot(DType dtype) {
  int slot = 0;
  dispatch_float(dtype, "logits", [&](auto) { slot = static_cast<int>(dtype); });
  return slot;
}

// f of one graph: rows in order, so the bits do not depend on threads.
template <class S>
void sum_graph(const NodeRows& rows, int64_t graph, double* nodes, double* count) {
  const int64_t k = rows.k;
  for (int64_t j = 0; j < k; ++j) nodes[j] = 0;
  double selected = 0;
  for (int64_t r = graph * rows.rows_per_graph; r < (graph + 1) * rows.rows_per_graph; ++r) {
    if (rows.mask != nullptr && !rows.mask[r * rows.mask_stride]) continue;
    selected += 1;
    const S* values = static_cast<const S*>(rows.values) + r * k;
    const double sum = static_cast<const S*>(rows.stats)[r * kNodeStats + kNodeSum];
    for (int64_t j = 0; j < k; ++j) nodes[j] += values[j] * sum;
  }
  const double share = node_share(selected, k, rows.spec.average);
  for (int64_t j = 0; j < k; ++j) nodes[j] *= share;
  *count = selected;
}

}  // namespace

void graph_nodes_fwd(const GraphNodesArgs& args) {
  check_nodes(args, false);
  const NodeRows rows = rows_of(args);
  const int slot = dtype_slot(args.logits.dtype);
  const auto forward = KD_PICK_ISA(node_table)()->forward[slot];
  const bool wide = args.logits.dtype == DType::kFloat64;
  // Kept and waiting entries of one row: value and index.
  const size_t bytes = static_cast<size_t>(2 * rows.k + 16) * ((wide ? 8 : 4) + sizeof(int32_t));
  parallel_for(0, args.logits.shape[0], 1,
               [&](int64_t begin, int64_t end) { forward(rows, begin, end, scratch(bytes)); });
  double* nodes = args.nodes.as<double>();
  double* count = args.count.as<double>();
  // k additions a row: a thread is worth its start from some 2^16 on.
  const int64_t grain = (int64_t{1} << 16) / (rows.k * rows.rows_per_graph + 1) + 1;
  parallel_for(0, args.count.shape[0], grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      if (wide) {
        sum_graph<double>(rows, g, nodes + g * rows.k, count + g);
      } else {
        sum_graph<float>(rows, g, nodes + g * rows.k, count + g);
      }
    }
  });
}

void graph_nodes_bwd(const GraphNodesArgs& args) {
  check_nodes(args, true);
  NodeRows rows = rows_of(args);
  rows.grad = args.grad.data;
  rows.upstream = args.upstream.as<const double>();
  const int slot = dtype_slot(args.logits.dtype);
  const auto backward = KD_PICK_ISA(node_table)()->backward[slot];
  const int64_t element = slot == 0 ? 4 : args.logits.dtype == DType::kFloat64 ? 8 : 2;
  advise_huge(args.grad.data, static_cast<size_t>(args.grad.size() * element));
  parallel_for(0, args.logits.shape[0], 1,
               [&](int64_t begin, int64_t end) { backward(rows, begin, end); });
}

}  // namespace cpu
}  // namespace kd
