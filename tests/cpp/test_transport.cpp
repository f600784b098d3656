// Transport's CPU kernels on arrays of exactly their size, on every instruction set: under the
// sanitizers one entry read or written beyond a row, a column or the scratch is seen.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <type_traits>
#include <vector>

#include "check_main.h"
#include "common/half.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "transport/transport.h"

namespace {

using kd::DType;
using kd::View;

template <class T>
DType dtype_of() {
  if (std::is_same_v<T, double>) return DType::kFloat64;
  if (std::is_same_v<T, int64_t>) return DType::kInt64;
  if (std::is_same_v<T, int32_t>) return DType::kInt32;
  if (std::is_same_v<T, kd::bf16>) return DType::kBFloat16;
  if (std::is_same_v<T, bool>) return DType::kBool;
  return DType::kFloat32;
}

template <class T>
View view_of(std::vector<T>& data, std::initializer_list<int64_t> shape) {
  View view;
  view.data = data.data();
  view.ndim = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    view.shape[i] = shape.begin()[i];
    view.stride[i] = stride;
    stride *= view.shape[i];
  }
  view.dtype = dtype_of<T>();
  return view;
}

template <class T>
std::vector<T> numbers(int64_t count, double low, double high, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<T> out(static_cast<size_t>(count));
  for (T& x : out) x = static_cast<T>(uniform(generator));
  return out;
}

template <class T>
void run_sinkhorn(int64_t batch, int64_t n, int64_t m, bool columns_first, kd::GradientMode mode,
                  bool ragged, double reach) {
  constexpr int64_t kIterations = 4;
  const T nan = static_cast<T>(NAN);
  std::vector<T> cost = numbers<T>(batch * n * m, 0, 1, 1);
  std::vector<int64_t> rows_of(static_cast<size_t>(batch), n), columns_of(rows_of.size(), m);
  if (ragged) {
    rows_of[0] = n / 2;
    columns_of[static_cast<size_t>(batch - 1)] = m / 3;
  }
  std::vector<T> f(static_cast<size_t>(kIterations * batch * n), nan), plan(cost.size(), nan);
  std::vector<T> g(static_cast<size_t>(kIterations * batch * m), nan), grad_cost(cost.size(), nan);
  std::vector<T> linear(static_cast<size_t>(batch), nan), grad_a(static_cast<size_t>(batch * n));
  std::vector<T> grad_b(static_cast<size_t>(batch * m), nan), bar(linear.size(), T(1));
  std::vector<int64_t> done(static_cast<size_t>(batch), -1);
  const int64_t size = kd::cpu::sinkhorn_workspace(n, m);
  std::vector<T> workspace(static_cast<size_t>(batch * size), nan);
  kd::SinkhornArgs args;
  args.cost = view_of(cost, {batch, n, m});
  if (ragged) {
    args.student_lengths = view_of(rows_of, {batch});
    args.teacher_lengths = view_of(columns_of, {batch});
  }
  args.f = view_of(f, {kIterations, batch, n});
  args.g = view_of(g, {kIterations, batch, m});
  args.done = view_of(done, {batch});
  args.linear = view_of(linear, {batch});
  args.plan = view_of(plan, {batch, n, m});
  args.workspace = view_of(workspace, {batch, size});
  args.spec.epsilon = 0.1;
  args.spec.iterations = kIterations;
  args.spec.columns_first = columns_first;
  args.spec.damping_a = args.spec.damping_b = reach > 0 ? reach / (reach + 0.1) : 1;
  args.spec.mode = static_cast<double>(mode);
  kd::cpu::sinkhorn_fwd(args);
  args.linear_bar = view_of(bar, {batch});
  args.grad_cost = view_of(grad_cost, {batch, n, m});
  args.grad_a = view_of(grad_a, {batch, n});
  args.grad_b = view_of(grad_b, {batch, m});
  kd::cpu::sinkhorn_bwd(args);
  for (T x : grad_cost) CHECK(std::isfinite(x));
  for (T x : grad_a) CHECK(std::isfinite(x));
  for (T x : grad_b) CHECK(std::isfinite(x));
  // The side that was solved last has its marginal, uniform here, and nothing lies beyond.
  for (int64_t k = 0; k < batch && reach == 0; ++k) {
    const int64_t rows = rows_of[static_cast<size_t>(k)];
    const int64_t columns = columns_of[static_cast<size_t>(k)];
    if (rows == 0 || columns == 0) continue;
    const int64_t solved = columns_first ? rows : columns;
    for (int64_t x = 0; x < (columns_first ? n : m); ++x) {
      double sum = 0;
      for (int64_t y = 0; y < (columns_first ? m : n); ++y) {
        const int64_t i = columns_first ? x : y, j = columns_first ? y : x;
        sum += static_cast<double>(plan[static_cast<size_t>((k * n + i) * m + j)]);
      }
      const double expected = x < solved ? 1.0 / static_cast<double>(solved) : 0.0;
      CHECK_SHOW(std::abs(sum - expected) < 1e-5, sum, expected);
    }
  }
}

void test_sinkhorn() {
  struct Size {
    int64_t batch, n, m;
  };
  // One row, one column, part of a vector, whole vectors and a rest, several blocks of rows.
  for (const Size s : {Size{1, 1, 1}, Size{3, 5, 7}, Size{2, 9, 33}, Size{1, 521, 515}}) {
    for (bool columns_first : {false, true}) {
      for (bool ragged : {false, true}) {
        for (auto mode : {kd::GradientMode::kUnrolled, kd::GradientMode::kImplicit,
                          kd::GradientMode::kEnvelope}) {
          if (s.n > 100 && mode == kd::GradientMode::kImplicit) continue;
          run_sinkhorn<float>(s.batch, s.n, s.m, columns_first, mode, ragged, 0);
          if (s.n > 100) continue;
          run_sinkhorn<double>(s.batch, s.n, s.m, columns_first, mode, ragged, 0.5);
        }
      }
    }
  }
}

// Weights sum to one, so potentials lie between minus and plus the largest cost, and so do slopes.
template <class T>
void run_annealed(int64_t batch, int64_t n, int64_t m, int64_t dims, bool root, bool given) {
  std::vector<T> x = numbers<T>(batch * dims * n, 0, 1, 4),
                 y = numbers<T>(batch * dims * m, 0, 1, 5);
  std::vector<T> log_a(static_cast<size_t>(batch * n), static_cast<T>(-std::log(double(n))));
  std::vector<T> log_b(static_cast<size_t>(batch * m), static_cast<T>(-std::log(double(m))));
  const int64_t total = 2 * (n + m);
  const T nan = static_cast<T>(NAN);
  std::vector<T> potentials(static_cast<size_t>(batch * total), nan);
  std::vector<T> slopes(static_cast<size_t>(batch * dims * total), nan);
  std::vector<T> workspace(static_cast<size_t>(2 * batch * total), nan);
  const int64_t sizes[4][2] = {{n, m}, {m, n}, {n, n}, {m, m}};
  std::vector<T> costs[4];
  kd::AnnealedArgs args;
  args.x = view_of(x, {batch, dims, n});
  args.y = view_of(y, {batch, dims, m});
  args.log_a = view_of(log_a, {batch, n});
  args.log_b = view_of(log_b, {batch, m});
  for (int side = 0; side < 4 && given; ++side) {
    costs[side] = numbers<T>(batch * sizes[side][0] * sizes[side][1], 0.1, 1, 6);
    args.costs[side] = view_of(costs[side], {batch, sizes[side][0], sizes[side][1]});
  }
  args.potentials = view_of(potentials, {batch, total});
  if (!given) args.slopes = view_of(slopes, {batch, dims, total});
  args.workspace = view_of(workspace, {2, batch, total});
  args.epsilons = {1.0, 1.0, 0.1, 0.01};
  args.root = root;
  args.need_x = args.need_y = true;
  kd::cpu::annealed(args);
  const double most = static_cast<double>(dims) + 1e-4;
  for (T phi : potentials) CHECK_SHOW(std::abs(static_cast<double>(phi)) <= most, phi, most);
  for (T slope : slopes) CHECK(given || std::abs(static_cast<double>(slope)) <= 1.0001);
  for (int side = 0; side < 4 && given; ++side) {
    double sum = 0;
    for (T weight : costs[side]) sum += static_cast<double>(weight);
    const double rows = static_cast<double>(batch * sizes[side][0]);
    CHECK_SHOW(root ? sum >= 0.999 * rows : std::abs(sum - rows) < 1e-3 * rows, sum, rows);
  }
}

void test_annealed() {
  for (int64_t n : {1, 5, 33}) {
    for (int64_t m : {1, 16, 19}) {
      for (int64_t dims : {1, 2, 3, 7, 16}) {
        for (bool root : {false, true}) {
          run_annealed<float>(2, n, m, dims, root, false);
          run_annealed<double>(1, n, m, dims, root, false);
        }
      }
      run_annealed<float>(2, n, m, 20, false, true);
      run_annealed<double>(2, n, m, 20, true, true);
    }
  }
}

// Values beyond both rows' equality are checked from Python; here 0 <= value <= 2 and equal rows.
template <class S, class T>
void run_sorted(int64_t rows, int64_t width, int64_t other, bool exclude) {
  using F = std::conditional_t<std::is_same_v<S, double>, double, float>;
  std::vector<float> wide_s = numbers<float>(rows * width, -8, 8, 2);
  std::vector<float> wide_t = numbers<float>(rows * other, -8, 8, 3);
  std::vector<S> student(wide_s.size());
  std::vector<T> teacher(wide_t.size());
  for (size_t k = 0; k < wide_s.size(); ++k) student[k] = kd::cast<S>(F(wide_s[k]));
  for (size_t k = 0; k < wide_t.size(); ++k) teacher[k] = kd::cast<T>(F(wide_t[k]));
  std::vector<F> value(static_cast<size_t>(rows)), slopes(static_cast<size_t>(2 * rows));
  std::vector<S> grad(student.size());
  std::vector<uint8_t> excluded(static_cast<size_t>(width), 0);
  for (size_t k = 0; k < excluded.size(); k += 3) excluded[k] = 1;
  const int64_t size = kd::cpu::sorted_workspace(width, other, sizeof(F) == 8);
  std::vector<int32_t> workspace(static_cast<size_t>(size));
  kd::SortedArgs args;
  args.student = view_of(student, {rows, width});
  args.teacher = view_of(teacher, {rows, other});
  if (exclude) {
    args.student_excluded = view_of(excluded, {width});
    args.student_excluded.dtype = DType::kBool;
  }
  args.value = view_of(value, {rows});
  args.slopes = view_of(slopes, {rows, 2});
  args.grad_student = view_of(grad, {rows, width});
  args.workspace = view_of(workspace, {1, size});
  args.student_temperature = args.teacher_temperature = 1.3;
  kd::cpu::sorted_transport(args);
  for (F x : value) CHECK(x >= F(0) && x <= F(2.0001));
  for (const S& x : grad) CHECK(std::isfinite(static_cast<double>(kd::to_float(x))));
}

void test_sorted() {
  for (int64_t width : {1, 7, 16, 33, 1000}) {
    for (int64_t other : {1, 31, 1003}) {
      for (bool exclude : {false, true}) {
        run_sorted<float, float>(2, width, other, exclude);
        run_sorted<kd::bf16, kd::bf16>(2, width, other, exclude);
        run_sorted<kd::bf16, float>(1, width, other, exclude);
        run_sorted<double, double>(1, width, other, exclude);
      }
    }
  }
}

}  // namespace

int main() {
  kd::set_num_threads(2);
  for (kd::Isa isa : kd::kCompiledIsas) {
    if (!kd::is_supported(isa)) continue;
    kd::set_isa(kd::name(isa));
    test_sinkhorn();
    test_annealed();
    test_sorted();
  }
  return kd_test::check_result("transport");
}
