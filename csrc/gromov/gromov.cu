// Graph features on CUDA: kernels, launchers, entry points. Also compiled for the host (simt.h).
#include "common/dispatch.h"
#include "common/launch.h"
#include "common/topk.cuh"
#include "gromov/gromov_check.h"
#include "gromov/gromov_math.h"

namespace kd {
namespace cuda {
namespace {

// ---- kernels -----------------------------------------------------------------------------------

constexpr int kThreads = 256;

template <class T, class F>
struct NodeRowsDevice {
  const T* logits;  // (N, V)
  int64_t row_stride, columns;
  const bool* mask;  // (N,) or null
  int64_t mask_stride;
  F* values;         // (N, k)
  int32_t* indices;  // (N, k)
  F* stats;          // (N, kNodeStats)
  double* nodes;     // (G, k)
  double* count;     // (G,)
  const double* upstream;
  T* grad;
  int k;
  int64_t rows_per_graph;
  GraphNodesSpec spec;

  KD_HOST_DEVICE bool selected(int64_t row) const {
    return mask == nullptr || mask[row * mask_stride];
  }
};

// One block a row: top k, moments, z and its sum.
template <class T, class F, bool kStandardize>
__global__ void __launch_bounds__(kThreads) nodes_fwd_row_kernel(NodeRowsDevice<T, F> rows) {
  KD_DYN_SHARED(unsigned char, memory);
  constexpr int W = kVecWidth<T>;
  const int k = rows.k, thread = static_cast<int>(threadIdx.x);
  const int64_t r = blockIdx.x;
  F* out = rows.values + r * k;
  int32_t* out_indices = rows.indices + r * k;
  F* stats = rows.stats + r * kNodeStats;
  if (!rows.selected(r)) {
    for (int j = thread; j < k; j += kThreads) {
      out[j] = F(0);
      out_indices[j] = -1;
    }
    if (thread < kNodeStats) stats[thread] = F(0);
    return;
  }

  F* values = reinterpret_cast<F*>(memory);
  int32_t* indices = reinterpret_cast<int32_t*>(values + topk_capacity(k, kThreads, W));
  Moments<F> own;
  block_topk<W>(rows.logits + r * rows.row_stride, rows.columns, k, values, indices,
                [&](const F(&u)[W]) {
                  if constexpr (kStandardize) own.merge(chunk_moments(u));
                });
  Moments<double> moments;
  if constexpr (kStandardize) {
    moments = block_reduce(Moments<double>(own.count, own.mean, own.squares));
  }
  const RowScale scale = row_scale(moments, kStandardize, rows.spec.temperature);
  double sum = 0;
  for (int j = thread; j < k; j += kThreads) {
    const double z = node_value(values[j], scale);
    out[j] = static_cast<F>(z);
    out_indices[j] = indices[j];
    sum += z;
  }
  sum = block_sum(sum);
  if (thread == 0) {
    stats[kNodeMean] = static_cast<F>(scale.mean);
    stats[kNodeDeviation] = static_cast<F>(scale.deviation);
    stats[kNodeScale] = static_cast<F>(scale.scale);
    stats[kNodeCount] = static_cast<F>(scale.count);
    stats[kNodeSum] = static_cast<F>(sum);
  }
}

// One block a graph and 32 ranks: threads (rank, row lane) add their rows in order, then the lanes.
constexpr int kRanks = 32;
constexpr int kRowLanes = 16;

template <class T, class F>
__global__ void __launch_bounds__(kRanks* kRowLanes)
    nodes_fwd_graph_kernel(NodeRowsDevice<T, F> rows) {
  using Tile = double[kRowLanes][kRanks];
  using Lane = double[kRowLanes];
  KD_SHARED(Tile, parts);
  KD_SHARED(Lane, counts);
  const int rank = static_cast<int>(blockIdx.y * kRanks + threadIdx.x);
  const int lane = static_cast<int>(threadIdx.y);
  const int64_t graph = blockIdx.x, first = graph * rows.rows_per_graph;
  double f = 0, selected = 0;
  for (int64_t t = lane; t < rows.rows_per_graph; t += kRowLanes) {
    const int64_t r = first + t;
    if (!rows.selected(r)) continue;
    selected += 1;
    if (rank < rows.k) {
      f += static_cast<double>(rows.values[r * rows.k + rank]) *
           static_cast<double>(rows.stats[r * kNodeStats + kNodeSum]);
    }
  }
  parts[lane][threadIdx.x] = f;
  if (threadIdx.x == 0) counts[lane] = selected;
  __syncthreads();
  if (lane != 0) return;
  f = selected = 0;
  for (int i = 0; i < kRowLanes; ++i) {
    f += parts[i][threadIdx.x];
    selected += counts[i];
  }
  if (rank < rows.k) {
    rows.nodes[graph * rows.k + rank] = f * node_share(selected, rows.k, rows.spec.average);
  }
  if (rank == 0) rows.count[graph] = selected;
}

// One block a row: the dense part of the gradient, then the kept entries over it.
template <class T, class F>
__global__ void __launch_bounds__(kThreads) nodes_bwd_row_kernel(NodeRowsDevice<T, F> rows) {
  constexpr int W = kVecWidth<T>;
  const int k = rows.k, thread = static_cast<int>(threadIdx.x);
  const int64_t r = blockIdx.x, n = rows.columns;
  const T* row = rows.logits + r * rows.row_stride;
  T* out = rows.grad + r * n;
  const bool selected = rows.selected(r);

  RowScale scale = {};
  RowGradient gradient = {};
  const double* h = nullptr;
  const F* values = rows.values + r * k;
  const int32_t* indices = rows.indices + r * k;
  if (selected) {
    const F* stats = rows.stats + r * kNodeStats;
    // 32 bits (check_grid): a 64-bit division is a function call with spills around it.
    const int64_t graph = blockIdx.x / static_cast<unsigned>(rows.rows_per_graph);
    h = rows.upstream + graph * k;
    double dot = 0, h_sum = 0, kept = 0;
    for (int j = thread; j < k; j += kThreads) {
      dot += h[j] * static_cast<double>(values[j]);
      if (is_masked_logit(to_float(row[indices[j]]))) continue;
      h_sum += h[j];
      kept += 1;
    }
    dot = block_sum(dot);
    h_sum = block_sum(h_sum);
    kept = block_sum(kept);
    scale = {static_cast<double>(stats[kNodeMean]), static_cast<double>(stats[kNodeDeviation]),
             static_cast<double>(stats[kNodeScale]), static_cast<double>(stats[kNodeCount])};
    gradient = row_gradient(scale, node_share(rows.count[graph], k, rows.spec.average),
                            static_cast<double>(stats[kNodeSum]), dot, h_sum, kept,
                            rows.spec.standardize, rows.spec.temperature);
  }
  const bool dense = selected && rows.spec.standardize;
  const RowChunks<W> chunks(n, dense ? row : nullptr, out);
  const F mean = static_cast<F>(scale.mean), slope = static_cast<F>(gradient.slope);
  const F constant = static_cast<F>(gradient.constant);
  if (dense) {
    for (int64_t c = thread; c < chunks.count(); c += kThreads) {
      F u[W];
      chunks.template load<Access::kStreaming>(row, c, F(0), u);
      KD_UNROLL
      for (int i = 0; i < W; ++i) u[i] = entry_gradient(u[i], mean, slope, constant);
      chunks.template store<true>(out, c, u);
    }
  } else {
    const F zeros[W] = {};
    for (int64_t c = thread; c < chunks.count(); c += kThreads) {
      chunks.template store<true>(out, c, zeros);
    }
  }
  if (!selected) return;
  __syncthreads();  // the kept entries are written twice, in this order
  for (int j = thread; j < k; j += kThreads) {
    const double x = to_float(row[indices[j]]);
    if (is_masked_logit(x)) continue;
    const double rest = gradient.constant + gradient.slope * (x - scale.mean);
    out[indices[j]] = cast<T>(static_cast<F>(rest + gradient.per_h * h[j] + gradient.flat));
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <class T, class F>
NodeRowsDevice<T, F> rows_of(const GraphNodesArgs& args) {
  NodeRowsDevice<T, F> rows = {};
  rows.logits = args.logits.as<const T>();
  rows.row_stride = args.logits.stride[0];
  rows.columns = args.logits.shape[1];
  if (args.mask) {
    rows.mask = args.mask.as<const bool>();
    rows.mask_stride = args.mask.stride[0];
  }
  rows.values = args.values.as<F>();
  rows.indices = args.indices.as<int32_t>();
  rows.stats = args.stats.as<F>();
  rows.count = args.count.as<double>();
  rows.k = static_cast<int>(args.values.shape[1]);
  const int64_t graphs = args.count.shape[0];
  rows.rows_per_graph = graphs == 0 ? 1 : args.logits.shape[0] / graphs;
  rows.spec = args.spec;
  return rows;
}

LaunchInfo info_for(const GraphNodesArgs& args, const char* kernel, dim3 grid, dim3 block,
                    size_t shared) {
  return {kernel,
          grid,
          block,
          shared,
          static_cast<Stream>(args.stream),
          "(N, V) = " + shape_text(args.logits) + ", k=" + std::to_string(args.values.shape[1])};
}

// The dtypes that the kernels exist for: float64 is for tests of the maths, on the host only.
template <class Fn>
void dispatch_rows(DType dtype, Fn&& fn) {
#if defined(__CUDACC__)
  dispatch_half_float(dtype, "logits", fn);
#else
  dispatch_float(dtype, "logits", fn);
#endif
}

template <class T>
void launch_nodes_fwd(const GraphNodesArgs& args) {
  using F = typename ComputeType<T>::type;
  NodeRowsDevice<T, F> rows = rows_of<T, F>(args);
  rows.nodes = args.nodes.as<double>();
  const int64_t count = args.logits.shape[0], graphs = args.count.shape[0];
  if (count > 0) {
    const size_t shared = topk_shared_bytes<F>(rows.k, kThreads, kVecWidth<T>);
    const LaunchInfo info =
        info_for(args, "nodes_fwd_row", dim3(static_cast<unsigned>(count)), dim3(kThreads), shared);
    if (args.spec.standardize) {
      launch(info, nodes_fwd_row_kernel<T, F, true>, rows);
    } else {
      launch(info, nodes_fwd_row_kernel<T, F, false>, rows);
    }
  }
  if (graphs > 0) {
    const dim3 grid(static_cast<unsigned>(graphs),
                    static_cast<unsigned>((rows.k + kRanks - 1) / kRanks));
    launch(info_for(args, "nodes_fwd_graph", grid, dim3(kRanks, kRowLanes), 0),
           nodes_fwd_graph_kernel<T, F>, rows);
  }
}

template <class T>
void launch_nodes_bwd(const GraphNodesArgs& args) {
  using F = typename ComputeType<T>::type;
  NodeRowsDevice<T, F> rows = rows_of<T, F>(args);
  rows.upstream = args.upstream.as<const double>();
  rows.grad = args.grad.as<T>();
  const int64_t count = args.logits.shape[0];
  if (count == 0) return;
  launch(info_for(args, "nodes_bwd_row", dim3(static_cast<unsigned>(count)), dim3(kThreads), 0),
         nodes_bwd_row_kernel<T, F>, rows);
}

void check_grid(const GraphNodesArgs& args) {
  KD_CHECK(args.logits.shape[0] <= 0x7fffffff, "logits: ", args.logits.shape[0],
           " rows are beyond the 2^31 - 1 of one launch");
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void graph_nodes_fwd(const GraphNodesArgs& args) {
  check_nodes(args, false);
  check_grid(args);
  const DeviceGuard guard(args.logits.device_index);
  dispatch_rows(args.logits.dtype, [&](auto type) { launch_nodes_fwd<decltype(type)>(args); });
}

void graph_nodes_bwd(const GraphNodesArgs& args) {
  check_nodes(args, true);
  check_grid(args);
  const DeviceGuard guard(args.logits.device_index);
  dispatch_rows(args.logits.dtype, [&](auto type) { launch_nodes_bwd<decltype(type)>(args); });
}

}  // namespace cuda
}  // namespace kd
