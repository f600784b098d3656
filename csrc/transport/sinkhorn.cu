// Sinkhorn on CUDA. Small problems: one block runs all iterations of one problem, one launch for
// the batch. Large ones: a grid for each half-iteration, tiles of rows, then columns.
#include <algorithm>
#include <cmath>

#include "common/launch.h"
#include "transport/sinkhorn_backward.cuh"
#include "transport/sinkhorn_checks.h"
#include "transport/sinkhorn_device.cuh"

namespace kd::cuda {
namespace {

// ---- kernels: one block a problem ---------------------------------------------------------------

template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_fwd_block_kernel(SinkhornData<T> data) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.x);
  int done = 0;
  if (!p.empty()) {
    for (int j = threadIdx.x; j < p.m; j += blockDim.x) start_column(p, j);
    __syncthreads();
    for (int t = 0; t < data.iterations; ++t) {
      const Sweep<T> s = sweep_of(p, t);
      block_rows<kCols>(p, 0, p.n, slices, p.partial, [&](int i, int lane, T* slice) {
        forward_row<kCols>(p, s, i, lane, slice);
      });
      T error = T(0);
      for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
        error += update_column(p, s.f_out, s.has_v, 1, j, p.g_at(t));
      }
      done = t + 1;
      error = block_sum(error);  // also the barrier before the next sweep reads log_v
      if (data.tolerance > T(0) && s.has_v && error <= data.tolerance) break;
    }
    const Sweep<T> last = last_sweep_of(p, done);
    block_rows<kCols>(p, 0, p.n, slices, p.partial, [&](int i, int lane, T* slice) {
      forward_row<kCols>(p, last, i, lane, slice);
    });
  }
  finish_forward(p, done, 1);
}

template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_bwd_block_kernel(SinkhornData<T> data) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.x);
  const int done = static_cast<int>(data.done[blockIdx.x]);
  const bool live = !p.empty() && done > 0;
  clear_backward(p, live);
  if (!live) return;
  __syncthreads();
  const auto sweep = [&](const Step<T>& s) {
    block_rows<kCols, 2>(
        p, 0, p.n, slices, p.partial,
        [&](int i, int lane, T* slice) { backward_row<kCols>(p, s, i, lane, slice); }, p.sums);
  };
  const auto columns = [&](const T* g, const T* g_before, bool first, bool fixed) {
    T size = T(0);
    for (int j = threadIdx.x; j < p.m; j += blockDim.x) {
      size += adjoint_column(p, g, g_before, first, fixed, 1, j);
    }
    return block_sum(size);  // and a barrier
  };
  sweep(start_step(p, done));
  const auto mode = static_cast<GradientMode>(data.mode);
  if (mode == GradientMode::kEnvelope) return;
  if (mode == GradientMode::kImplicit) {
    const int limit = data.iterations < 100 ? 100 : data.iterations;
    const T precision = sizeof(T) == 8 ? T(1e-14) : T(1e-8);
    T initial = T(0);
    for (int round = 0; round < limit; ++round) {
      const T size = columns(p.g_at(done - 1), nullptr, round == 0, true);
      if (round == 0) initial = size;
      sweep(round_of(p, done, round));
      if (round > 0 && !(size > precision * initial)) break;
    }
    sweep(apply_step(p, done));
    return;
  }
  for (int t = done - 1; t >= 0; --t) {
    columns(p.g_at(t), t > 0 ? p.g_at(t - 1) : nullptr, t == done - 1, false);
    sweep(step_of(p, done, t));
  }
}

// ---- kernels: a grid a half-iteration
// ------------------------------------------------------------

// Whether the problem stopped before iteration t: the error of t - 1 lies in slot (t - 1) % 2. A
// stopped problem copies its error from slot to slot.
template <class T>
KD_DEVICE T error_before(const DeviceProblem<T>& p, int t) {
  const int blocks = column_blocks(p.data.columns);
  T error = T(0);
  for (int k = 0; k < blocks; ++k) error += p.errors[((t + 1) % 2) * blocks + k];
  return error;
}
template <class T>
KD_DEVICE bool stopped(const DeviceProblem<T>& p, int t) {
  return p.data.tolerance > T(0) && t > 0 && error_before(p, t) <= p.data.tolerance;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_start_kernel(SinkhornData<T> data) {
  const DeviceProblem<T> p(data, blockIdx.y);
  if (p.empty()) return;
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (j < p.m) start_column(p, j);
}

// t = iterations: the last sweep.
template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1)
    sinkhorn_fwd_rows_kernel(SinkhornData<T> data, int t) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.y);
  if (p.empty()) return;
  const bool last = t == data.iterations;
  if (!last && stopped(p, t)) return;
  const Sweep<T> s = last ? last_sweep_of(p, static_cast<int>(data.done[p.index])) : sweep_of(p, t);
  const int size = tile_rows(data.rows), begin = static_cast<int>(blockIdx.x) * size;
  T* out = p.partial + static_cast<int64_t>(blockIdx.x) * p.m;
  block_rows<kCols>(p, begin, begin + size < p.n ? begin + size : p.n, slices, out,
                    [&](int i, int lane, T* slice) { forward_row<kCols>(p, s, i, lane, slice); });
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    sinkhorn_fwd_columns_kernel(SinkhornData<T> data, int t) {
  const DeviceProblem<T> p(data, blockIdx.y);
  if (p.empty()) return;
  const int blocks = column_blocks(data.columns);
  T* mine = p.errors + (t % 2) * blocks + blockIdx.x;
  if (stopped(p, t)) {
    if (threadIdx.x == 0) *mine = p.errors[((t + 1) % 2) * blocks + blockIdx.x];
    return;
  }
  const Sweep<T> s = sweep_of(p, t);
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  T error = T(0);
  if (j < p.m) error = update_column(p, s.f_out, s.has_v, tile_count(data.rows), j, p.g_at(t));
  error = block_sum(error);
  if (threadIdx.x != 0) return;
  *mine = s.has_v ? error : T(kInfinity);  // the start has nothing to compare with
  if (blockIdx.x == 0) data.done[p.index] = t + 1;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_fwd_finish_kernel(SinkhornData<T> data) {
  const DeviceProblem<T> p(data, blockIdx.x);
  const int done = p.empty() ? 0 : static_cast<int>(data.done[p.index]);
  __syncthreads();
  finish_forward(p, done, tile_count(data.rows));
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_clear_kernel(SinkhornData<T> data) {
  const DeviceProblem<T> p(data, blockIdx.x);
  clear_backward(p, !p.empty() && data.done[blockIdx.x] > 0);
}

// What a launch of the backward grid does: the start, step number `at`, or the final application.
enum Launch : int { kLaunchStart, kLaunchStep, kLaunchApply };

template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1)
    sinkhorn_bwd_rows_kernel(SinkhornData<T> data, int what, int at) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.y);
  const int done = static_cast<int>(data.done[p.index]);
  if (p.empty() || done == 0) return;
  const bool implicit = data.mode == static_cast<int>(GradientMode::kImplicit);
  // Unrolled step `at` counts down from the last iteration that any problem may have run.
  const int t = data.iterations - 1 - at;
  if (what == kLaunchStep && !implicit && t >= done) return;
  const Step<T> s = what == kLaunchStart   ? start_step(p, done)
                    : what == kLaunchApply ? apply_step(p, done)
                    : implicit             ? round_of(p, done, at)
                                           : step_of(p, done, t);
  const int size = tile_rows(data.rows), begin = static_cast<int>(blockIdx.x) * size;
  T* out = p.partial + static_cast<int64_t>(blockIdx.x) * p.m;
  block_rows<kCols, 2>(
      p, begin, begin + size < p.n ? begin + size : p.n, slices, out,
      [&](int i, int lane, T* slice) { backward_row<kCols>(p, s, i, lane, slice); },
      p.sums + static_cast<int64_t>(blockIdx.x) * p.m);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps, 1)
    sinkhorn_bwd_columns_kernel(SinkhornData<T> data, int at) {
  const DeviceProblem<T> p(data, blockIdx.y);
  const int done = static_cast<int>(data.done[p.index]);
  if (p.empty() || done == 0) return;
  const bool implicit = data.mode == static_cast<int>(GradientMode::kImplicit);
  const int t = implicit ? done - 1 : data.iterations - 1 - at;
  if (t >= done) return;
  const bool first = implicit ? at == 0 : t == done - 1;
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (j >= p.m) return;
  adjoint_column(p, p.g_at(t), t > 0 ? p.g_at(t - 1) : nullptr, first, implicit,
                 tile_count(data.rows), j);
}

// ---- launchers
// -----------------------------------------------------------------------------------

template <class T>
SinkhornData<T> data_of(const SinkhornArgs& args) {
  SinkhornData<T> d{};
  const SinkhornSpec& spec = args.spec;
  d.batch = args.cost.shape[0];
  d.rows = args.cost.shape[1];
  d.columns = args.cost.shape[2];
  d.kept = args.f.shape[0];
  d.cost = args.cost.as<T>();
  d.cost_batch = args.cost.stride[0];
  d.cost_row = args.cost.stride[1];
  const auto pointer = [](const View& view) { return view ? view.as<T>() : nullptr; };
  d.a = pointer(args.a);
  d.a_batch = args.a ? args.a.stride[0] : 0;
  d.b = pointer(args.b);
  d.b_batch = args.b ? args.b.stride[0] : 0;
  d.student_lengths = args.student_lengths ? args.student_lengths.as<int64_t>() : nullptr;
  d.teacher_lengths = args.teacher_lengths ? args.teacher_lengths.as<int64_t>() : nullptr;
  d.f = pointer(args.f);
  d.g = pointer(args.g);
  d.done = args.done.as<int64_t>();
  d.linear = pointer(args.linear);
  d.row_sums = pointer(args.rows);
  d.column_sums = pointer(args.columns);
  d.plan = pointer(args.plan);
  d.linear_bar = pointer(args.linear_bar);
  d.rows_bar = pointer(args.rows_bar);
  d.columns_bar = pointer(args.columns_bar);
  d.plan_bar = pointer(args.plan_bar);
  d.f_bar = pointer(args.f_bar);
  d.g_bar = pointer(args.g_bar);
  d.grad_cost = pointer(args.grad_cost);
  d.grad_a = pointer(args.grad_a);
  d.grad_b = pointer(args.grad_b);
  d.workspace = args.workspace.as<T>();
  d.workspace_size = args.workspace.shape[1];
  d.k = static_cast<T>(kLog2E / spec.epsilon);
  d.epsilon = static_cast<T>(spec.epsilon);
  d.damping_a = static_cast<T>(spec.damping_a);
  d.damping_b = static_cast<T>(spec.damping_b);
  d.denominator = static_cast<T>(spec.denominator);
  d.log_denominator = static_cast<T>(std::log2(spec.denominator));  // -inf for none
  d.tolerance = static_cast<T>(spec.tolerance);
  d.damped_a = spec.damping_a != 1 || spec.denominator != 0;
  d.damped_b = spec.damping_b != 1 || spec.denominator != 0;
  d.columns_first = spec.columns_first != 0;
  d.iterations = static_cast<int>(spec.iterations);
  d.mode = static_cast<int>(spec.mode);
  return d;
}

// Warps whose column sums, `sets` a column, fit into shared memory.
template <class T>
int warps_for(int64_t columns, int sets) {
  const int64_t each = sets * std::max<int64_t>(columns, 1) * static_cast<int64_t>(sizeof(T));
  const int64_t fit = static_cast<int64_t>(simt::shared_memory_limit() - 1024) / each;
  KD_CHECK(fit >= 1, "cost: ", columns, " columns do not fit into the GPU's shared memory");
  int warps = kWarps;
  while (warps > fit) warps /= 2;
  return warps;
}

// Large enough that one block would leave the GPU idle.
constexpr int64_t kGridEntries = int64_t{1} << 18;

template <class T>
bool use_grid(const SinkhornData<T>& d) {
  return d.rows * d.columns > kGridEntries && d.batch < simt::multiprocessor_count();
}

template <class T, int kCols>
struct Launcher {
  SinkhornData<T> d;
  Stream stream;
  std::string shape;
  int sets;  // column sums of a sweep: one in the forward, two in the backward
  int warps = warps_for<T>(d.columns, sets);

  LaunchInfo info(const char* name, int64_t x, int64_t y, bool shared) const {
    return {name,
            dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
            dim3(static_cast<unsigned>(32 * warps)),
            shared ? static_cast<size_t>(sets * warps * d.columns) * sizeof(T) : 0,
            stream,
            shape};
  }
  // Column kernels take one column a thread, whatever fits into shared memory.
  LaunchInfo columns_info(const char* name) const {
    LaunchInfo out = info(name, column_blocks(d.columns), d.batch, false);
    out.block = dim3(32 * kWarps);
    return out;
  }

  void forward() const {
    if (!use_grid(d)) {
      launch(info("sinkhorn_fwd_block", d.batch, 1, true), sinkhorn_fwd_block_kernel<T, kCols>, d);
      return;
    }
    const int tiles = tile_count(d.rows);
    launch(columns_info("sinkhorn_start"), sinkhorn_start_kernel<T>, d);
    for (int t = 0; t < d.iterations; ++t) {
      launch(info("sinkhorn_fwd_rows", tiles, d.batch, true), sinkhorn_fwd_rows_kernel<T, kCols>, d,
             t);
      launch(columns_info("sinkhorn_fwd_columns"), sinkhorn_fwd_columns_kernel<T>, d, t);
    }
    launch(info("sinkhorn_fwd_rows", tiles, d.batch, true), sinkhorn_fwd_rows_kernel<T, kCols>, d,
           d.iterations);
    launch(info("sinkhorn_fwd_finish", d.batch, 1, false), sinkhorn_fwd_finish_kernel<T>, d);
  }

  void backward() const {
    if (!use_grid(d)) {
      launch(info("sinkhorn_bwd_block", d.batch, 1, true), sinkhorn_bwd_block_kernel<T, kCols>, d);
      return;
    }
    const int tiles = tile_count(d.rows);
    const auto rows = [&](int what, int at) {
      launch(info("sinkhorn_bwd_rows", tiles, d.batch, true), sinkhorn_bwd_rows_kernel<T, kCols>, d,
             what, at);
    };
    launch(info("sinkhorn_clear", d.batch, 1, false), sinkhorn_clear_kernel<T>, d);
    rows(kLaunchStart, 0);
    const auto mode = static_cast<GradientMode>(d.mode);
    if (mode == GradientMode::kEnvelope) return;
    const bool implicit = mode == GradientMode::kImplicit;
    const int steps = implicit ? std::max(100, d.iterations) : d.iterations;
    for (int at = 0; at < steps; ++at) {
      launch(columns_info("sinkhorn_bwd_columns"), sinkhorn_bwd_columns_kernel<T>, d, at);
      rows(kLaunchStep, at);
    }
    if (implicit) rows(kLaunchApply, 0);
  }
};

template <class T, int kCols>
void run(const SinkhornArgs& args, bool forward) {
  const DeviceGuard guard(args.cost.device_index);
  Launcher<T, kCols> launcher{data_of<T>(args), static_cast<Stream>(args.stream),
                              "cost " + shape_text(args.cost), forward ? 1 : 2};
  if (launcher.d.batch == 0) return;
  forward ? launcher.forward() : launcher.backward();
}

void dispatch(const SinkhornArgs& args, bool forward) {
  check_sinkhorn(args, sinkhorn_workspace(args.cost.shape[1], args.cost.shape[2]));
  KD_CHECK(args.cost.shape[1] < (int64_t{1} << 31) && args.cost.shape[2] < (int64_t{1} << 31),
           "cost: expected less than 2^31 rows and columns");
  if (args.cost.dtype == DType::kFloat64) return run<double, 0>(args, forward);
  const int64_t columns = args.cost.shape[2];
  if (columns <= 32) return run<float, 1>(args, forward);
  if (columns <= 128) return run<float, 4>(args, forward);
  if (columns <= 512) return run<float, 16>(args, forward);
  if (columns <= 1024) return run<float, 32>(args, forward);
  run<float, 0>(args, forward);
}

}  // namespace

// ---- entry points
// --------------------------------------------------------------------------------

int64_t sinkhorn_workspace(int64_t rows, int64_t columns) {
  return columns * (5 + 2 * tile_count(rows)) + rows * 4 + 2 * column_blocks(columns);
}

void sinkhorn_fwd(const SinkhornArgs& args) {
  dispatch(args, true);
}
void sinkhorn_bwd(const SinkhornArgs& args) {
  dispatch(args, false);
}

}  // namespace kd::cuda
