// Row top-k on CPU lanes, with the row's mean and deviation, in one read of memory. For sources
// that are compiled once per ISA.
//
// Almost every vector of a long row lies below the current k-th best, so the loop is one comparison
// a vector; the few entries above it go to a buffer that is cut back to k by quickselect when full.
#pragma once

#include "common/simd.h"
#include "common/topk.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

template <class S>
class TopKBuffer {
 public:
  // Memory for `k` kept and as many waiting entries.
  static int64_t capacity(int64_t k) { return 2 * k + 16; }

  TopKBuffer(int64_t k, S* values, int32_t* indices)  // both: capacity(k) entries
      : k_(k), capacity_(capacity(k)), values_(values), indices_(indices) {}

  // Entries with x <= limit() need not be pushed. -inf never is (see finish).
  S limit() const { return limit_; }

  // Indices must ascend from call to call.
  void push(S value, int64_t index) {
    if (k_ <= kSortedK) return insert(value, static_cast<int32_t>(index));
    values_[size_] = value;
    indices_[size_] = static_cast<int32_t>(index);
    if (++size_ == capacity_) cut();
  }

  // The k first entries in order. `row` fills up with its first -inf entries where fewer than k
  // others were there; those lie within the first 2 k entries then.
  template <class T>
  void finish(const T* row, int64_t n) {
    if (k_ > kSortedK) {
      if (size_ > k_) cut();
      sort();
    }
    for (int64_t i = 0; size_ < k_ && i < n; ++i) {
      const S x = static_cast<S>(to_float(row[i]));
      if (x != S(-kInfinity)) continue;
      values_[size_] = x;
      indices_[size_++] = static_cast<int32_t>(i);
    }
  }

 private:
  // Up to here a sorted list beats the buffer: its limit is never stale, and moving a few entries
  // costs less than a quickselect.
  static constexpr int64_t kSortedK = 64;

  void insert(S value, int32_t index) {
    const int64_t last = k_ - 1;
    // Only a NaN behind k others comes here and is not taken.
    if (size_ == k_ && !comes_before(value, index, values_[last], indices_[last])) return;
    int64_t at = size_ < k_ ? size_++ : last;
    for (; at > 0 && comes_before(value, index, values_[at - 1], indices_[at - 1]); --at) {
      values_[at] = values_[at - 1];
      indices_[at] = indices_[at - 1];
    }
    values_[at] = value;
    indices_[at] = index;
    if (size_ == k_) limit_ = limit_of(values_[last]);
  }

  bool before(int64_t i, int64_t j) const {
    return comes_before(values_[i], indices_[i], values_[j], indices_[j]);
  }
  void swap(int64_t i, int64_t j) {
    const S value = values_[i];
    const int32_t index = indices_[i];
    values_[i] = values_[j];
    indices_[i] = indices_[j];
    values_[j] = value;
    indices_[j] = index;
  }

  // Keeps the k first of all entries, in no order, and learns the new limit.
  void cut() {
    int64_t low = 0, high = size_ - 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (before(middle, low)) swap(middle, low);
      if (before(high, low)) swap(high, low);
      if (before(high, middle)) swap(high, middle);
      const S value = values_[middle];
      const int32_t index = indices_[middle];
      int64_t i = low, j = high;
      while (i <= j) {
        while (comes_before(values_[i], indices_[i], value, index)) ++i;
        while (comes_before(value, index, values_[j], indices_[j])) --j;
        if (i <= j) swap(i++, j--);
      }
      if (k_ - 1 <= j) {
        high = j;
      } else if (k_ - 1 >= i) {
        low = i;
      } else {
        break;
      }
    }
    size_ = k_;
    limit_ = limit_of(values_[k_ - 1]);  // quickselect leaves the k-th entry in its place
  }

  // Heapsort: no recursion, no extra memory.
  void sort() {
    for (int64_t root = size_ / 2 - 1; root >= 0; --root) sift(root, size_);
    for (int64_t end = size_ - 1; end > 0; --end) {
      swap(0, end);
      sift(0, end);
    }
  }
  void sift(int64_t root, int64_t end) {
    for (int64_t child = 2 * root + 1; child < end; child = 2 * root + 1) {
      if (child + 1 < end && before(child, child + 1)) ++child;
      if (!before(root, child)) return;
      swap(root, child);
      root = child;
    }
  }

  int64_t k_, capacity_;
  S* values_;
  int32_t* indices_;
  int64_t size_ = 0;
  S limit_ = S(-kInfinity);
};

namespace detail {

// Entries of a block, so that its second look comes from the nearest cache.
constexpr int64_t kScanBlock = 2048;
// The hardware's prefetcher stops at each page; this far ahead a row streams as fast as memory
// does.
constexpr size_t kScanAhead = 8192;
constexpr size_t kCacheLine = 64;

// A block's moments with -inf left out; NaN and +inf make them NaN. Two looks, any values.
template <class T>
Moments<double> careful_moments(const T* block, int64_t n) {
  using V = Lanes<T>;
  constexpr int64_t kStep = V::kLanes;
  const V lowest(static_cast<typename V::Scalar>(-kInfinity));
  double sum = 0, count = 0, squares = 0;
  for (int64_t i = 0; i < n; i += kStep) {
    const V x = V::load_partial(block + i, n - i < kStep ? n - i : kStep, -kInfinity);
    const auto alive = x != lowest;
    sum += reduce_add_double(select(alive, x, V::zero()));
    count += reduce_add_double(select(alive, V(1), V::zero()));
  }
  if (count == 0) return {};
  const V centre(static_cast<typename V::Scalar>(sum / count));
  double rest = 0;
  for (int64_t i = 0; i < n; i += kStep) {
    const V x = V::load_partial(block + i, n - i < kStep ? n - i : kStep, -kInfinity);
    const V d = select(x != lowest, x - centre, V::zero());
    rest += reduce_add_double(d);
    squares += reduce_add_double(d * d);
  }
  // The centre is the mean up to a rounding; what it misses is `rest`.
  const double mean = static_cast<double>(static_cast<typename V::Scalar>(sum / count));
  return {count, mean + rest / count, squares - rest * rest / count};
}

// Moments of a block from sums of d = x - pivot; not `exact` where that would cancel.
struct ShiftedMoments {
  Moments<double> moments;
  bool exact;
};
KD_LANES ShiftedMoments shifted_moments(double n, double pivot, double sum, double squares) {
  const double lost = sum * sum / n;  // squares about the pivot that are not about the mean
  // Sums of floats carry a relative error of about 1e-6; half of `squares` lost doubles it.
  const bool finite = squares - squares == 0;
  return {{n, pivot + sum / n, squares - lost}, finite && lost <= 0.5 * squares};
}

}  // namespace detail

// One row of n entries into `top`; with kMoments also its moments.
template <bool kMoments, class T, class S>
void scan_row(const T* row, int64_t n, TopKBuffer<S>& top, Moments<double>& moments) {
  using V = Lanes<T>;
  constexpr int64_t kStep = 4 * V::kLanes;
  for (int64_t begin = 0; begin < n; begin += detail::kScanBlock) {
    const T* block = row + begin;
    const int64_t size = n - begin < detail::kScanBlock ? n - begin : detail::kScanBlock;
    // Blocks of a row are alike: the mean so far is close to this block's, so one look is enough.
    const S pivot = static_cast<S>(moments.mean);
    V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    V squares[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    V limit(top.limit());
    int64_t i = 0;
    for (; i + kStep <= size; i += kStep) {
      V x[4];
      for (int u = 0; u < 4; ++u) x[u] = V::load(block + i + u * V::kLanes);
      for (size_t at = 0; at < kStep * sizeof(T); at += detail::kCacheLine) {
        prefetch(reinterpret_cast<const char*>(block + i) + detail::kScanAhead + at);
      }
      if constexpr (kMoments) {
        for (int u = 0; u < 4; ++u) {
          const V d = x[u] - V(pivot);
          sums[u] += d;
          squares[u] = fma(d, d, squares[u]);
        }
      }
      const auto below = (x[0] <= limit) & (x[1] <= limit) & (x[2] <= limit) & (x[3] <= limit);
      if (__builtin_expect(all(below), 1)) continue;
      for (int u = 0; u < 4; ++u) {
        if (all(x[u] <= limit)) continue;
        for (int64_t j = i + u * V::kLanes; j < i + (u + 1) * V::kLanes; ++j) {
          const S value = static_cast<S>(to_float(block[j]));
          if (!(value <= top.limit())) top.push(value, begin + j);
        }
      }
      limit = V(top.limit());
    }
    double sum = 0, square = 0;
    for (; i < size; ++i) {
      const S value = static_cast<S>(to_float(block[i]));
      if (!(value <= top.limit())) top.push(value, begin + i);
      const double d = static_cast<double>(value) - static_cast<double>(pivot);
      sum += d;
      square += d * d;
    }
    if constexpr (kMoments) {
      sum += reduce_add_double((sums[0] + sums[1]) + (sums[2] + sums[3]));
      square += reduce_add_double((squares[0] + squares[1]) + (squares[2] + squares[3]));
      const detail::ShiftedMoments shifted =
          detail::shifted_moments(static_cast<double>(size), pivot, sum, square);
      moments.merge(shifted.exact ? shifted.moments : detail::careful_moments(block, size));
    }
  }
  top.finish(row, n);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
