// Annealed potentials on CUDA: one launch a step, a warp a row of any side of any problem. Costs
// are made from the points or read; nothing of their size is written but the last weights.
#include <cmath>

#include "common/launch.h"
#include "common/reduce.cuh"
#include "transport/annealed_checks.h"
#include "transport/transport_math.h"

namespace kd::cuda {
namespace {

constexpr int kRowWarps = 8;  // rows a block
constexpr int kChunk = 4;     // coordinates of a slope in registers at a time

template <class T>
struct AnnealedData {
  AnnealedSides sides;
  int64_t batch;
  int dims;
  const T *x, *y, *log_a, *log_b;
  T* costs[4];
  T* slopes;
  bool need_x, need_y;
  // Of a step
  const T* before;  // null: the start
  T* after;
  T k, damping;
  bool average, last;
};

// Row `row` of a side: what its costs and weights are made of.
template <class T, bool kRoot>
struct SideRow {
  const AnnealedData<T>& d;
  int n, m;
  const T *rows, *columns, *log_w, *phi;
  T* cost;  // null: made from the points
  int row;

  KD_DEVICE SideRow(const AnnealedData<T>& d, int64_t problem, int side, int row) : d(d), row(row) {
    const bool x_rows = AnnealedSides::rows_are_x(side),
               x_columns = AnnealedSides::columns_are_x(side);
    n = static_cast<int>(d.sides.rows(side));
    m = static_cast<int>(d.sides.columns(side));
    rows = (x_rows ? d.x : d.y) + problem * d.dims * n;
    columns = (x_columns ? d.x : d.y) + problem * d.dims * m;
    log_w = (x_columns ? d.log_a : d.log_b) + problem * m;
    const int64_t total = d.sides.total();
    phi = d.before != nullptr ? d.before + problem * total + d.sides.column_offset(side) : nullptr;
    cost = d.costs[side] != nullptr ? d.costs[side] + (problem * n + row) * static_cast<int64_t>(m)
                                    : nullptr;
  }

  KD_DEVICE T difference(int c, int j) const {
    return rows[static_cast<int64_t>(c) * n + row] - columns[static_cast<int64_t>(c) * m + j];
  }
  KD_DEVICE T cost_at(int j) const {
    if (cost != nullptr) return cost[j];
    T square = T(0);
    for (int c = 0; c < d.dims; ++c) square = fma(difference(c, j), difference(c, j), square);
    if (!kRoot) return T(0.5) * square;
    return sqrt(square < T(kLeastSquare) ? T(kLeastSquare) : square);  // NaN stays
  }
  KD_DEVICE T exponent(int j, T of_cost) const {
    const T h = fma(d.k, phi != nullptr ? phi[j] : T(0), T(kLog2E) * log_w[j]);
    return fma(-d.k, of_cost, h);
  }
  // What a weight is multiplied by to weigh differences; zero where the distance is clamped.
  KD_DEVICE T per_difference(T of_cost) const {
    if (!kRoot) return T(1);
    return of_cost > T(kLeastDistance) ? T(1) / of_cost : T(0);
  }
  KD_DEVICE T sum(T base, int lane) const {
    T total = T(0);
    for (int j = lane; j < m; j += 32) total += exp2(exponent(j, cost_at(j)) + base);
    return warp_sum(total);
  }
  // The base that makes the largest term one.
  KD_DEVICE T safe_base(int lane) const {
    T top = T(-kInfinity);
    for (int j = lane; j < m; j += 32) top = max(exponent(j, cost_at(j)), top);
    top = warp_max(top);
    return top == T(-kInfinity) ? T(0) : -top;
  }
};

template <class T, bool kRoot>
__global__ void __launch_bounds__(32 * kRowWarps) annealed_kernel(AnnealedData<T> d) {
  const int lane = threadIdx.x % 32, side = blockIdx.y;
  const int64_t n = d.sides.rows(side), each = (n + kRowWarps - 1) / kRowWarps;
  const int64_t problem = blockIdx.x / (each > 0 ? each : 1);
  const int64_t at = (blockIdx.x - problem * each) * kRowWarps + threadIdx.x / 32;
  if (problem >= d.batch || at >= n) return;  // whole warps
  const SideRow<T, kRoot> r(d, problem, side, static_cast<int>(at));
  const int64_t total = d.sides.total(), mine = problem * total + d.sides.offset(side) + at;
  // With the potential before as base the sum is near one.
  T base = d.before != nullptr ? d.before[mine] * d.k / d.damping : r.safe_base(lane);
  T sum = r.sum(base, lane);
  if (!(sum > T(kSmallSum) && sum < T(kLargeSum))) {
    base = r.safe_base(lane);
    sum = r.sum(base, lane);
  }
  const T potential = softmin(sum, base, T(1) / d.k, d.damping);
  if (lane == 0) {
    d.after[mine] = d.average ? (d.before[mine] + potential) / T(2) : potential;
  }
  const bool wanted = AnnealedSides::rows_are_x(side) ? d.need_x : d.need_y;
  if (!d.last || !wanted) return;
  const T factor = d.damping / sum;
  if (r.cost != nullptr) {
    for (int j = lane; j < r.m; j += 32) {
      const T cost = r.cost[j];
      r.cost[j] = factor * exp2(r.exponent(j, cost) + base) * r.per_difference(cost);
    }
    return;
  }
  if (d.slopes == nullptr) return;
  for (int first = 0; first < d.dims; first += kChunk) {
    T slope[kChunk] = {};
    for (int j = lane; j < r.m; j += 32) {
      const T cost = r.cost_at(j);
      const T weight = exp2(r.exponent(j, cost) + base) * r.per_difference(cost);
      KD_UNROLL
      for (int q = 0; q < kChunk; ++q) {
        if (first + q < d.dims) slope[q] = fma(weight, r.difference(first + q, j), slope[q]);
      }
    }
    KD_UNROLL
    for (int q = 0; q < kChunk; ++q) {
      const T all = warp_sum(slope[q]);
      if (lane != 0 || first + q >= d.dims) continue;
      d.slopes[(problem * d.dims + first + q) * total + d.sides.offset(side) + at] = factor * all;
    }
  }
}

template <class T>
void run(const AnnealedArgs& args) {
  const DeviceGuard guard(args.x.device_index);
  AnnealedData<T> d{};
  d.sides = sides_of(args);
  d.batch = args.x.shape[0];
  d.dims = static_cast<int>(args.x.shape[1]);
  d.x = args.x.as<T>();
  d.y = args.y.as<T>();
  d.log_a = args.log_a.as<T>();
  d.log_b = args.log_b.as<T>();
  for (int side = 0; side < d.sides.count; ++side) {
    d.costs[side] = args.costs[side] ? args.costs[side].as<T>() : nullptr;
  }
  d.slopes = args.slopes ? args.slopes.as<T>() : nullptr;
  d.need_x = args.need_x;
  d.need_y = args.need_y;
  const int64_t longest = d.sides.n > d.sides.m ? d.sides.n : d.sides.m;
  const int64_t blocks = d.batch * ((longest + kRowWarps - 1) / kRowWarps);
  if (blocks == 0) return;
  KD_CHECK(blocks < (int64_t{1} << 31) && longest < (int64_t{1} << 31),
           "x: expected less than 2^31 rows, got ", longest, " in each of ", d.batch, " problems");
  const LaunchInfo info{"annealed",
                        dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(d.sides.count)),
                        dim3(32 * kRowWarps),
                        0,
                        static_cast<Stream>(args.stream),
                        "x " + shape_text(args.x) + ", y " + shape_text(args.y)};
  const size_t steps = args.epsilons.size() + 2;
  T* buffers[2] = {args.potentials.as<T>(), args.workspace.as<T>()};
  for (size_t step = 0; step < steps; ++step) {
    const bool start = step == 0;
    d.last = step == steps - 1;
    d.average = !start && !d.last;
    d.after = buffers[(steps - 1 - step) % 2];  // the last step writes the output
    d.before = start ? nullptr : buffers[(steps - step) % 2];
    const double epsilon = args.epsilons[start ? 0 : d.last ? steps - 3 : step - 1];
    d.k = static_cast<T>(kLog2E / epsilon);
    d.damping = static_cast<T>(args.rho > 0 ? 1 / (1 + epsilon / args.rho) : 1);
    args.root ? launch(info, annealed_kernel<T, true>, d)
              : launch(info, annealed_kernel<T, false>, d);
  }
}

}  // namespace

void annealed(const AnnealedArgs& args) {
  check_annealed(args);
  if (args.x.dtype == DType::kFloat64) return run<double>(args);
  run<float>(args);
}

}  // namespace kd::cuda
