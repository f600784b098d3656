// A look at marginals on the CPU, where it costs no synchronisation.
#include <cmath>

#include "common/check.h"
#include "transport/transport.h"

namespace kd::cpu {
namespace {

int64_t length(const View& lengths, int64_t problem, int64_t size) {
  if (!lengths) return size;
  const int64_t value = lengths.as<int64_t>()[problem * lengths.stride[0]];
  return value < 0 ? 0 : value < size ? value : size;
}

// The mass of problem's marginal, NaN where an entry is negative or not finite.
template <class T>
double mass(const View& marginal, int64_t problem, int64_t size) {
  const T* entries = marginal.as<T>() + problem * marginal.stride[0];
  double sum = 0;
  T low = T(0);
  for (int64_t i = 0; i < size; ++i) {
    sum += static_cast<double>(entries[i]);
    low = entries[i] < low ? entries[i] : low;
  }
  return low < T(0) || !std::isfinite(sum) ? NAN : sum;
}

double mass_of(const View& marginal, const View& lengths, int64_t problem) {
  if (!marginal) return 1;
  const int64_t size = length(lengths, problem, marginal.shape[1]);
  return marginal.dtype == DType::kFloat64 ? mass<double>(marginal, problem, size)
                                           : mass<float>(marginal, problem, size);
}

bool is_empty(const View& marginal, const View& lengths, int64_t problem) {
  if (lengths) return lengths.as<int64_t>()[problem * lengths.stride[0]] <= 0;
  return marginal && marginal.shape[1] == 0;
}

}  // namespace

bool marginals_fit(const View& a, const View& b, const View& student_lengths,
                   const View& teacher_lengths, bool balanced) {
  for (const View* view : {&a, &b}) {
    if (!*view) continue;
    KD_CHECK(view->ndim == 2, "marginals: expected (B, size), got ", shape_text(*view));
    KD_CHECK(view->dtype == DType::kFloat32 || view->dtype == DType::kFloat64,
             "marginals: expected float32 or float64, got ", name(view->dtype));
    KD_CHECK(view->shape[1] <= 1 || view->stride[1] == 1, "marginals: expected last stride 1");
  }
  const int64_t batch = a ? a.shape[0] : b ? b.shape[0] : 0;
  for (int64_t problem = 0; problem < batch; ++problem) {
    const double mass_a = mass_of(a, student_lengths, problem);
    const double mass_b = mass_of(b, teacher_lengths, problem);
    if (!(mass_a >= 0) || !(mass_b >= 0)) return false;
    // An empty problem has no mass on that side.
    if (!balanced || is_empty(a, student_lengths, problem) ||
        is_empty(b, teacher_lengths, problem)) {
      continue;
    }
    // Masses made in half precision differ by its rounding.
    if (std::abs(mass_a - mass_b) > 1e-3 * std::fmax(mass_a, mass_b)) return false;
  }
  return true;
}

}  // namespace kd::cpu
