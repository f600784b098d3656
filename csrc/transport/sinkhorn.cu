// Sinkhorn on CUDA. Small problems: one block runs all iterations of one problem, one launch for
// the batch. Large ones: a group of blocks each, in one cooperative launch; tiles of rows, then
// blocks of columns, which both are of fixed sizes: the bits do not depend on the group's.
#include <algorithm>
#include <cmath>

#include "common/group_barrier.cuh"
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
  walk_back(p, done, sweep, columns);
}

// ---- kernels: a group of blocks a problem
// --------------------------------------------------------

// The group's blocks (blockIdx.x) of problem blockIdx.y: who does what, and when they meet.
template <class T>
struct Group {
  const DeviceProblem<T>& p;
  GroupBarrier barrier;
  int tiles = tile_count(p.data.rows);

  KD_DEVICE explicit Group(const DeviceProblem<T>& p) : p(p), barrier(p.counter, gridDim.x) {}

  // A sweep over all rows, tile by tile; then everybody sees its sums.
  template <int kCols, int kSets, class Row>
  KD_DEVICE void rows(T* slices, const Row& row) {
    const int size = tile_rows(p.data.rows);
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int begin = tile * size, end = begin + size < p.n ? begin + size : p.n;
      const int64_t at = static_cast<int64_t>(tile) * p.m;
      block_rows<kCols, kSets>(p, begin, end, slices, p.partial + at, row, p.sums + at);
    }
    barrier.wait();
  }
  // column(j) of every column, and the sum of what it returns, the same in all blocks.
  template <class Column>
  KD_DEVICE T columns(const Column& column) {
    constexpr int kEach = 32 * kWarps;
    const int blocks = column_blocks(p.data.columns);
    for (int block = blockIdx.x; block < blocks; block += gridDim.x) {
      const int begin = block * kEach, end = begin + kEach < p.m ? begin + kEach : p.m;
      T own = T(0);
      for (int j = begin + static_cast<int>(threadIdx.x); j < end; j += blockDim.x) {
        own += column(j);
      }
      own = block_sum(own);
      if (threadIdx.x == 0) p.errors[block] = own;
    }
    barrier.wait();
    T sum = T(0);
    for (int block = 0; block < blocks; ++block) sum += p.errors[block];
    return sum;
  }
};

__global__ void sinkhorn_counters_kernel(unsigned* first, int64_t stride, int64_t batch) {
  const int64_t problem = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (problem < batch) first[problem * stride] = 0;
}

template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_fwd_group_kernel(SinkhornData<T> data) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.y);
  Group<T> group(p);
  int done = 0;
  if (!p.empty()) {
    group.columns([&](int j) {
      start_column(p, j);
      return T(0);
    });
    for (int t = 0; t < data.iterations; ++t) {
      const Sweep<T> s = sweep_of(p, t);
      group.template rows<kCols, 1>(
          slices, [&](int i, int lane, T* slice) { forward_row<kCols>(p, s, i, lane, slice); });
      const T error = group.columns(
          [&](int j) { return update_column(p, s.f_out, s.has_v, group.tiles, j, p.g_at(t)); });
      done = t + 1;
      if (data.tolerance > T(0) && s.has_v && error <= data.tolerance) break;
    }
    const Sweep<T> last = last_sweep_of(p, done);
    group.template rows<kCols, 1>(
        slices, [&](int i, int lane, T* slice) { forward_row<kCols>(p, last, i, lane, slice); });
  }
  if (blockIdx.x == 0) finish_forward(p, done, group.tiles);
}

template <class T, int kCols>
__global__ void __launch_bounds__(32 * kWarps, 1) sinkhorn_bwd_group_kernel(SinkhornData<T> data) {
  KD_DYN_SHARED(T, slices);
  const DeviceProblem<T> p(data, blockIdx.y);
  const int done = static_cast<int>(data.done[blockIdx.y]);
  const bool live = !p.empty() && done > 0;
  if (blockIdx.x == 0) clear_backward(p, live);
  if (!live) return;
  Group<T> group(p);
  group.barrier.wait();
  walk_back(
      p, done,
      [&](const Step<T>& s) {
        group.template rows<kCols, 2>(
            slices, [&](int i, int lane, T* slice) { backward_row<kCols>(p, s, i, lane, slice); });
      },
      [&](const T* g, const T* g_before, bool first, bool fixed) {
        return group.columns(
            [&](int j) { return adjoint_column(p, g, g_before, first, fixed, group.tiles, j); });
      });
}

// ---- launchers ---------------------------------------------------------------------------------

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

// Large enough that one block would leave the GPU idle. The emulator's tests reach it with less.
#if defined(__CUDACC__)
constexpr int64_t kGroupEntries = int64_t{1} << 18;
#else
constexpr int64_t kGroupEntries = int64_t{1} << 11;
#endif

template <class T, int kCols>
struct Launcher {
  SinkhornData<T> d;
  Stream stream;
  std::string shape;
  int sets;  // column sums of a sweep: one in the forward, two in the backward
  int warps = warps_for<T>(d.columns, sets);

  LaunchInfo info(const char* name, int64_t x, int64_t y) const {
    return {name,
            dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
            dim3(static_cast<unsigned>(32 * warps)),
            static_cast<size_t>(sets * warps * d.columns) * sizeof(T),
            stream,
            shape};
  }

  // Blocks of a problem that run at once with those of all others.
  template <class Kernel>
  int64_t group_size(Kernel* kernel) const {
    if (d.rows * d.columns <= kGroupEntries || d.batch > 65535) return 1;
    const int64_t resident = simt::resident_blocks(kernel, 32 * warps, info("", 1, 1).shared_bytes);
    return std::min<int64_t>(tile_count(d.rows), resident / d.batch);
  }

  template <class Kernel>
  void launch_one(const char* name, Kernel* block, const char* group_name, Kernel* group) const {
    const int64_t size = group_size(group);
    if (size < 2) return launch(info(name, d.batch, 1), block, d);
    auto* counter = reinterpret_cast<unsigned*>(d.workspace + d.workspace_size - kCounterSize);
    const int64_t stride =
        d.workspace_size * static_cast<int64_t>(sizeof(T)) / static_cast<int64_t>(sizeof(unsigned));
    launch(LaunchInfo{"sinkhorn_counters", dim3(static_cast<unsigned>((d.batch + 255) / 256)),
                      dim3(256), 0, stream, shape},
           sinkhorn_counters_kernel, counter, stride, d.batch);
    simt::launch_cooperative(info(group_name, size, d.batch), group, d);
  }

  void forward() const {
    launch_one("sinkhorn_fwd_block", sinkhorn_fwd_block_kernel<T, kCols>, "sinkhorn_fwd_group",
               sinkhorn_fwd_group_kernel<T, kCols>);
  }
  void backward() const {
    launch_one("sinkhorn_bwd_block", sinkhorn_bwd_block_kernel<T, kCols>, "sinkhorn_bwd_group",
               sinkhorn_bwd_group_kernel<T, kCols>);
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

// ---- entry points ------------------------------------------------------------------------------

int64_t sinkhorn_workspace(int64_t rows, int64_t columns) {
  return columns * (5 + 2 * tile_count(rows)) + rows * 4 + column_blocks(columns) + kCounterSize;
}

void sinkhorn_fwd(const SinkhornArgs& args) {
  dispatch(args, true);
}
void sinkhorn_bwd(const SinkhornArgs& args) {
  dispatch(args, false);
}

}  // namespace kd::cuda
