// Row top-k: the order every backend selects in, and the moments of a row that come out of the same
// read. The scans themselves are topk_rows.h (CPU lanes) and topk.cuh (one CUDA block a row).
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/scalar.h"

namespace kd {

// The largest k that the scans' buffers are laid out for.
constexpr int64_t kMaxTopK = 4096;

// Whether entry (a, i) is taken before entry (b, j): NaN first, as torch.topk does, then the larger
// value, then the lower index. It is a total order, so a selection does not depend on how the row
// was cut into threads.
template <class S>
KD_HOST_DEVICE bool comes_before(S a, int64_t i, S b, int64_t j) {
  if (is_nan(a) || is_nan(b)) return is_nan(a) && is_nan(b) ? i < j : is_nan(a);
  return a > b || (a == b && i < j);
}

// A later entry x can displace the k-th best only if !(x <= limit_of(k-th best)). Behind a NaN
// nothing but another NaN could, and that one loses by its index.
template <class S>
KD_HOST_DEVICE S limit_of(S kth) {
  return is_nan(kth) ? S(kInfinity) : kth;
}

// Count, mean and sum of squared deviations; -inf entries (masked vocabulary) are left out before.
template <class S>
struct Moments {
  S count = S(0);
  S mean = S(0);
  S squares = S(0);  // sum (x - mean)^2

  Moments() = default;
  KD_HOST_DEVICE Moments(S n, S m, S q) : count(n), mean(m), squares(q) {}

  // Chan's update: no cancellation, however far the mean is from zero.
  KD_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == S(0)) return;
    const S total = count + other.count;
    const S share = other.count / total;
    const S delta = other.mean - mean;
    mean += delta * share;
    squares += other.squares + delta * delta * count * share;
    count = total;
  }

  // Population standard deviation; 0 for no entries.
  KD_HOST_DEVICE S deviation() const { return count == S(0) ? S(0) : sqrt(squares / count); }
};

}  // namespace kd
