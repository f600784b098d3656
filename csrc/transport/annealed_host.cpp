// Annealed potentials on CPU: in every step the rows of all sides of all problems are independent,
// so threads share them by fixed blocks and the bits do not depend on their number.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/scalar.h"
#include "transport/annealed_checks.h"
#include "transport/annealed_cpu.h"

namespace kd::cpu {
namespace {

constexpr int64_t kBlockRows = 16;

template <class T>
const AnnealedTable<T>* table() {
  if constexpr (std::is_same_v<T, float>) {
    return KD_PICK_ISA(annealed_float)();
  } else {
    return KD_PICK_ISA(annealed_double)();
  }
}

template <class T>
struct Annealing {
  const AnnealedArgs& args;
  AnnealedSides sides;
  int64_t batch, dims, total;
  T* h;  // (B, S): the sides' columns one behind the other
  const AnnealedTable<T>* kernels = table<T>();

  explicit Annealing(const AnnealedArgs& args)
      : args(args),
        sides(sides_of(args)),
        batch(args.x.shape[0]),
        dims(args.x.shape[1]),
        total(sides.total()),
        h(args.workspace.as<T>() + batch * total) {}

  // log2 of the columns' weights, and of the partner's potential where there is one.
  void weigh(const T* potentials, T k) const {
    for (int64_t problem = 0; problem < batch; ++problem) {
      const T* of_problem = potentials + problem * total;
      for (int side = 0; side < sides.count; ++side) {
        const int64_t columns = sides.columns(side), at = sides.column_offset(side);
        const View& view = AnnealedSides::columns_are_x(side) ? args.log_a : args.log_b;
        const T* log_w = view.as<T>() + problem * columns;
        T* out = h + problem * total + at;
        for (int64_t j = 0; j < columns; ++j) {
          const T phi = potentials != nullptr ? of_problem[at + j] : T(0);
          out[j] = fma(k, phi, T(kLog2E) * log_w[j]);
        }
      }
    }
  }

  // One update of every row. `before` null: the start.
  void update(const T* before, T* after, double epsilon, bool average, bool last) const {
    const T k = static_cast<T>(kLog2E / epsilon);
    weigh(before, k);
    int64_t blocks[5] = {0};
    for (int side = 0; side < sides.count; ++side) {
      blocks[side + 1] = blocks[side] + (sides.rows(side) + kBlockRows - 1) / kBlockRows;
    }
    const int64_t each = blocks[sides.count];
    const auto run = [&](int64_t task) {
      const int64_t problem = task / each, block = task % each;
      int side = 0;
      while (block >= blocks[side + 1]) ++side;
      SoftminSweep<T> s{};
      const bool x_rows = AnnealedSides::rows_are_x(side);
      const View& rows = x_rows ? args.x : args.y;
      const View& columns = AnnealedSides::columns_are_x(side) ? args.x : args.y;
      const int64_t at = problem * total + sides.offset(side);
      const bool wanted = last && (x_rows ? args.need_x : args.need_y);
      s.dims = dims;
      s.row_count = sides.rows(side);
      s.column_count = sides.columns(side);
      s.rows = rows.as<T>() + problem * dims * s.row_count;
      s.columns = columns.as<T>() + problem * dims * s.column_count;
      s.root = args.root;
      s.cost = args.costs[side] ? args.costs[side].as<T>() + problem * s.row_count * s.column_count
                                : nullptr;
      s.h = h + problem * total + sides.column_offset(side);
      s.k = k;
      s.damping = static_cast<T>(args.rho > 0 ? 1 / (1 + epsilon / args.rho) : 1);
      s.before = before != nullptr ? before + at : nullptr;
      s.after = after + at;
      s.average = average;
      s.weights = wanted;
      if (wanted && args.slopes) {
        s.slopes = args.slopes.as<T>() + problem * dims * total + sides.offset(side);
        s.slope_stride = total;
      }
      const int64_t begin = (block - blocks[side]) * kBlockRows, end = begin + kBlockRows;
      kernels->softmin(s, begin, end < s.row_count ? end : s.row_count);
    };
    const int64_t entries = kBlockRows * (sides.n > sides.m ? sides.n : sides.m);
    parallel_for(0, batch * each, (int64_t{1} << 14) / (entries + 1) + 1,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t task = begin; task < end; ++task) run(task);
                 });
  }

  void run() const {
    const int64_t steps = static_cast<int64_t>(args.epsilons.size()) + 2;
    T* buffers[2] = {args.potentials.as<T>(), args.workspace.as<T>()};
    for (int64_t step = 0; step < steps; ++step) {
      const bool start = step == 0, last = step == steps - 1;
      // The last step writes the output.
      T* after = buffers[(steps - 1 - step) % 2];
      const T* before = start ? nullptr : buffers[(steps - step) % 2];
      const double epsilon = args.epsilons[static_cast<size_t>(start  ? 0
                                                               : last ? steps - 3
                                                                      : step - 1)];
      update(before, after, epsilon, !start && !last, last);
    }
  }
};

}  // namespace

void annealed(const AnnealedArgs& args) {
  check_annealed(args);
  if (args.x.shape[0] == 0) return;
  if (args.x.dtype == DType::kFloat64) return Annealing<double>(args).run();
  Annealing<float>(args).run();
}

}  // namespace kd::cpu
