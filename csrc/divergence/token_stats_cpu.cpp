// Row kernels of token_stats and label_log_probs, compiled once per CPU ISA.
//
//   normalise  one read of a row, block by block: its largest entry and sum of exponentials. A
//              block is in the L1 cache when its exponentials are taken.
//   pair       a second read of both rows: every sum, from divergence_exact.h's entries
//   gradient   (labels) a second read of the logits beside the write
#include "common/parallel.h"
#include "divergence/divergence_exact.h"
#include "divergence/divergence_gradient.h"
#include "divergence/token_stats_math.h"
#include "divergence/token_stats_rows.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

constexpr float kNan = __builtin_nanf("");
// A gradient is written around the cache if it would not stay in it anyway.
constexpr int64_t kAroundCache = int64_t{1} << 20;

// The largest logit of a row, the lowest of its ids, and the sum of 2^u about it.
template <class S>
struct Normaliser {
  S top = -static_cast<S>(__builtin_inf());
  int64_t at = 0;
  double sum = 0;
  bool is_nan = false;

  // Base 2, less Side::max.
  double log2_sum() const { return __builtin_log2(sum > 0 ? sum : 1); }
};

template <class T>
Normaliser<compute_t<T>> normalise(Side<T>* side) {
  using V = Lanes<T>;
  using S = compute_t<T>;
  Normaliser<S> row;
  for (int64_t begin = 0; begin < side->columns; begin += kBlock) {
    const int64_t end = begin + kBlock < side->columns ? begin + kBlock : side->columns;
    const S top = largest(*side, begin, end, &row.is_nan);
    if (row.is_nan) return row;
    if (top > row.top) {
      row.top = top;
      for (row.at = begin; static_cast<S>(to_float(side->logits[row.at])) != top;) ++row.at;
      const S raised = top * side->scale;
      // What is lower than kDead is nothing, as -inf is.
      if (raised > S(kDead)) {
        if (row.sum > 0) row.sum *= __builtin_exp2(double(side->max) - double(raised));
        side->max = raised;
      }
    }
    V sum = V::zero();
    for (int64_t i = begin; i < end; i += V::kLanes) sum += lazy_exp2(scaled_logits<V>(*side, i));
    row.sum += reduce_add_double(sum);
  }
  return row;
}

template <class S>
double per_row(const View& numbers, int64_t row, double otherwise) {
  return numbers ? static_cast<double>(numbers.as<S>()[row * numbers.stride[0]]) : otherwise;
}

template <class T>
T* row_of(const View& rows, int64_t row) {
  return rows ? rows.as<T>() + row * rows.stride[0] : nullptr;
}

KD_LANES bool is_selected(const View& labels, const View& mask, double ignore_index, int64_t row) {
  if (mask && mask.as<uint8_t>()[row * mask.stride[0]] == 0) return false;
  return !labels ||
         labels.as<int64_t>()[row * labels.stride[0]] != static_cast<int64_t>(ignore_index);
}

KD_LANES bool is_temperature(double tau) {
  return tau > 0 && tau < __builtin_inf();
}

// Natural log-probability of one entry.
template <class T, class S>
double log_prob(const Side<T>& side, const Normaliser<S>& row, int64_t index) {
  const S logit = static_cast<S>(to_float(side.logits[index]));
  if (!(logit * side.scale > S(kDead))) return -__builtin_inf();
  return kLn2 * (double(kd::fma(logit, side.scale, -side.max)) - row.log2_sum());
}

// ---- statistics --------------------------------------------------------------------------------

struct Where {
  float* numbers;
  int64_t stride;
  int64_t* ids;
  int64_t id_stride;

  KD_LANES void put(int field, double number) const {
    numbers[field * stride] = static_cast<float>(number);
  }
  void fill(float number) const {
    for (int i = 0; i < kTokenNumbers; ++i) put(i, number);
    ids[0] = ids[id_stride] = 0;
  }
};

// What one side has for itself; `first` is the student's field, the teacher's lies `step` behind.
template <class T, class S>
void put_side(const Where& out, int side_index, const Side<T>& side, const Normaliser<S>& row,
              int64_t label) {
  const double infinity = __builtin_inf();
  const bool empty = !(row.sum > 0);
  out.put(kStudentLse + side_index, empty ? -infinity : kLn2 * (double(side.max) + row.log2_sum()));
  out.put(kStudentMaxLogit + side_index, row.top);
  out.put(kStudentMaxProb + side_index, empty ? 0 : 1 / row.sum);
  const bool there = label >= 0 && label < side.columns && !empty;
  out.put(kStudentLabelLogProb + side_index, label < 0 ? 0
                                             : there   ? log_prob(side, row, label)
                                                       : -infinity);
  out.ids[side_index * out.id_stride] = row.at;
}

template <class TS, class TT>
PairSums<double> pair_sums(const Side<TS>& z, const Side<TT>& a,
                           const RowNumbers<compute_t<TS>>& row, bool* no_q, bool* no_p) {
  using V = Lanes<TS>;
  using S = compute_t<TS>;
  alignas(64) S u[kBlock], v[kBlock], d[kBlock];
  const V ln2(kLn2), dead(kDead), underflow(kUnderflow);
  const V inverse_s(row.inverse_s), inverse_t(row.inverse_t), lse_s(row.lse_s), lse_t(row.lse_t);
  const int64_t columns = z.columns > a.columns ? z.columns : a.columns;
  const Entries<TS, TT> entries(z, a, row);
  PairSums<VecD> lanes;  // folded once a row
  auto lost_q = V::Mask::first(0), lost_p = lost_q;
  for (int64_t begin = (columns - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
    const int64_t n = padded<V>(columns - begin < kBlock ? columns - begin : kBlock);
    entries.load(begin, n, u, v, d);
    PairSums<V> block;
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const V x = V::load(u + i), y = V::load(v + i);
      lost_q = lost_q | ((x <= dead) & (y > underflow));
      lost_p = lost_p | ((y <= dead) & (x > underflow));
      block.add(Entry<V>{exp2(y) * inverse_t, exp2(x) * inverse_s, V::load(d + i),
                         (y - lse_t) * ln2, (x - lse_s) * ln2});
    }
    lanes.each(block, [](VecD& sum, const V& part) { sum += widen_sum(part); });
  }
  PairSums<double> total;
  total.each(lanes, [](double& sum, const VecD& part) { sum = reduce_add(part); });
  *no_q = any(lost_q);
  *no_p = any(lost_p);
  return total;
}

template <class TS, class TT>
void stats_row(const TokenStatsArgs& c, int64_t index) {
  using S = compute_t<TS>;
  const Where out{c.numbers.as<float>() + index * c.numbers.stride[1], c.numbers.stride[0],
                  c.ids.as<int64_t>() + index * c.ids.stride[1], c.ids.stride[0]};
  if (!is_selected(c.labels, c.mask, c.ignore_index, index)) return out.fill(0);
  const double tau_s = per_row<S>(c.student_temperature, index, c.tau_s);
  const double tau_t = c.teacher ? per_row<S>(c.teacher_temperature, index, c.tau_t) : tau_s;
  const int64_t label = c.labels ? c.labels.as<int64_t>()[index * c.labels.stride[0]] : -1;
  Side<TS> z{row_of<TS>(c.student, index), static_cast<int64_t>(c.student_columns),
             static_cast<S>(kLog2E / tau_s), S(0)};
  Side<TT> a{row_of<TT>(c.teacher, index), 0, static_cast<S>(kLog2E / tau_t), S(0)};
  if (c.teacher) a.columns = static_cast<int64_t>(c.teacher_columns);
  const bool bad_label = c.labels && (label < 0 || label >= z.columns);
  if (bad_label || !is_temperature(tau_s) || !is_temperature(tau_t)) return out.fill(kNan);
  const Normaliser<S> student = normalise(&z), teacher = normalise(&a);
  if (student.is_nan || teacher.is_nan) return out.fill(kNan);
  put_side(out, 0, z, student, label);
  put_side(out, 1, a, teacher, label);
  out.put(kAgreement, student.at == teacher.at ? 1 : 0);
  RowNumbers<S> numbers;
  numbers.tau_s = static_cast<S>(tau_s);
  numbers.tau_t = static_cast<S>(tau_t);
  numbers.set_sums(student.sum, teacher.sum);
  bool no_q = false, no_p = false;
  PairSums<double> sums = pair_sums(z, a, numbers, &no_q, &no_p);
  out.put(kStudentEntropy, sums.student_entropy);
  out.put(kTeacherEntropy, sums.teacher_entropy);
  out.put(kStudentSquare, sums.student_square);
  out.put(kTeacherSquare, sums.teacher_square);
  if (!(teacher.sum > 0)) {  // without a teacher, or of an impossible row
    sums = PairSums<double>();
    no_q = no_p = false;
  }
  out.put(kForwardKl, no_q ? __builtin_inf() : sums.forward_kl);
  out.put(kReverseKl, no_p ? __builtin_inf() : sums.reverse_kl);
  out.put(kTotalVariationOf, sums.corrected_total_variation());
  out.put(kHellinger, __builtin_sqrt(sums.squared_hellinger));
  out.put(kDot, sums.dot);
}

// ---- labels ------------------------------------------------------------------------------------

template <class T>
Side<T> label_side(const LabelLogProbsArgs& c, int64_t index, double tau) {
  return {row_of<T>(c.logits, index), static_cast<int64_t>(c.columns),
          static_cast<compute_t<T>>(kLog2E / tau), compute_t<T>(0)};
}

template <class T>
void forward_row(const LabelLogProbsArgs& c, int64_t index) {
  using S = compute_t<T>;
  S* value = c.value.as<S>() + index * c.value.stride[0];
  S* stats = row_of<S>(c.stats, index);
  stats[0] = S(0);
  stats[1] = S(-1);
  *value = S(0);
  if (!is_selected(c.labels, c.mask, c.ignore_index, index)) return;
  *value = S(kNan);
  const double tau = per_row<S>(c.temperature, index, c.tau);
  Side<T> side = label_side<T>(c, index, tau);
  const int64_t label = c.labels.as<int64_t>()[index * c.labels.stride[0]];
  if (label < 0 || label >= side.columns || !is_temperature(tau)) return;
  const Normaliser<S> row = normalise(&side);
  stats[0] = side.max;
  stats[1] = row.is_nan ? S(kNan) : static_cast<S>(row.sum);
  if (!row.is_nan) *value = static_cast<S>(log_prob(side, row, label));
}

template <class T>
void backward_row(const LabelLogProbsArgs& c, int64_t index) {
  using V = Lanes<T>;
  using S = compute_t<T>;
  T* gradient = row_of<T>(c.gradient, index);
  const S* stats = row_of<S>(c.stats, index);
  const int64_t width = c.logits.shape[1];
  const double upstream = per_row<S>(c.upstream, index, 1);
  const auto fill = [&](S number) {
    if (gradient != nullptr) fill_row(gradient, 0, width, number);
    if (c.grad_temperature) {
      c.grad_temperature.as<S>()[index * c.grad_temperature.stride[0]] = number;
    }
  };
  if (stats[1] < S(0) || upstream == 0) return fill(S(0));
  if (kd::is_nan(stats[1])) return fill(S(kNan));
  const double tau = per_row<S>(c.temperature, index, c.tau);
  Side<T> side = label_side<T>(c, index, tau);
  side.max = stats[0];
  const int64_t label = c.labels.as<int64_t>()[index * c.labels.stride[0]];
  const S logit = static_cast<S>(to_float(side.logits[label]));
  const bool possible = logit * side.scale > S(kDead);
  const double sum = stats[1] > S(0) ? double(stats[1]) : 1, by = upstream / tau;
  const V factor(static_cast<S>(-by / sum));
  // Sum q u, of the possible entries.
  V moment = V::zero();
  const V dead(kDead), zero = V::zero();
  const auto entry = [&](int64_t i) {
    const V u = scaled_logits<V>(side, i), e = exp2(u);
    if (c.grad_temperature) moment += select(u > dead, e * u, zero);
    return e * factor;
  };
  if (gradient != nullptr) {
    const bool large = c.gradient.size() * int64_t{sizeof(T)} >= kAroundCache;
    write_row<V>(gradient, side.columns, large, entry);
    fill_row(gradient, side.columns, width, S(0));
    if (possible) {
      const double q = __builtin_exp2(double(kd::fma(logit, side.scale, -side.max))) / sum;
      gradient[label] = cast<T>(static_cast<S>(by * (1 - q)));
    }
  } else {
    for (int64_t i = 0; i < side.columns; i += V::kLanes) entry(i);
  }
  if (c.grad_temperature) {
    const double u = possible ? double(kd::fma(logit, side.scale, -side.max)) : 0;
    const double mean = reduce_add_double(moment) / sum;
    c.grad_temperature.as<S>()[index * c.grad_temperature.stride[0]] =
        possible ? static_cast<S>(-by * kLn2 * (u - mean)) : S(0);
  }
}

// ---- dispatch ----------------------------------------------------------------------------------

template <class TS, class TT>
void stats_rows(const TokenStatsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) stats_row<TS, TT>(args, row);
}

template <class TS>
void dispatch_teacher(const TokenStatsArgs& args, int64_t begin, int64_t end) {
  if (!args.teacher) return stats_rows<TS, TS>(args, begin, end);
  switch (args.teacher.dtype) {
    case DType::kFloat16:
      return stats_rows<TS, f16>(args, begin, end);
    case DType::kBFloat16:
      return stats_rows<TS, bf16>(args, begin, end);
    default:
      return stats_rows<TS, float>(args, begin, end);
  }
}

template <class T>
void label_rows(const LabelLogProbsArgs& args, bool forward, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (forward) {
      forward_row<T>(args, row);
    } else {
      backward_row<T>(args, row);
    }
  }
}

void dispatch_labels(const LabelLogProbsArgs& args, bool forward, int64_t begin, int64_t end) {
  switch (args.logits.dtype) {
    case DType::kFloat64:
      return label_rows<double>(args, forward, begin, end);
    case DType::kFloat16:
      return label_rows<f16>(args, forward, begin, end);
    case DType::kBFloat16:
      return label_rows<bf16>(args, forward, begin, end);
    default:
      return label_rows<float>(args, forward, begin, end);
  }
}

}  // namespace

void token_stats_rows(const TokenStatsArgs& args, int64_t begin, int64_t end) {
  switch (args.student.dtype) {
    case DType::kFloat64:
      return stats_rows<double, double>(args, begin, end);
    case DType::kFloat16:
      return dispatch_teacher<f16>(args, begin, end);
    case DType::kBFloat16:
      return dispatch_teacher<bf16>(args, begin, end);
    default:
      return dispatch_teacher<float>(args, begin, end);
  }
}
void label_log_probs_forward_rows(const LabelLogProbsArgs& args, int64_t begin, int64_t end) {
  dispatch_labels(args, true, begin, end);
}
void label_log_probs_backward_rows(const LabelLogProbsArgs& args, int64_t begin, int64_t end) {
  dispatch_labels(args, false, begin, end);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
