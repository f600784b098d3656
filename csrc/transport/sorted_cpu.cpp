// Sorted transport of one row pair. 16-bit logits have at most 65536 values: counting them sorts
// them, and the gradient is a table over values. Wider logits are sorted by radix, keys alone; the
// sign of an entry is found from the few keys at which the sign changes, so no index is carried.
#include "transport/sorted_cpu.h"

#include "common/scalar.h"
#include "common/simd.h"
#include "transport/transport_math.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

template <class F>
KD_LANES F quiet_nan() {
  return static_cast<F>(__builtin_nanf(""));
}

template <class T, class F>
void fill_row(void* row, int64_t n, F value) {
  T* out = static_cast<T*>(row);
  const T one = cast<T>(static_cast<std::conditional_t<sizeof(T) == 8, double, float>>(value));
  for (int64_t k = 0; k < n; ++k) out[k] = one;
}

template <class F>
void fill_gradient(const SortedRow& row, F value) {
  if (row.gradient == nullptr) return;
  const int64_t n = row.student.columns;
  switch (row.student.dtype) {
    case DType::kFloat16:
      return fill_row<f16>(row.gradient, n, value);
    case DType::kBFloat16:
      return fill_row<bf16>(row.gradient, n, value);
    case DType::kFloat64:
      return fill_row<double>(row.gradient, n, value);
    default:
      return fill_row<float>(row.gradient, n, value);
  }
}

// What a row without a finite distribution gives. True: the row is done.
template <class F>
bool settle(SortedRow& row, F student_max, F student_sum, F teacher_max, F teacher_sum) {
  const F lowest = F(-kInfinity);
  if (teacher_max == lowest && teacher_sum == F(0)) {
    row.value = row.student_slope = row.teacher_slope = 0;
    fill_gradient(row, F(0));
    return true;
  }
  const bool dead = student_max == lowest && student_sum == F(0);
  const bool fine = (dead || student_sum > F(0)) && teacher_sum > F(0);
  if (fine && !is_inf(student_sum) && !is_inf(teacher_sum)) return false;
  row.value = row.student_slope = row.teacher_slope = quiet_nan<double>();
  fill_gradient(row, quiet_nan<F>());
  return true;
}

// ---- 16 bits: histograms -----------------------------------------------------------------------

// Larger value, smaller key; -0 right behind +0, positive NaN first, negative NaN last.
KD_LANES uint32_t half_key(uint16_t bits) {
  return static_cast<uint16_t>(bits ^ (bits & 0x8000 ? 0 : 0x7fff));
}
constexpr uint32_t kPlusZero = 0x7fff, kMinusZero = 0x8000;

template <class T>
float from_half_key(uint32_t key) {
  const uint16_t bits = static_cast<uint16_t>(key & 0x8000 ? key : key ^ 0x7fff);
  T value;
  memcpy(&value, &bits, 2);
  return to_float(value);
}

// The distinct values of a row in descending order: key, count, 2^((x - top) k).
struct Runs {
  uint32_t* keys;
  uint32_t* counts;
  float* e;
  int64_t size;
  float top;
  double sum;  // of count e
};

void count_keys(const SortedSide& side, uint32_t* counts, bool excluded) {
  const uint16_t* row = static_cast<const uint16_t*>(side.row);
  memset(counts, 0, kSortedBins * sizeof(uint32_t));
  if (side.excluded == nullptr) {
    for (int64_t k = 0; k < side.columns; ++k) ++counts[half_key(row[k])];
  } else {
    for (int64_t k = 0; k < side.columns; ++k) {
      counts[half_key(row[k])] += (side.excluded[k] != 0) == excluded;
    }
  }
  counts[kPlusZero] += counts[kMinusZero];
  counts[kMinusZero] = 0;
}

// Collects the counts that are not zero; NaN makes the sum NaN.
template <class T>
void collect(const uint32_t* counts, double k, Runs& runs) {
  constexpr int kStep = 16;
  runs.size = 0;
  for (int64_t key = 0; key < kSortedBins; key += kStep) {
    uint64_t words[kStep / 2], any = 0;
    memcpy(words, counts + key, sizeof(words));
    for (uint64_t word : words) any |= word;
    if (any == 0) continue;
    for (int64_t one = key; one < key + kStep; ++one) {
      if (counts[one] == 0) continue;
      runs.keys[runs.size] = static_cast<uint32_t>(one);
      runs.counts[runs.size] = counts[one];
      runs.e[runs.size] = from_half_key<T>(static_cast<uint32_t>(one));
      ++runs.size;
    }
  }
  runs.sum = 0;
  runs.top = runs.size > 0 ? runs.e[0] : static_cast<float>(-kInfinity);
  // NaN keys lie at both ends.
  if (runs.size > 0 && (kd::is_nan(runs.e[0]) || kd::is_nan(runs.e[runs.size - 1]))) {
    runs.sum = quiet_nan<double>();
    return;
  }
  const float reference = is_inf(runs.top) ? 0.0f : runs.top;
  for (int64_t r = 0; r < runs.size; r += VecF::kLanes) {
    const int64_t left = runs.size - r;
    const VecF x = VecF::load_partial(runs.e + r, left < VecF::kLanes ? left : VecF::kLanes, 0.0f);
    const VecF e = exp2((x - VecF(reference)) * VecF(static_cast<float>(k)));
    store_partial(runs.e + r, e, left < VecF::kLanes ? left : VecF::kLanes);
  }
  for (int64_t r = 0; r < runs.size; ++r)
    runs.sum += static_cast<double>(runs.e[r]) * runs.counts[r];
}

// The row's runs without the excluded entries, which still count in the normaliser.
template <class T>
void read_half(const SortedSide& side, uint32_t* counts, Runs& runs) {
  const double k = kLog2E / side.temperature;
  Runs out = runs;
  out.sum = 0;
  out.size = 0;
  out.top = static_cast<float>(-kInfinity);
  if (side.excluded != nullptr) {
    count_keys(side, counts, true);
    collect<T>(counts, k, out);
  }
  const float other_top = out.top;
  const double other_sum = out.sum;
  count_keys(side, counts, false);
  collect<T>(counts, k, runs);
  if (side.excluded == nullptr) return;
  const float top = runs.top > other_top ? runs.top : other_top;
  if (top == -kInfinity) return;
  const auto moved = [&](float from) {
    return from == -kInfinity ? 0.0 : kd::exp2((static_cast<double>(from) - top) * k);
  };
  const double factor = moved(runs.top);
  for (int64_t r = 0; r < runs.size; ++r) runs.e[r] = static_cast<float>(runs.e[r] * factor);
  runs.sum = runs.sum * factor + other_sum * moved(other_top);
  runs.top = top;
}

void half(SortedRow& row) {
  uint32_t* memory = reinterpret_cast<uint32_t*>(row.scratch);
  const auto take = [&] {
    uint32_t* out = memory;
    memory += kSortedBins;
    return out;
  };
  uint32_t* counts = take();
  uint16_t* table = reinterpret_cast<uint16_t*>(take());
  float* signs = reinterpret_cast<float*>(take());
  Runs s{take(), take(), reinterpret_cast<float*>(take()), 0, 0, 0};
  Runs t{take(), take(), reinterpret_cast<float*>(take()), 0, 0, 0};
  const bool b = row.student.dtype == DType::kBFloat16;
  (b ? &read_half<bf16> : &read_half<f16>)(row.student, counts, s);
  (row.teacher.dtype == DType::kBFloat16 ? &read_half<bf16> : &read_half<f16>)(row.teacher, counts,
                                                                               t);
  if (settle<double>(row, s.top, s.sum, t.top, t.sum)) return;
  const double unit_s = s.sum > 0 ? 1 / s.sum : 0, unit_t = 1 / t.sum;
  const double scale_s = row.student.scale * unit_s, scale_t = row.teacher.scale * unit_t;

  // Two run-length lists walked together: `take` ranks at a time share both values.
  double value = 0, slope_s = 0, slope_t = 0, sum_of_signs = 0;
  int64_t i = 0, j = 0;
  int64_t left_s = s.size > 0 ? s.counts[0] : 0, left_t = t.size > 0 ? t.counts[0] : 0;
  while (i < s.size || j < t.size) {
    const bool in_s = i < s.size, in_t = j < t.size;
    const int64_t ranks = !in_s ? left_t : !in_t || left_s < left_t ? left_s : left_t;
    const double p = in_s ? s.e[i] : 0.0, q = in_t ? t.e[j] : 0.0;
    const double difference = scale_s * p - scale_t * q;
    const double sign = (difference > 0) - (difference < 0);
    const double weight = static_cast<double>(ranks) * sign;
    value += weight * difference;
    slope_s += weight * p;
    slope_t -= weight * q;
    sum_of_signs += weight;
    left_s -= ranks;
    left_t -= ranks;
    if (in_s && left_s == 0) {
      signs[i] = static_cast<float>(sum_of_signs / s.counts[i]);
      sum_of_signs = 0;
      if (++i < s.size) left_s = s.counts[i];
    }
    if (in_t && left_t == 0 && ++j < t.size) left_t = t.counts[j];
  }
  row.value = value;
  row.student_slope = slope_s * unit_s;
  row.teacher_slope = slope_t * unit_t;
  if (row.gradient == nullptr) return;

  // The gradient is a function of the logit: one entry of a table for each distinct value.
  const float slope = static_cast<float>(row.student_slope);
  const float factor = static_cast<float>(row.coefficient * scale_s / row.student.temperature);
  const auto bits_of = [&](float x) {
    uint16_t bits;
    const bf16 as_b = cast<bf16>(x);
    const f16 as_f = cast<f16>(x);
    memcpy(&bits, b ? static_cast<const void*>(&as_b) : static_cast<const void*>(&as_f), 2);
    return bits;
  };
  for (int64_t r = 0; r < s.size; ++r)
    table[s.keys[r]] = bits_of(factor * s.e[r] * (signs[r] - slope));
  table[kMinusZero] = table[kPlusZero];
  const SortedSide& side = row.student;
  const uint16_t* z = static_cast<const uint16_t*>(side.row);
  uint16_t* out = static_cast<uint16_t*>(row.gradient);
  for (int64_t k = 0; k < side.columns; ++k) out[k] = table[half_key(z[k])];
  for (int64_t k = 0; side.excluded != nullptr && k < side.columns; ++k) {
    if (side.excluded[k] == 0) continue;
    const float x = (b ? &from_half_key<bf16> : &from_half_key<f16>)(half_key(z[k]));
    const float e = kd::exp2((x - s.top) * static_cast<float>(kLog2E / side.temperature));
    out[k] = bits_of(-factor * slope * e);
  }
}

// ---- wider: radix sort -------------------------------------------------------------------------

template <class F>
struct KeyOf {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;

// Ascending, least significant digit first; returns the buffer that holds the result. One read
// makes the counts of every digit; a digit that all keys share costs nothing.
template <class Key>
Key* radix_sort(Key* keys, Key* other, int64_t n) {
  constexpr int kPasses = (8 * static_cast<int>(sizeof(Key)) + kDigitBits - 1) / kDigitBits;
  uint32_t counts[kPasses][kDigits];
  memset(counts, 0, sizeof(counts));
  for (int64_t i = 0; i < n; ++i) {
    for (int pass = 0; pass < kPasses; ++pass) {
      ++counts[pass][(keys[i] >> (pass * kDigitBits)) & (kDigits - 1)];
    }
  }
  for (int pass = 0; pass < kPasses && n > 0; ++pass) {
    uint32_t* count = counts[pass];
    const int shift = pass * kDigitBits;
    if (count[(keys[0] >> shift) & (kDigits - 1)] == n) continue;
    uint32_t start = 0;
    for (int digit = 0; digit < kDigits; ++digit) {
      const uint32_t size = count[digit];
      count[digit] = start;
      start += size;
    }
    for (int64_t i = 0; i < n; ++i) other[count[(keys[i] >> shift) & (kDigits - 1)]++] = keys[i];
    Key* swap = keys;
    keys = other;
    other = swap;
  }
  return keys;
}

template <class F>
struct WideSide {
  const F* values;
  int64_t kept;
  F top, sum, k;
};

// The row as F (converted into `buffer` where it is not), its maximum, its normaliser, its keys.
template <class V, class Key>
WideSide<typename V::Scalar> read_side(const SortedSide& side, typename V::Scalar* buffer,
                                       Key* keys) {
  using F = typename V::Scalar;
  WideSide<F> out{};
  const int64_t n = side.columns;
  const auto convert = [&](auto* row) {
    for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<F>(to_float(row[j]));
    out.values = buffer;
  };
  if (side.dtype == DType::kFloat16) {
    convert(static_cast<const f16*>(side.row));
  } else if (side.dtype == DType::kBFloat16) {
    convert(static_cast<const bf16*>(side.row));
  } else {
    out.values = static_cast<const F*>(side.row);
  }
  out.k = static_cast<F>(kLog2E / side.temperature);
  V top(F(-kInfinity));
  for (int64_t j = 0; j < n; j += V::kLanes) {
    const int64_t left = n - j;
    top = max(left >= V::kLanes ? V::load(out.values + j)
                                : V::load_partial(out.values + j, left, F(-kInfinity)),
              top);
  }
  out.top = reduce_max(top);
  const F reference = out.top == F(-kInfinity) ? F(0) : out.top;
  // Blocks, added as doubles: the rounding does not grow with the vocabulary.
  double total = 0;
  for (int64_t block = 0; block < n; block += 1024) {
    const int64_t end = block + 1024 < n ? block + 1024 : n;
    V sum = V::zero();
    for (int64_t j = block; j < end; j += V::kLanes) {
      const int64_t left = end - j;
      const V z = left >= V::kLanes ? V::load(out.values + j)
                                    : V::load_partial(out.values + j, left, F(-kInfinity));
      sum += exp2((z - V(reference)) * V(out.k));
    }
    total += static_cast<double>(reduce_add(sum));
  }
  out.sum = static_cast<F>(total);
  if (side.excluded == nullptr) {
    for (int64_t j = 0; j < n; ++j) keys[j] = descending_key(out.values[j]);
    out.kept = n;
  } else {
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
      keys[kept] = descending_key(out.values[j]);
      kept += side.excluded[j] == 0;
    }
    out.kept = kept;
  }
  return out;
}

// Where the sign of p_(r) - q_(r) changes, in descending order of the student's logits: entries
// from `from` down have `sign`.
template <class F>
struct SignRuns {
  F* from;
  F* sign;
  int64_t size = 0;

  KD_LANES void add(F z, F s) {
    if (size > 0 && from[size - 1] == z) --size;
    if (size > 0 && sign[size - 1] == s) return;
    from[size] = z;
    sign[size] = s;
    ++size;
  }
};

template <class F>
KD_LANES F sign_of(F x) {
  return x > F(0) ? F(1) : x < F(0) ? F(-1) : F(0);
}

// The sign of a logit among many runs: a table of equal steps says where to begin to look.
template <class F>
struct RunFinder {
  static constexpr int64_t kSteps = 2048;
  const SignRuns<F>& runs;
  F lowest = F(0), per_step = F(0);
  int32_t begin[kSteps];

  explicit RunFinder(const SignRuns<F>& runs) : runs(runs) {
    if (runs.size == 0) return;
    // -inf, the last run's bound where the tail has no mass, is below every step.
    int64_t last = runs.size - 1;
    while (last > 0 && is_inf(runs.from[last])) --last;
    lowest = runs.from[last];
    const F range = runs.from[0] - lowest;
    per_step = range > F(0) ? F(kSteps - 1) / range : F(0);
    int64_t run = 0;
    for (int64_t step = kSteps - 1; step >= 0; --step) {
      // One step of slack for the rounding of the position.
      const F top = per_step > F(0) ? lowest + static_cast<F>(step + 2) / per_step : runs.from[0];
      while (run + 1 < runs.size && runs.from[run + 1] >= top) ++run;
      begin[step] = static_cast<int32_t>(run);
    }
  }
  KD_LANES F operator()(F z) const {
    const F position = (z - lowest) * per_step;
    const int64_t step = position > F(0) ? static_cast<int64_t>(position) : 0;
    int64_t run = begin[step < kSteps ? step : kSteps - 1];
    while (run + 1 < runs.size && runs.from[run + 1] >= z) ++run;
    return runs.sign[run];
  }
};

template <class V, class T>
void write_gradient(const SortedRow& row, const WideSide<typename V::Scalar>& side,
                    const SignRuns<typename V::Scalar>& runs, double slope, double unit) {
  using F = typename V::Scalar;
  T* out = static_cast<T*>(row.gradient);
  const F factor =
      static_cast<F>(row.coefficient * row.student.scale / row.student.temperature * unit);
  const F reference = side.top == F(-kInfinity) ? F(0) : side.top;
  const int64_t n = row.student.columns;
  // Few runs: compare with every boundary, a vector at a time. Many: look them up.
  const bool few = runs.size <= 16;
  RunFinder<F> finder(runs);
  for (int64_t j = 0; j < n; j += V::kLanes) {
    const int64_t left = n - j < V::kLanes ? n - j : V::kLanes;
    const V z =
        left == V::kLanes ? V::load(side.values + j) : V::load_partial(side.values + j, left, F(0));
    V sign = V::zero();
    if (few) {
      for (int64_t run = 0; run < runs.size; ++run) {
        sign = select(z <= V(runs.from[run]), V(runs.sign[run]), sign);
      }
    } else {
      F signs[V::kLanes] = {};
      for (int64_t lane = 0; lane < left; ++lane) signs[lane] = finder(side.values[j + lane]);
      sign = V::load(signs);
    }
    if (row.student.excluded != nullptr) {
      F keep[V::kLanes] = {};
      for (int64_t lane = 0; lane < left; ++lane)
        keep[lane] = row.student.excluded[j + lane] ? F(0) : F(1);
      sign = sign * V::load(keep);
    }
    const V e = exp2((z - V(reference)) * V(side.k));
    const V g = e * V(factor) * (sign - V(static_cast<F>(slope)));
    if (left == V::kLanes) {
      store(out + j, g);
    } else {
      store_partial(out + j, g, left);
    }
  }
}

// Sorted keys to 2^((x - max) k), zeros behind up to `length`.
template <class V, class Key>
void exponentials(const Key* keys, const WideSide<typename V::Scalar>& side, int64_t length,
                  typename V::Scalar* out) {
  using F = typename V::Scalar;
  const F reference = side.top == F(-kInfinity) ? F(0) : side.top;
  for (int64_t r = 0; r < side.kept; ++r) out[r] = from_descending_key(keys[r]);
  for (int64_t r = 0; r < side.kept; r += V::kLanes) {
    const int64_t left = side.kept - r;
    if (left >= V::kLanes) {
      store(out + r, exp2((V::load(out + r) - V(reference)) * V(side.k)));
    } else {
      const V z = V::load_partial(out + r, left, F(0));
      store_partial(out + r, exp2((z - V(reference)) * V(side.k)), left);
    }
  }
  for (int64_t r = side.kept; r < length; ++r) out[r] = F(0);
}

template <class V>
void wide(SortedRow& row) {
  using F = typename V::Scalar;
  using Key = typename KeyOf<F>::type;
  const int64_t longer =
      (row.student.columns > row.teacher.columns ? row.student.columns : row.teacher.columns) + 16;
  char* memory = reinterpret_cast<char*>(row.scratch);
  const auto take = [&] {
    char* out = memory;
    memory += static_cast<size_t>(longer) * sizeof(F);
    return out;
  };
  F* buffer_s = reinterpret_cast<F*>(take());
  F* buffer_t = reinterpret_cast<F*>(take());
  Key* keys_s = reinterpret_cast<Key*>(take());
  Key* keys_t = reinterpret_cast<Key*>(take());
  Key* other = reinterpret_cast<Key*>(take());
  F* run_from = reinterpret_cast<F*>(take());
  F* run_sign = reinterpret_cast<F*>(take());

  WideSide<F> s = read_side<V>(row.student, buffer_s, keys_s);
  WideSide<F> t = read_side<V>(row.teacher, buffer_t, keys_t);
  if (settle<F>(row, s.top, s.sum, t.top, t.sum)) return;
  // The teacher first: its exponentials take the place of its floats, `other` is free again.
  const int64_t length = s.kept > t.kept ? s.kept : t.kept;
  Key* sorted_t = radix_sort(keys_t, other, t.kept);
  F* et = buffer_t;
  exponentials<V>(sorted_t, t, length, et);
  Key* spare = sorted_t == keys_t ? other : keys_t;
  Key* sorted_s = radix_sort(keys_s, spare, s.kept);
  F* es = reinterpret_cast<F*>(sorted_t);
  exponentials<V>(sorted_s, s, length, es);

  const double unit_s = s.sum > F(0) ? 1.0 / static_cast<double>(s.sum) : 0;
  const double unit_t = 1.0 / static_cast<double>(t.sum);
  const F as = static_cast<F>(row.student.scale * unit_s);
  const F at = static_cast<F>(row.teacher.scale * unit_t);
  double value = 0, slope_s = 0, slope_t = 0;
  SignRuns<F> runs{run_from, run_sign};
  const bool want = row.gradient != nullptr;
  F current = F(2);  // no sign yet
  for (int64_t block = 0; block < length; block += 1024) {
    const int64_t end = block + 1024 < length ? block + 1024 : length;
    V sum = V::zero(), with_s = V::zero(), with_t = V::zero();
    for (int64_t r = block; r < end; r += V::kLanes) {
      const int64_t left = end - r;
      const V x = left >= V::kLanes ? V::load(es + r) : V::load_partial(es + r, left, F(0));
      const V y = left >= V::kLanes ? V::load(et + r) : V::load_partial(et + r, left, F(0));
      const V difference = x * V(as) - y * V(at);
      const V sign = select(difference > V::zero(), V(F(1)),
                            select(difference < V::zero(), V(F(-1)), V::zero()));
      sum += abs(difference);
      with_s = fma(sign, x, with_s);
      with_t = fma(sign, y, with_t);
      if (!want || r >= s.kept || (left >= V::kLanes && all(sign == V(current)))) continue;
      const int64_t last = r + V::kLanes < s.kept ? r + V::kLanes : s.kept;
      for (int64_t i = r; i < last; ++i) {
        const F now = sign_of(es[i] * as - et[i] * at);
        if (now == current) continue;
        current = now;
        int64_t first = i, behind = i + 1;
        while (first > 0 && sorted_s[first - 1] == sorted_s[i]) --first;
        if (first == i) {
          runs.add(from_descending_key(sorted_s[i]), now);
          continue;
        }
        // Equal logits on both sides of a change share the mean of their signs; the ranks behind
        // them start a run of their own.
        while (behind < s.kept && sorted_s[behind] == sorted_s[i]) ++behind;
        F signs = F(0);
        for (int64_t k = first; k < behind; ++k) signs += sign_of(es[k] * as - et[k] * at);
        runs.add(from_descending_key(sorted_s[i]), signs / static_cast<F>(behind - first));
        current = behind < s.kept ? F(2) : now;
        i = behind - 1;
        if (i + 1 >= last && behind < s.kept) {
          runs.add(from_descending_key(sorted_s[behind]),
                   sign_of(es[behind] * as - et[behind] * at));
          current = runs.sign[runs.size - 1];
        }
      }
    }
    value += static_cast<double>(reduce_add(sum));
    slope_s += static_cast<double>(reduce_add(with_s));
    slope_t -= static_cast<double>(reduce_add(with_t));
  }
  row.value = value;
  row.student_slope = slope_s * unit_s;
  row.teacher_slope = slope_t * unit_t;
  if (!want) return;
  switch (row.student.dtype) {
    case DType::kFloat16:
      if constexpr (sizeof(F) == 4) write_gradient<V, f16>(row, s, runs, row.student_slope, unit_s);
      return;
    case DType::kBFloat16:
      if constexpr (sizeof(F) == 4)
        write_gradient<V, bf16>(row, s, runs, row.student_slope, unit_s);
      return;
    default:
      return write_gradient<V, F>(row, s, runs, row.student_slope, unit_s);
  }
}

constexpr SortedTable kTable = {&half, &wide<VecF>, &wide<VecD>};

}  // namespace

const SortedTable* sorted_table() {
  return &kTable;
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
