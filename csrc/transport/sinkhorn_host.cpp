// Sinkhorn on CPU: threads over problems first; inside a problem, over fixed blocks of rows whose
// column sums are added in order, so that the bits do not depend on the number of threads.
#include <cmath>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scalar.h"
#include "transport/sinkhorn_checks.h"
#include "transport/sinkhorn_cpu.h"
#include "transport/transport.h"

namespace kd::cpu {
namespace {

constexpr int64_t kMaxBlocks = 16;
// Entries of a block of rows: a barrier of two threads costs about as much as 2^14 of them.
constexpr int64_t kBlockEntries = int64_t{1} << 15;

template <class T>
const SinkhornTable<T>* table() {
  if constexpr (std::is_same_v<T, float>) {
    return KD_PICK_ISA(sinkhorn_float)();
  } else {
    return KD_PICK_ISA(sinkhorn_double)();
  }
}

// A row of an optional (B, X) view.
template <class T>
T* row(const View& view, int64_t problem) {
  return view ? view.as<T>() + problem * view.stride[0] : nullptr;
}
template <class T>
T* history(const View& view, int64_t slot, int64_t problem) {
  return view.as<T>() + slot * view.stride[0] + problem * view.stride[1];
}

template <class T>
void clear(T* data, int64_t begin, int64_t end) {
  if (data == nullptr) return;
  for (int64_t i = begin; i < end; ++i) data[i] = T(0);
}

int64_t blocks_of(int64_t rows, int64_t columns) {
  const int64_t blocks = rows * columns / kBlockEntries;
  return blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks;
}

// One problem of the batch: its arrays, its blocks of rows.
template <class T>
struct Problem {
  const SinkhornArgs& args;
  const SinkhornTable<T>* kernels = table<T>();
  int64_t index;
  int64_t full_rows, full_columns;  // of the tensors
  int64_t n, m;                     // of this problem
  int64_t blocks;
  int64_t block_rows;
  T* scratch_begin;

  Problem(const SinkhornArgs& args, int64_t index)
      : args(args), index(index), full_rows(args.cost.shape[1]), full_columns(args.cost.shape[2]) {
    n = args.student_lengths ? length(args.student_lengths, full_rows) : full_rows;
    m = args.teacher_lengths ? length(args.teacher_lengths, full_columns) : full_columns;
    blocks = blocks_of(n, m);
    block_rows = ((n + blocks - 1) / blocks + kSweepRows - 1) / kSweepRows * kSweepRows;
    if (block_rows > 0) blocks = (n + block_rows - 1) / block_rows;
    scratch_begin = row<T>(args.workspace, index);
  }

  int64_t length(const View& lengths, int64_t limit) const {
    const int64_t value = lengths.as<int64_t>()[index * lengths.stride[0]];
    KD_CHECK(value >= 0 && value <= limit, "lengths: expected 0 to ", limit, ", got ", value,
             " for problem ", index);
    return value;
  }
  bool empty() const { return n == 0 || m == 0; }
  const T* cost() const { return args.cost.as<T>() + index * args.cost.stride[0]; }
  T* take(int64_t count) {
    T* out = scratch_begin;
    scratch_begin += count;
    return out;
  }

  // fn(begin, end, block) over the fixed blocks of rows.
  template <class Fn>
  void for_blocks(const Fn& fn) const {
    const auto run = [&](int64_t block) {
      const int64_t begin = block * block_rows;
      fn(begin, begin + block_rows < n ? begin + block_rows : n, block);
    };
    if (blocks == 1) return run(0);
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) run(block);
    });
  }
  T* buffer() const { return reinterpret_cast<T*>(scratch(kSweepRows * m * sizeof(T))); }
};

template <class T>
void forward_problem(const SinkhornArgs& args, int64_t index) {
  Problem<T> p(args, index);
  const SinkhornSpec& spec = args.spec;
  const int64_t iterations = static_cast<int64_t>(spec.iterations);
  const bool keep = args.f.shape[0] > 1;
  const bool columns_first = spec.columns_first != 0;
  int64_t* done = args.done.as<int64_t>() + index;
  const auto f_at = [&](int64_t t) { return history<T>(args.f, keep ? t : 0, index); };
  const auto g_at = [&](int64_t t) { return history<T>(args.g, keep ? t : 0, index); };
  T* plan = args.plan ? args.plan.as<T>() + index * args.plan.stride[0] : nullptr;
  T* rows = row<T>(args.rows, index);
  T* columns = row<T>(args.columns, index);
  T* linear = args.linear ? args.linear.as<T>() + index : nullptr;
  if (p.empty()) {
    *done = 0;
    for (int64_t t = 0; t < args.f.shape[0]; ++t) {
      clear(history<T>(args.f, t, index), 0, p.full_rows);
      clear(history<T>(args.g, t, index), 0, p.full_columns);
    }
    clear(rows, 0, p.full_rows);
    clear(columns, 0, p.full_columns);
    clear(plan, 0, p.full_rows * p.full_columns);
    if (linear != nullptr) *linear = T(0);
    return;
  }
  T* log_v = p.take(p.m);
  T* log_b = p.take(p.m);
  T* partial = p.take(p.m * p.blocks);
  T* base = p.take(p.n);
  T* log_a = p.take(p.n);
  T* log_u = p.take(p.n);
  T* row_linear = p.take(p.n);
  const T* a = row<T>(args.a, index);
  const T* b = row<T>(args.b, index);
  const T uniform_a = T(1) / static_cast<T>(p.n), uniform_b = T(1) / static_cast<T>(p.m);
  p.kernels->log2(a, uniform_a, log_a, p.n);
  p.kernels->log2(b, uniform_b, log_b, p.m);

  ForwardSweep<T> sweep{};
  sweep.cost = p.cost();
  sweep.row_stride = args.cost.stride[1];
  sweep.columns = p.m;
  sweep.k = static_cast<T>(kLog2E / spec.epsilon);
  sweep.a = a;
  sweep.uniform_a = uniform_a;
  sweep.base = base;
  sweep.damping = static_cast<T>(spec.damping_a);
  sweep.log_denominator = static_cast<T>(std::log2(spec.denominator));  // -inf for none
  sweep.damped = spec.damping_a != 1 || spec.denominator != 0;
  ColumnUpdate<T> update{};
  update.cost = sweep.cost;
  update.row_stride = sweep.row_stride;
  update.rows = p.n;
  update.columns = p.m;
  update.k = sweep.k;
  update.partial = partial;
  update.blocks = p.blocks;
  update.log_u = log_u;
  update.log_b = log_b;
  update.log_v = log_v;
  update.damping = static_cast<T>(spec.damping_b);
  update.log_denominator = sweep.log_denominator;
  update.damped = spec.damping_b != 1 || spec.denominator != 0;

  const auto run_sweep = [&] {
    p.for_blocks([&](int64_t begin, int64_t end, int64_t block) {
      p.kernels->forward(sweep, begin, end, partial + block * p.m, p.buffer());
    });
    if (sweep.solve) p.kernels->finish_rows(sweep, p.n);
  };
  // v_0: one, or zero where b is zero.
  for (int64_t j = 0; j < p.m; ++j) log_v[j] = log_b[j] == -kInfinity ? log_b[j] : T(0);

  sweep.accumulate = true;
  int64_t last = iterations - 1;
  for (int64_t t = 0; t < iterations; ++t) {
    // Rows, unless the columns go first and the rows still have their start.
    const bool start = columns_first && t == 0;
    sweep.solve = !start;
    sweep.f_in = columns_first ? (t < 2 ? nullptr : f_at(t - 2)) : (t == 0 ? nullptr : f_at(t - 1));
    // Order "columns": the rows solved in the sweep of iteration t belong to iteration t - 1.
    sweep.f_out = start ? nullptr : columns_first ? f_at(t - 1) : f_at(t);
    sweep.log_v = start ? nullptr : log_v;
    run_sweep();
    for (int64_t i = 0; i < p.n; ++i) {
      log_u[i] = start ? (log_a[i] == -kInfinity ? log_a[i] : T(0)) : log_a[i] + sweep.f_out[i];
    }
    update.has_log_v = !start;
    update.g_out = g_at(t);
    // The columns' change bounds the error of the rows after it; the start has none to compare.
    update.want_error = spec.tolerance > 0 && !start;
    const double error = p.kernels->update_columns(update);
    if (update.want_error && error <= spec.tolerance) {
      last = t;
      break;
    }
  }
  *done = last + 1;

  // The last sweep: solves the rows of order "columns", and reports.
  const bool report = linear != nullptr || rows != nullptr || columns != nullptr || plan != nullptr;
  if (columns_first || report) {
    sweep.log_v = log_v;
    sweep.solve = columns_first;
    sweep.f_in = columns_first ? (last == 0 ? nullptr : f_at(last - 1)) : f_at(last);
    sweep.f_out = columns_first ? f_at(last) : nullptr;
    sweep.accumulate = columns != nullptr;
    sweep.linear = linear != nullptr ? row_linear : nullptr;
    sweep.rows = rows;
    sweep.plan = plan;
    sweep.plan_stride = p.full_columns;
    run_sweep();
  }
  if (linear != nullptr) {
    double sum = 0;
    for (int64_t i = 0; i < p.n; ++i) sum += static_cast<double>(row_linear[i]);
    *linear = static_cast<T>(sum);
  }
  if (columns != nullptr) {
    clear(columns, 0, p.full_columns);
    for (int64_t block = 0; block < p.blocks; ++block) {
      p.kernels->add(columns, partial + block * p.m, p.m);
    }
  }
  clear(rows, p.n, p.full_rows);
  for (int64_t t = 0; t < args.f.shape[0]; ++t) {
    // Iterations that did not run repeat nothing: their slots are zero.
    const bool ran = t <= last || !keep;
    clear(history<T>(args.f, t, index), ran ? p.n : 0, p.full_rows);
    clear(history<T>(args.g, t, index), ran ? p.m : 0, p.full_columns);
  }
  if (plan != nullptr) {
    for (int64_t i = 0; i < p.full_rows; ++i) {
      clear(plan + i * p.full_columns, i < p.n ? p.m : 0, p.full_columns);
    }
  }
}

template <class T>
void backward_problem(const SinkhornArgs& args, int64_t index) {
  Problem<T> p(args, index);
  const SinkhornSpec& spec = args.spec;
  const auto mode = static_cast<GradientMode>(static_cast<int>(spec.mode));
  const bool columns_first = spec.columns_first != 0;
  const bool keep = args.f.shape[0] > 1;
  const int64_t done = args.done.as<int64_t>()[index];
  T* grad_cost =
      args.grad_cost ? args.grad_cost.as<T>() + index * args.grad_cost.stride[0] : nullptr;
  T* grad_a = row<T>(args.grad_a, index);
  T* grad_b = row<T>(args.grad_b, index);
  clear(grad_a, 0, p.full_rows);
  clear(grad_b, 0, p.full_columns);
  if (grad_cost != nullptr) {
    for (int64_t i = 0; i < p.full_rows; ++i) {
      clear(grad_cost + i * p.full_columns, i < p.n && !p.empty() ? p.m : 0, p.full_columns);
    }
  }
  if (p.empty() || done == 0) return;

  T* w = p.take(p.m);
  T* q = p.take(p.m);
  T* r = p.take(p.m);
  T* w_sum = p.take(p.m);
  T* partial = p.take(p.m * p.blocks);
  T* sums = p.take(p.m * p.blocks);
  T* alpha = p.take(p.n);
  T* z_sum = p.take(p.n);
  const T* a = row<T>(args.a, index);
  const T* b = row<T>(args.b, index);
  const auto f_at = [&](int64_t t) { return history<T>(args.f, keep ? t : 0, index); };
  const auto g_at = [&](int64_t t) { return history<T>(args.g, keep ? t : 0, index); };

  BackwardSweep<T> sweep{};
  sweep.cost = p.cost();
  sweep.row_stride = args.cost.stride[1];
  sweep.columns = p.m;
  sweep.k = static_cast<T>(kLog2E / spec.epsilon);
  sweep.epsilon = static_cast<T>(spec.epsilon);
  sweep.a = a;
  sweep.uniform_a = T(1) / static_cast<T>(p.n);
  sweep.b = b;
  sweep.uniform_b = T(1) / static_cast<T>(p.m);
  sweep.linear_bar =
      args.linear_bar ? args.linear_bar.as<T>()[index * args.linear_bar.stride[0]] : T(0);
  sweep.rows_bar = row<T>(args.rows_bar, index);
  sweep.columns_bar = row<T>(args.columns_bar, index);
  sweep.plan_bar =
      args.plan_bar ? args.plan_bar.as<T>() + index * args.plan_bar.stride[0] : nullptr;
  sweep.plan_bar_stride = args.plan_bar ? args.plan_bar.stride[1] : 0;
  sweep.envelope = mode == GradientMode::kEnvelope;
  sweep.damping = static_cast<T>(spec.damping_a);
  sweep.denominator = static_cast<T>(spec.denominator);
  sweep.alpha = alpha;
  sweep.grad_cost = grad_cost;
  sweep.grad_stride = p.full_columns;
  ColumnAdjoint<T> adjoint{};
  adjoint.columns = p.m;
  adjoint.blocks = p.blocks;
  adjoint.partial = partial;
  adjoint.sums = sums;
  adjoint.b = b;
  adjoint.uniform_b = sweep.uniform_b;
  adjoint.damping = static_cast<T>(spec.damping_b);
  adjoint.denominator = static_cast<T>(spec.denominator);
  adjoint.grad_b = grad_b;
  adjoint.w = w;
  adjoint.q = q;
  adjoint.r_out = r;

  const auto run_sweep = [&] {
    p.for_blocks([&](int64_t begin, int64_t end, int64_t block) {
      p.kernels->backward(sweep, begin, end, partial + block * p.m, sums + block * p.m, p.buffer());
    });
  };
  const T* f_bar = row<T>(args.f_bar, index);
  const T* g_bar = row<T>(args.g_bar, index);
  const T* f_last = f_at(done - 1);
  const T* g_last = g_at(done - 1);
  const bool implicit = mode == GradientMode::kImplicit;
  if (implicit) {
    clear(w_sum, 0, p.m);
    clear(z_sum, 0, p.n);
    sweep.z_sum = z_sum;
    adjoint.w_sum = w_sum;
    adjoint.fixed = true;
  }

  // Start: the plan's own adjoint, and with order "columns" the rows of the last iteration.
  sweep.stage = BackwardSweep<T>::kStart;
  sweep.f = f_last;
  sweep.g = g_last;
  sweep.solve = columns_first;
  sweep.grad_a = columns_first ? grad_a : nullptr;
  sweep.f_bar = columns_first ? f_bar : nullptr;
  // The first step's columns were solved from these rows, or, columns first, from those before.
  const auto prepare_next = [&](int64_t t) {
    sweep.f_next = t >= 0 ? f_at(t) : nullptr;
    sweep.unit_next = t < 0;
  };
  sweep.f_next = f_last;
  if (columns_first && !implicit) prepare_next(done - 2);
  run_sweep();
  if (sweep.envelope) return;

  sweep.stage = BackwardSweep<T>::kStep;
  sweep.w = w;
  sweep.q = q;
  sweep.grad_a = grad_a;
  sweep.solve = true;
  sweep.accumulate = true;
  adjoint.g_bar = g_bar;
  if (implicit) {
    // The same step over and over, until what it adds is small against what it started from.
    sweep.grad_cost = nullptr;
    const double precision = sizeof(T) == 8 ? 1e-14 : 1e-8;
    const int64_t limit = spec.iterations < 100 ? 100 : static_cast<int64_t>(spec.iterations);
    double first = 0;
    for (int64_t t = 0; t < limit; ++t) {
      adjoint.g = g_last;
      const double size = p.kernels->adjoint_columns(adjoint);
      if (t == 0) first = size;
      sweep.add_alpha = t == 0 && !columns_first;
      sweep.f_bar = sweep.add_alpha ? f_bar : nullptr;
      run_sweep();
      adjoint.r = r;
      adjoint.g_bar = nullptr;
      if (t > 0 && !(size > precision * first)) break;
    }
    sweep.stage = BackwardSweep<T>::kApply;
    sweep.grad_cost = grad_cost;
    sweep.accumulate = false;
    sweep.w = w_sum;
    if (grad_cost != nullptr) run_sweep();
    return;
  }
  for (int64_t t = done - 1; t >= 0; --t) {
    adjoint.g = g_at(t);
    adjoint.g_before = t > 0 ? g_at(t - 1) : nullptr;
    p.kernels->adjoint_columns(adjoint);
    adjoint.r = r;
    adjoint.g_bar = nullptr;
    sweep.g = adjoint.g;
    if (columns_first) {
      sweep.f = t > 0 ? f_at(t - 1) : nullptr;
      sweep.unit_rows = sweep.f == nullptr;
      sweep.solve = t > 0;
      sweep.f_bar = nullptr;
    } else {
      sweep.f = f_at(t);
      sweep.add_alpha = t == done - 1;
      sweep.f_bar = sweep.add_alpha ? f_bar : nullptr;
    }
    prepare_next(columns_first ? t - 2 : t - 1);
    sweep.accumulate = t > 0;
    if (t == 0 && columns_first && grad_cost == nullptr) break;
    run_sweep();
  }
}

template <class Fn>
void for_problems(const SinkhornArgs& args, const Fn& fn) {
  const int64_t batch = args.cost.shape[0];
  const int64_t entries = args.cost.shape[1] * args.cost.shape[2];
  // Few large problems: the threads go into each of them.
  if (batch < num_threads() && entries >= 2 * kBlockEntries) {
    for (int64_t index = 0; index < batch; ++index) fn(index);
    return;
  }
  const int64_t work = entries * static_cast<int64_t>(args.spec.iterations) + 1;
  const int64_t grain = (int64_t{1} << 17) / work + 1;
  parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) fn(index);
  });
}

}  // namespace

int64_t sinkhorn_workspace(int64_t rows, int64_t columns) {
  return columns * (4 + 2 * blocks_of(rows, columns)) + rows * 4;
}

void sinkhorn_fwd(const SinkhornArgs& args) {
  check_sinkhorn(args, sinkhorn_workspace(args.cost.shape[1], args.cost.shape[2]));
  for_problems(args, [&](int64_t index) {
    if (args.cost.dtype == DType::kFloat64) return forward_problem<double>(args, index);
    forward_problem<float>(args, index);
  });
}

void sinkhorn_bwd(const SinkhornArgs& args) {
  check_sinkhorn(args, sinkhorn_workspace(args.cost.shape[1], args.cost.shape[2]));
  for_problems(args, [&](int64_t index) {
    if (args.cost.dtype == DType::kFloat64) return backward_problem<double>(args, index);
    backward_problem<float>(args, index);
  });
}

}  // namespace kd::cpu
