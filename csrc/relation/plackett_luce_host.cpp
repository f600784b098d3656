// CPU: a row at a time, rows in parallel, in double.
#include <vector>

#include "common/parallel.h"
#include "relation/plackett_luce_check.h"

namespace kd::cpu {
namespace {

template <class T, class F>
void run_rows(const PlackettLuceArgs& a, int64_t begin, int64_t end) {
  const int64_t count = a.order.shape[1], width = a.scores.shape[1];
  std::vector<double> suffix(static_cast<size_t>(count) + 1);
  for (int64_t r = begin; r < end; ++r) {
    const T* scores = a.scores.as<const T>() + r * a.scores.stride[0];
    const int64_t* order = a.order.as<const int64_t>() + r * a.order.stride[0];
    const F* weights = a.weights ? a.weights.as<const F>() + r * a.weights.stride[0] : nullptr;
    double value = 0;
    SuffixLse running;
    suffix[static_cast<size_t>(count)] = -kInfinity;
    for (int64_t k = count - 1; k >= 0; --k) {
      KD_CHECK(order[k] >= 0 && order[k] < width, "order: expected ids in [0, ", width, "), got ",
               order[k], " in row ", r);
      const double score = static_cast<double>(to_float(scores[order[k]]));
      const double weight = weights ? static_cast<double>(weights[k]) : 1.0;
      running.push(score);
      suffix[static_cast<size_t>(k)] = running.lse;
      if (weight != 0) value += weight * (running.lse - score);
    }
    a.value.as<double>()[r * a.value.stride[0]] = value;
    if (!a.gradient) continue;
    F* gradient = a.gradient.as<F>() + r * a.gradient.stride[0];
    double prefix = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double score = static_cast<double>(to_float(scores[order[k]]));
      const double weight = weights ? static_cast<double>(weights[k]) : 1.0;
      const double here = suffix[static_cast<size_t>(k)];
      prefix += weight;
      const double chance = score == -kInfinity ? 0.0 : exp(score - here);
      gradient[order[k]] = static_cast<F>(prefix * chance - weight);
      const double next = suffix[static_cast<size_t>(k) + 1];
      prefix *= here == -kInfinity ? 1.0 : exp(next - here);
    }
  }
}

}  // namespace

void plackett_luce(const PlackettLuceArgs& a) {
  check_plackett_luce(a);
  dispatch_float(a.scores.dtype, "student", [&](auto zero) {
    using T = decltype(zero);
    using F = typename std::conditional<std::is_same<T, double>::value, double, float>::type;
    parallel_for(0, a.scores.shape[0], 1,
                 [&](int64_t begin, int64_t end) { run_rows<T, F>(a, begin, end); });
  });
}

}  // namespace kd::cpu
