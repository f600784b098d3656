// Sorted transport on CUDA: one block a row pair. Rows of 16 bits are sorted by counting their
// values, wider ones by a stable radix sort of keys alone. Then rank r of both sides meets, and
// every entry finds its own ranks again by its key, so no index travels through the sort.
#include <algorithm>

#include "common/dispatch.h"
#include "common/launch.h"
#include "common/reduce.cuh"
#include "transport/sorted_checks.h"
#include "transport/transport_math.h"

namespace kd::cuda {
namespace {

constexpr int kThreads = 256;  // one digit value a thread in the radix sort
constexpr int kWarpCount = kThreads / 32;
constexpr int kBins = 65536;

template <class F>
struct KeyType {
  using type = uint32_t;
};
template <>
struct KeyType<double> {
  using type = uint64_t;
};

// One side of the row pairs.
template <class T, class F>
struct Side {
  const T* rows;
  int64_t stride;
  int columns;
  const F* scale;  // (N,) or null
  int64_t scale_stride;
  const uint8_t* excluded;
  F k;  // log2(e) / temperature
};

template <class F>
struct RowStatistics {
  F top, sum;
  int kept;
  KD_DEVICE F reference() const { return top == F(-kInfinity) ? F(0) : top; }
};

template <class TS, class TT, class F>
struct SortedData {
  Side<TS, F> student;
  Side<TT, F> teacher;
  int64_t rows;
  const uint8_t* mask;
  int64_t mask_stride;
  const F* coefficient;
  int64_t coefficient_stride;
  F *value, *slopes;
  TS* gradient;
  int64_t gradient_stride;
  F temperature;
  int32_t* workspace;
  int64_t workspace_size;
};

// ---- scans --------------------------------------------------------------------------------------

// Exclusive sum over the block's threads, and the total.
KD_DEVICE int block_scan(int value, int* total) {
  KD_SHARED(int[kWarpCount], sums);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(kFullMask, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kWarpCount; ++w) {
    if (w < warp) before += sums[w];
    all += sums[w];
  }
  __syncthreads();
  *total = all;
  return before + inclusive - value;
}

// out[i] = sum of of(0..i), inclusive; a contiguous piece a thread.
template <class Of>
KD_DEVICE void inclusive_scan(int n, int32_t* out, const Of& of) {
  const int piece = (n + kThreads - 1) / kThreads;
  const int begin =
      static_cast<int>(threadIdx.x) * piece < n ? static_cast<int>(threadIdx.x) * piece : n;
  const int end = begin + piece < n ? begin + piece : n;
  int sum = 0, total;
  for (int i = begin; i < end; ++i) sum += of(i);
  int running = block_scan(sum, &total);
  for (int i = begin; i < end; ++i) {
    running += of(i);
    out[i] = running;
  }
  __syncthreads();
}

// ---- sorting ------------------------------------------------------------------------------------

// Stable, ascending, eight bits a pass; returns the buffer that holds the result.
template <class Key>
KD_DEVICE Key* block_radix_sort(Key* keys, Key* other, int n) {
  KD_SHARED(int[kThreads], base);
  KD_SHARED(int[kWarpCount][kThreads], counts);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int shift = 0; shift < 8 * static_cast<int>(sizeof(Key)); shift += 8) {
    base[thread] = 0;
    __syncthreads();
    for (int i = thread; i < n; i += kThreads) atomicAdd(&base[(keys[i] >> shift) & 255], 1);
    __syncthreads();
    const int mine = base[thread];
    // A digit that all keys share moves nothing.
    if (__syncthreads_or(mine == n)) continue;
    int total;
    const int start = block_scan(mine, &total);
    base[thread] = start;
    __syncthreads();
    for (int tile = 0; tile < n; tile += kThreads) {
      const int i = tile + thread;
      const Key key = i < n ? keys[i] : Key(0);
      const int digit = i < n ? static_cast<int>((key >> shift) & 255) : 256;
      for (int w = 0; w < kWarpCount; ++w) counts[w][thread] = 0;
      __syncthreads();
      const unsigned same = __match_any_sync(kFullMask, digit);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (digit < 256 && rank == 0) counts[warp][digit] = __popc(same);
      __syncthreads();
      int running = base[thread];
      for (int w = 0; w < kWarpCount; ++w) {
        const int count = counts[w][thread];
        counts[w][thread] = running;
        running += count;
      }
      base[thread] = running;
      __syncthreads();
      if (digit < 256) other[counts[warp][digit] + rank] = key;
      __syncthreads();
    }
    Key* swap = keys;
    keys = other;
    other = swap;
  }
  return keys;
}

// Larger value, smaller key: the upper 16 bits of what a bf16 has as float; for f16 its own bits.
KD_DEVICE int half_bin(bf16 x) {
  return static_cast<int>(descending_key(to_float(x)) >> 16);
}
KD_DEVICE int half_bin(f16 x) {
  if (is_nan(to_float(x))) return kBins - 1;
  uint16_t bits;
  memcpy(&bits, &x, 2);
  if (bits == 0x8000) bits = 0;
  return bits & 0x8000 ? bits : 0xffff & ~(bits | 0x8000);
}
KD_DEVICE float from_half_bin(bf16, int bin) {
  return from_descending_key(static_cast<uint32_t>(bin) << 16 | (bin & 0x8000 ? 0u : 0xffffu));
}
KD_DEVICE float from_half_bin(f16, int bin) {
  const uint16_t bits = static_cast<uint16_t>(bin & 0x8000 ? bin : ~bin & 0x7fff);
  f16 x;
  memcpy(&x, &bits, 2);
  return to_float(x);
}

// First position in [0, n) whose entry is above (kAfter) or not below `key`.
template <bool kAfter, class Key>
KD_DEVICE int bound(const Key* sorted, int n, Key key) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (kAfter ? sorted[middle] <= key : sorted[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// A sorted row: the logit at a rank, the ranks of a logit. Counted where `kHalf`.
template <class T, class F, bool kHalf>
struct SortedRanks {
  using Key = typename KeyType<F>::type;
  const Key* keys;         // by rank, !kHalf
  const int32_t* counted;  // (kBins) inclusive counts, kHalf
  int kept;

  KD_DEVICE F at(int rank) const {
    if constexpr (kHalf) {
      return static_cast<F>(from_half_bin(T{}, bound<true>(counted, kBins, rank)));
    } else {
      return from_descending_key(keys[rank]);
    }
  }
  KD_DEVICE void ranks(T x, int* first, int* behind) const {
    if constexpr (kHalf) {
      const int bin = half_bin(x);
      *first = bin > 0 ? counted[bin - 1] : 0;
      *behind = counted[bin];
    } else {
      const Key key = descending_key(static_cast<F>(to_float(x)));
      *first = bound<false>(keys, kept, key);
      *behind = bound<true>(keys, kept, key);
    }
  }
};

template <bool kHalf, class T, class F>
KD_DEVICE SortedRanks<T, F, kHalf> sort_row(const Side<T, F>& side, const T* row, int kept,
                                            int32_t* memory, int32_t* spare) {
  using Key = typename KeyType<F>::type;
  SortedRanks<T, F, kHalf> out{nullptr, nullptr, kept};
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kHalf) {
    for (int bin = thread; bin < kBins; bin += kThreads) memory[bin] = 0;
    __syncthreads();
    for (int j = thread; j < side.columns; j += kThreads) {
      if (side.excluded == nullptr || !side.excluded[j]) atomicAdd(&memory[half_bin(row[j])], 1);
    }
    __syncthreads();
    inclusive_scan(kBins, memory, [&](int bin) { return memory[bin]; });
    out.counted = memory;
  } else {
    Key* keys = reinterpret_cast<Key*>(memory);
    for (int j = thread; j < side.columns; j += kThreads) {
      // Excluded entries sort behind all others.
      const bool out_of_it = side.excluded != nullptr && side.excluded[j];
      keys[j] = out_of_it ? ~Key(0) : descending_key(static_cast<F>(to_float(row[j])));
    }
    __syncthreads();
    out.keys = block_radix_sort(keys, reinterpret_cast<Key*>(spare), side.columns);
  }
  return out;
}

template <class T, class F>
KD_DEVICE RowStatistics<F> statistics(const Side<T, F>& side, const T* row) {
  F top = F(-kInfinity);
  int kept = 0;
  for (int j = static_cast<int>(threadIdx.x); j < side.columns; j += kThreads) {
    top = max(static_cast<F>(to_float(row[j])), top);
    kept += side.excluded == nullptr || !side.excluded[j];
  }
  RowStatistics<F> out;
  out.top = block_max(top);
  out.kept = block_sum(kept);
  double sum = 0;
  const F reference = out.reference();
  for (int j = static_cast<int>(threadIdx.x); j < side.columns; j += kThreads) {
    sum += static_cast<double>(exp2((static_cast<F>(to_float(row[j])) - reference) * side.k));
  }
  out.sum = static_cast<F>(block_sum(sum));
  return out;
}

// ---- kernel -------------------------------------------------------------------------------------

template <class F>
KD_DEVICE int sign_of(F x) {
  return (x > F(0)) - (x < F(0));
}

template <class TS, class TT, class F, bool kHalf>
__global__ void __launch_bounds__(kThreads)
    sorted_transport_row_kernel(SortedData<TS, TT, F> data) {
  using Key = typename KeyType<F>::type;
  const int thread = static_cast<int>(threadIdx.x);
  const int longer =
      data.student.columns > data.teacher.columns ? data.student.columns : data.teacher.columns;
  // Scratch: two sorted rows, one to sort into (twice: a result may lie in it), signs by rank.
  int32_t* memory = data.workspace + blockIdx.x * data.workspace_size;
  const int64_t each = kHalf ? kBins : static_cast<int64_t>(longer) * (sizeof(Key) / 4);
  int32_t* signs = memory + 4 * each;

  for (int64_t n = blockIdx.x; n < data.rows; n += gridDim.x) {
    TS* gradient = data.gradient != nullptr ? data.gradient + n * data.gradient_stride : nullptr;
    const auto finish = [&](F number) {
      if (thread == 0) data.value[n] = data.slopes[2 * n] = data.slopes[2 * n + 1] = number;
      for (int j = thread; gradient != nullptr && j < data.student.columns; j += kThreads) {
        gradient[j] = cast<TS>(number);
      }
    };
    if (data.mask != nullptr && !data.mask[n * data.mask_stride]) {
      finish(F(0));
      continue;
    }
    const TS* z = data.student.rows + n * data.student.stride;
    const TT* a = data.teacher.rows + n * data.teacher.stride;
    const RowStatistics<F> s = statistics(data.student, z), t = statistics(data.teacher, a);
    const bool no_teacher = t.top == F(-kInfinity) && t.sum == F(0);
    const bool no_student = s.top == F(-kInfinity) && s.sum == F(0);
    if (no_teacher || !(t.sum > F(0)) || is_inf(t.sum) || is_inf(s.sum) ||
        !(no_student || s.sum > F(0))) {
      finish(no_teacher ? F(0) : static_cast<F>(NAN));
      continue;
    }
    const auto ps = sort_row<kHalf>(data.student, z, s.kept, memory, memory + each);
    const auto pt = sort_row<kHalf>(data.teacher, a, t.kept, memory + 2 * each, memory + 3 * each);
    __syncthreads();
    const F scale_s =
        data.student.scale != nullptr ? data.student.scale[n * data.student.scale_stride] : F(1);
    const F scale_t =
        data.teacher.scale != nullptr ? data.teacher.scale[n * data.teacher.scale_stride] : F(1);
    const F unit_s = s.sum > F(0) ? F(1) / s.sum : F(0), unit_t = F(1) / t.sum;
    const int length = s.kept > t.kept ? s.kept : t.kept;
    double value = 0, slope_s = 0, slope_t = 0;
    for (int r = thread; r < length; r += kThreads) {
      const F p = r < s.kept ? unit_s * exp2((ps.at(r) - s.reference()) * data.student.k) : F(0);
      const F q = r < t.kept ? unit_t * exp2((pt.at(r) - t.reference()) * data.teacher.k) : F(0);
      const F difference = scale_s * p - scale_t * q;
      const int sign = sign_of(difference);
      signs[r] = sign;
      value += static_cast<double>(abs(difference));
      slope_s += static_cast<double>(sign * p);
      slope_t -= static_cast<double>(sign * q);
    }
    value = block_sum(value);
    slope_s = block_sum(slope_s);
    slope_t = block_sum(slope_t);
    if (thread == 0) {
      data.value[n] = static_cast<F>(value);
      data.slopes[2 * n] = static_cast<F>(slope_s);
      data.slopes[2 * n + 1] = static_cast<F>(slope_t);
    }
    if (gradient != nullptr) {
      inclusive_scan(s.kept, signs, [&](int r) { return signs[r]; });
      F factor = scale_s * unit_s / data.temperature;
      if (data.coefficient != nullptr) factor *= data.coefficient[n * data.coefficient_stride];
      for (int j = thread; j < data.student.columns; j += kThreads) {
        F sign = F(0);
        if (data.student.excluded == nullptr || !data.student.excluded[j]) {
          int first, behind;
          ps.ranks(z[j], &first, &behind);
          const int sum = signs[behind - 1] - (first > 0 ? signs[first - 1] : 0);
          sign = static_cast<F>(sum) / static_cast<F>(behind - first);
        }
        const F e = exp2((static_cast<F>(to_float(z[j])) - s.reference()) * data.student.k);
        gradient[j] = cast<TS>(factor * e * (sign - static_cast<F>(slope_s)));
      }
    }
    __syncthreads();  // the scratch is free for the next row
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <class T, class F>
Side<T, F> side_of(const View& logits, const View& scale, const View& excluded,
                   double temperature) {
  Side<T, F> side{};
  side.rows = logits.as<T>();
  side.stride = logits.stride[0];
  side.columns = static_cast<int>(logits.shape[1]);
  side.scale = scale ? scale.as<F>() : nullptr;
  side.scale_stride = scale ? scale.stride[0] : 0;
  side.excluded = excluded ? excluded.as<uint8_t>() : nullptr;
  side.k = static_cast<F>(kLog2E / temperature);
  return side;
}

template <class TS, class TT, bool kHalf>
void launch_sorted(const SortedArgs& args) {
  using F = compute_t<TS>;
  const DeviceGuard guard(args.student.device_index);
  SortedData<TS, TT, F> d{};
  d.student = side_of<TS, F>(args.student, args.student_scale, args.student_excluded,
                             args.student_temperature);
  d.teacher = side_of<TT, F>(args.teacher, args.teacher_scale, args.teacher_excluded,
                             args.teacher_temperature);
  d.rows = args.student.shape[0];
  d.mask = args.mask ? args.mask.as<uint8_t>() : nullptr;
  d.mask_stride = args.mask ? args.mask.stride[0] : 0;
  d.coefficient = args.coefficient ? args.coefficient.as<F>() : nullptr;
  d.coefficient_stride = args.coefficient ? args.coefficient.stride[0] : 0;
  d.value = args.value.as<F>();
  d.slopes = args.slopes.as<F>();
  d.gradient = args.grad_student ? args.grad_student.as<TS>() : nullptr;
  d.gradient_stride = args.grad_student ? args.grad_student.stride[0] : 0;
  d.temperature = static_cast<F>(args.student_temperature);
  d.workspace = args.workspace.as<int32_t>();
  d.workspace_size = args.workspace.shape[1];
  if (d.rows == 0) return;
  const int64_t blocks = std::min(d.rows, args.workspace.shape[0]);
  launch({"sorted_transport_row", dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
          static_cast<Stream>(args.stream),
          "student " + shape_text(args.student) + ", teacher " + shape_text(args.teacher)},
         sorted_transport_row_kernel<TS, TT, F, kHalf>, d);
}

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

}  // namespace

// ---- entry points -------------------------------------------------------------------------------

int64_t sorted_workspace(int64_t student_columns, int64_t teacher_columns, bool wide) {
  const int64_t longer = std::max(student_columns, teacher_columns);
  return 4 * std::max<int64_t>(wide ? 2 * longer : longer, kBins) + longer;
}

void sorted_transport(const SortedArgs& args) {
  check_sorted(args, sorted_workspace(args.student.shape[1], args.teacher.shape[1],
                                      args.student.dtype == DType::kFloat64));
  if (args.student.dtype == DType::kFloat64) return launch_sorted<double, double, false>(args);
  dispatch_half_float(args.student.dtype, "student", [&](auto student) {
    dispatch_half_float(args.teacher.dtype, "teacher", [&](auto teacher) {
      using TS = decltype(student);
      using TT = decltype(teacher);
      launch_sorted<TS, TT, kIsHalf<TS> && kIsHalf<TT>>(args);
    });
  });
}

}  // namespace kd::cuda
