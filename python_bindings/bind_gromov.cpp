// graph_nodes_fwd / graph_nodes_bwd, and the assignment of the third lower bound.
#include "bind.h"
#include "common/check.h"
#include "common/parallel.h"
#include "gromov/assignment.h"
#include "gromov/gromov.h"
#include "gromov/gromov_check.h"
#include "view_caster.h"

namespace kd::binding {
namespace {

// The simulator build runs the CUDA sources on CPU memory.
#if defined(KDK_BUILD_SIMT)
constexpr bool kSimulated = true;
#else
constexpr bool kSimulated = false;
#endif

void run(const GraphNodesArgs& args, bool forward) {
  py::gil_scoped_release release;
  if (kSimulated || args.logits.device == Device::kCuda) {
#if defined(KDK_BUILD_SIMT) || defined(KDK_WITH_CUDA)
    return forward ? cuda::graph_nodes_fwd(args) : cuda::graph_nodes_bwd(args);
#else
    detail::fail("logits: this build has no CUDA kernels");
#endif
  }
#if !defined(KDK_BUILD_SIMT)
  return forward ? cpu::graph_nodes_fwd(args) : cpu::graph_nodes_bwd(args);
#endif
}

GraphNodesArgs arguments(const py::object& logits, View mask, View values, View indices, View stats,
                         View count, bool standardize, bool average, double temperature) {
  GraphNodesArgs args;
  args.logits = view_from(logits.ptr());
  args.stream = current_stream(logits.ptr(), args.logits);
  args.mask = mask;
  args.values = values;
  args.indices = indices;
  args.stats = stats;
  args.count = count;
  args.spec = {standardize, average, temperature};
  return args;
}

void assignment(View cost, View columns) {
  KD_CHECK(cost.ndim == 3 && cost.shape[1] == cost.shape[2] && cost.device == Device::kCpu,
           "cost: expected a CPU tensor (B, n, n), got ", shape_text(cost));
  check_dtype(cost, "cost", DType::kFloat64);
  const int64_t batch = cost.shape[0], n = cost.shape[1];
  check_dense(cost, "cost");
  check_output(columns, "columns", DType::kInt64, batch, n);
  py::gil_scoped_release release;
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      // A NaN cost leaves the identity: the value that is read off it is NaN then.
      assign(cost.as<const double>() + b * n * n, n, columns.as<int64_t>() + b * n);
    }
  });
}

}  // namespace

void bind_gromov(py::module_& m) {
  m.attr("NODE_STATS") = static_cast<int>(kNodeStats);
  m.def(
      "graph_nodes_fwd",
      [](py::object logits, View mask, View values, View indices, View stats, View nodes,
         View count, bool standardize, bool average, double temperature) {
        GraphNodesArgs args = arguments(logits, mask, values, indices, stats, count, standardize,
                                        average, temperature);
        args.nodes = nodes;
        run(args, true);
      },
      "Top-k logits and node features of the graph on logits (csrc/gromov/gromov.h).");
  m.def(
      "graph_nodes_bwd",
      [](py::object logits, View mask, View values, View indices, View stats, View count,
         View upstream, View grad, bool standardize, bool average, double temperature) {
        GraphNodesArgs args = arguments(logits, mask, values, indices, stats, count, standardize,
                                        average, temperature);
        args.upstream = upstream;
        args.grad = grad;
        run(args, false);
      },
      "Gradient of the logits from the forward's results and the features' gradient.");
  m.def("assignment", &assignment,
        "Columns (B, n) int64 of the cheapest assignments of costs (B, n, n) float64.");
}

}  // namespace kd::binding
