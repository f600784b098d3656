// Row kernels of the divergences, compiled once per CPU ISA.
//
//   statistics   one read of both rows: normalisers, one-pass KL
//   terms        D, S and T of the kinds that need both normalisers first; the linear group takes
//                them from the statistics
//   gradient     one pass, non-temporal stores into a large fresh gradient
//
// For a student gradient alone the statistics leave the row pair in an L2-sized scratch buffer, in
// the form that the kind's later passes need (divergence_ratio.h). Everything else is computed from
// the logits again, which lie in the cache (divergence_exact.h): rows too wide for the scratch,
// rows whose value is small, the teacher's and the temperatures' gradients, float64, the backward.
// Of a sum of several divergences every row takes all parts before the next row (GradientTarget).
// A row's arithmetic depends on that row alone, so neither the number of threads nor the neighbours
// change a bit.
#include "common/parallel.h"
#include "divergence/divergence_exact.h"
#include "divergence/divergence_gradient.h"
#include "divergence/divergence_rows.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

constexpr double kExactBelow = 0.05;  // nats; one-pass values below are finished from the gap
// The same for other kinds, times sqrt(sum scale^2); more where exponentials and logarithms are
// less exact. (Without fused multiply-add the exact pass of a power kind is no better than 1e-5
// itself.)
constexpr double kExactBelowError = KDK_ISA_LEVEL == 1 ? 0.08 : 0.03;

template <class S>
S per_row(const DivergenceRows::PerRow& numbers, int64_t row, double otherwise) {
  if (numbers.data == nullptr) return static_cast<S>(otherwise);
  return static_cast<const S*>(numbers.data)[row * numbers.stride];
}

template <class T>
T* row_of(const DivergenceRows::Rows& rows, int64_t row) {
  return rows.data == nullptr ? nullptr : static_cast<T*>(rows.data) + row * rows.stride;
}

// Everything about one row that is known before its logits are read.
template <class TS, class TT>
struct Row {
  using S = compute_t<TS>;
  Side<TS> z;
  Side<TT> a;
  RowNumbers<S> n;
  S first;
  TS* grad_s;
  TT* grad_t;
  S* grad_tau;
  S* stats;
  DivergenceGroup group;  // whose formulas the row needs

  Row(const DivergenceRows& c, int64_t row) {
    first = per_row<S>(c.first, row, c.spec.first);
    n.kind = row_kind<S>(c.spec, first, per_row<S>(c.second, row, c.spec.second));
    n.tau_s = per_row<S>(c.student_temperature, row, c.spec.student_temperature);
    n.tau_t = c.has_teacher ? per_row<S>(c.teacher_temperature, row, c.spec.teacher_temperature)
                            : n.tau_s;
    z = {row_of<TS>(c.student, row), c.student_columns, static_cast<S>(kLog2E / n.tau_s), S(0)};
    a = {row_of<TT>(c.teacher, row), c.teacher_columns, static_cast<S>(kLog2E / n.tau_t), S(0)};
    grad_s = row_of<TS>(c.grad_student, row);
    grad_t = row_of<TT>(c.grad_teacher, row);
    grad_tau = static_cast<S*>(c.grad_temperature);
    if (grad_tau != nullptr) grad_tau += row * c.grad_temperature_stride[0];
    stats = static_cast<S*>(c.stats) + row * c.stats_stride;
    group = n.kind.other == S(0) ? DivergenceGroup::kLinear
                                 : group_of(static_cast<Kind>(static_cast<int>(c.spec.kind)));
  }

  void fill(const DivergenceRows& c, S number, RowGradient<TS>* gradient) {
    if (grad_s != nullptr) gradient->fill(z.columns, c.student_width, number);
    if (grad_t != nullptr) fill_row(grad_t, 0, c.teacher_width, number);
    if (grad_tau != nullptr) grad_tau[0] = grad_tau[c.grad_temperature_stride[1]] = number;
  }

  void clear_padding(const DivergenceRows& c, bool last) {
    if (grad_s != nullptr && last) fill_row(grad_s, z.columns, c.student_width, compute_t<TS>(0));
    if (grad_t != nullptr) fill_row(grad_t, a.columns, c.teacher_width, compute_t<TT>(0));
  }
};

// t / s as one stored number that keeps its digits near 1, where its logarithm needs them, and far
// below 1: less 1, or from 1/2 down the reciprocal, negated.
double encoded_quotient(double t, double s) {
  return 2 * t >= s ? (t - s) / s : -s / t;
}
double decoded_quotient(double code) {
  return code >= -0.5 ? 1 + code : -1 / code;
}

// Reference and base-2 log-sum-exp of one side; NaN logits have been excluded.
template <class T>
void log_sum_exp(Side<T>* side, double* lse) {
  using V = Lanes<T>;
  using S = compute_t<T>;
  bool bad = false;
  const S top = largest(*side, 0, side->columns, &bad) * side->scale;
  side->max = top > S(kDead) ? top : S(0);
  double total = 0;
  for (int64_t begin = 0; begin < side->columns; begin += kBlock) {
    const int64_t end = begin + kBlock < side->columns ? begin + kBlock : side->columns;
    V sum = V::zero();
    for (int64_t i = begin; i < end; i += V::kLanes) sum += lazy_exp2(scaled_logits<V>(*side, i));
    total += reduce_add_double(sum);
  }
  *lse = __builtin_log2(total);
}

// Values that are infinite by definition (a probability of 0 where the other is not).
template <class S>
void infinite_kinds(const RowKind<S>& c, DivergenceGroup group, bool no_q, bool no_p, bool* flowing,
                    bool* stopped) {
  if (c.clip_element > S(0)) return;  // every summand is bounded
  *flowing = no_q && (c.forward_kl != S(0) || c.cross_entropy != S(0));
  *stopped = no_p && c.reverse_kl != S(0);
  if (c.other == S(0)) return;
  if (group == DivergenceGroup::kProbability) *stopped |= no_q && c.chi_squared != S(0);
  if (group == DivergenceGroup::kPower) {
    // q^beta diverges for beta < 0; beta = 0 keeps p^alpha log(p / q), with forward KL's gradient.
    *flowing |= no_q && c.beta == S(0);
    *stopped |= (no_q && c.beta < S(0)) || (no_p && c.alpha <= S(0));
    // Opposed exponents whose sum is not positive diverge at either zero.
    *stopped |= (no_q || no_p) && c.alpha + c.beta <= S(0) && c.beta != S(0);
  }
}

// The label term's numbers for the gradient. natural_lse: log-sum-exp of z at tau = 1.
template <class TS, class S>
LabelTerm<S> label_term(const Side<TS>& z, int64_t index, double natural_lse, double coefficient) {
  LabelTerm<S> label;
  label.active = coefficient != 0;
  if (to_float(z.logits[index]) > -__builtin_inff()) label.index = index;
  label.coefficient = static_cast<S>(coefficient);
  label.max = static_cast<S>(natural_lse * kLog2E);
  label.lse = static_cast<S>(natural_lse * kLog2E - static_cast<double>(label.max));
  return label;
}

// Temperature gradients and the gradients of the logits, from the logits.
template <class TS, class TT>
void gradients_from_logits(const DivergenceRows& c, Row<TS, TT>& r,
                           const GradientScale<compute_t<TS>>& scale,
                           const LabelTerm<compute_t<TS>>& label, double factor, double divergence,
                           RowGradient<TS>* gradient) {
  using S = compute_t<TS>;
  gradient->settle();
  const bool tau = r.grad_tau != nullptr;
  double moment_s = 0, moment_t = 0;
  gradient_from_logits<TS, TT, S>(r.z, r.a, r.n, r.group, scale, label, gradient->target, r.grad_t,
                                  tau ? &moment_s : nullptr, tau ? &moment_t : nullptr);
  gradient->target.holds = true;
  if (!tau) return;
  // d/d tau of f(z / tau) = -sum z_v (df/dz_v) / tau, and z_v = u_v / scale + const.
  double by_s = -moment_s / (double(r.z.scale) * double(r.n.tau_s));
  const double by_t = -moment_t / (double(r.a.scale) * double(r.n.tau_t));
  if (c.spec.temperature_squared != 0) {
    if (c.spec.clip_token > 0 && divergence > c.spec.clip_token) divergence = c.spec.clip_token;
    by_s += 2 * double(r.n.tau_s) * divergence * factor;
  }
  r.grad_tau[0] = static_cast<S>(by_s);
  r.grad_tau[c.grad_temperature_stride[1]] = static_cast<S>(by_t);
}

template <class TS, class TT>
void forward_row(const DivergenceRows& c, int64_t index, RowGradient<TS>* gradient) {
  using S = compute_t<TS>;
  using V = Lanes<TS>;
  Row<TS, TT> r(c, index);
  const double factor = c.factor[index];
  for (int i = 0; i < kStats; ++i) r.stats[i] = S(0);
  c.values[index] = 0;
  if (!c.selected[index]) return r.fill(c, S(0), gradient);
  r.stats[kFactor] = static_cast<S>(factor);
  r.stats[kUnit] = static_cast<S>(c.unit[index]);

  // Statistics.
  const int64_t columns = r.z.columns > r.a.columns ? r.z.columns : r.a.columns;
  // The second buffer starts away from the first one's 4 KiB aliases, and where it starts for every
  // part of a sum: the next part takes the buffers over entry by entry.
  const int64_t offset = (c.widest + 1023) / 1024 * 1024 + 16 * 17;
  const size_t bytes = static_cast<size_t>(offset + c.widest + 16) * sizeof(S);
  const bool fast =
      bytes <= kScratchLimit && r.grad_s != nullptr && r.grad_t == nullptr && r.grad_tau == nullptr;
  Way way = way_of(r.n.kind, r.group, fast);
  const bool keep = fast && way != Way::kLinear && way != Way::kExact;
  S* const x = keep ? reinterpret_cast<S*>(scratch(bytes)) : nullptr;
  S* const y = keep ? x + offset : nullptr;
  const auto take_over = [gradient](int64_t end) { gradient->pending.write_upto(end); };
  const RowSums<S> sums = keep ? kept_statistics<S>(way, r.n.kind, &r.z, &r.a, x, y, take_over)
                               : row_statistics<Keep::kNothing>(&r.z, &r.a, x, y, [](int64_t) {});
  if (keep) gradient->pending.finish();
  if (sums.is_nan) {
    constexpr S kNan = static_cast<S>(__builtin_nan(""));
    for (int i = 0; i < kFactor; ++i) r.stats[i] = kNan;
    if (factor != 0) c.values[index] = __builtin_nan("");
    return r.fill(c, factor != 0 ? kNan : S(0), gradient);
  }
  r.n.set_sums(sums.sum_s, sums.sum_t);
  if (keep && !scratch_serves(way, sums, r.n)) {
    way = way == Way::kReverse ? Way::kLinear : Way::kExact;
  }
  const double sum_s = sums.sum_s > 0 ? sums.sum_s : 1, sum_t = sums.sum_t > 0 ? sums.sum_t : 1;

  // Value and centres.
  const bool impossible = c.has_teacher && !(sums.sum_t > 0);
  bool flowing = false, stopped = false;
  if (c.has_teacher) {
    infinite_kinds(r.n.kind, r.group, sums.no_q, sums.no_p, &flowing, &stopped);
  }
  const bool ordinary = !flowing && !stopped && !impossible;
  double cx = 0, cy = 0, cr = 0;  // ScratchGradient without the row's factor
  double q_unit = 1 / sum_s;      // q = x times this
  RowTerms terms;
  if (way == Way::kForward || way == Way::kReverse || way == Way::kLinear) {
    const RowKind<S>& k = r.n.kind;
    const double f = k.forward_kl, b = k.reverse_kl, e = k.cross_entropy, h = k.entropy;
    const double measured_gap = r.n.exact_gap;  // exact_terms() may correct it
    const double kl = kLn2 * (sums.gap / sum_t - measured_gap);
    const double back = -kLn2 * (sums.reverse / sum_s - measured_gap);
    const double cross = -kLn2 * (sums.cross / sum_t - __builtin_log2(sum_s));
    const double entropy = -kLn2 * (sums.entropy / sum_s - __builtin_log2(sum_s));
    const auto part = [](double coefficient, double sum) {
      return coefficient == 0 ? 0 : coefficient * sum;
    };
    terms.value = part(f, kl) + part(b, back) + part(e, cross) + part(h, entropy);
    terms.student = part(b, back) + part(h, entropy);
    terms.teacher = part(f, kl) + part(e, cross);
    const bool small = (f != 0 && kl < kExactBelow) || (b != 0 && back < kExactBelow);
    if (small && ordinary) {
      terms.value = exact_terms(r.z, r.a, &r.n, DivergenceGroup::kLinear).value;
    }
    if (way == Way::kForward) {
      cx = (f + e) / sum_s;
      cy = -(f + e) / sum_t;
    } else {  // q (f (1 - 2^d) - b d ln(2) - S), where d is y less the gap
      cx = (f + b * kLn2 * measured_gap - terms.student) / sum_s;
      cy = -b * kLn2 / sum_s;
      cr = -f / sum_t;
    }
  } else {
    if (way == Way::kExact) {
      terms = exact_terms(r.z, r.a, &r.n, r.group);
    } else {
      const FastTerms made =
          fast_terms<V>(x, y, padded<V>(columns), way, sums, r.n, kExactBelowError);
      terms = made.terms;
      q_unit = made.q_unit;
      cx = (made.shift - terms.student) * q_unit;
      cy = made.cy;
      if (!(terms.value >= kExactBelowError * __builtin_sqrt(terms.square)) && ordinary) {
        terms.value = exact_terms(r.z, r.a, &r.n, r.group).value;
      }
    }
    if (ordinary && hardly_overlaps(static_cast<S>(terms.value), r.n.kind, c.spec, r.first)) {
      r.n.kind.overlap = S(1);
      way = Way::kExact;
      terms = exact_terms(r.z, r.a, &r.n, r.group);
    }
  }
  double total = terms.value, centre_s = terms.student, centre_t = terms.teacher;
  if (flowing || stopped) total = __builtin_inf();
  if (flowing || stopped) centre_t = __builtin_inf();
  if (stopped) centre_s = __builtin_inf();
  if (impossible) total = centre_s = centre_t = 0;
  const RowValue<double> value = finish_row<double>(total, c.spec, double(r.first),
                                                    double(r.n.tau_s), r.n.kind.overlap != S(0));
  // An infinite value whose slope is infinite too (Bhattacharyya of disjoint rows) has no gradient.
  constexpr double kSteepest = sizeof(S) == 4 ? 1e37 : 1e300;
  const bool flat = stopped || impossible || !(__builtin_fabs(value.slope) < kSteepest);
  const double slope = flat ? 0 : value.slope;

  // Label.
  double row_value = value.value, label_lse = 0;
  LabelTerm<S> label;
  if (c.labels != nullptr) {
    const int64_t gold = c.labels[index * c.label_stride];
    if (r.n.tau_s == S(1)) {
      label_lse = kLn2 * (double(r.z.max) + __builtin_log2(sum_s));
    } else {
      Side<TS> plain{r.z.logits, r.z.columns, static_cast<S>(kLog2E), S(0)};
      log_sum_exp(&plain, &label_lse);
      label_lse = kLn2 * (label_lse + double(plain.max));
    }
    const double logit = to_float(r.z.logits[gold]);
    row_value +=
        c.spec.label_weight * (logit > -__builtin_inf() ? label_lse - logit : __builtin_inf());
    label = label_term<TS, S>(r.z, gold, label_lse, factor * c.spec.label_weight);
  }
  r.stats[kMaxS] = r.z.max;
  r.stats[kSumS] = static_cast<S>(sum_s);
  r.stats[kMaxT] = r.a.max;
  const double corrected = sum_s * __builtin_exp2(r.n.exact_gap);
  r.stats[kSumT] = static_cast<S>(encoded_quotient(corrected, sum_s));
  r.stats[kDivergence] = static_cast<S>(value.divergence);
  r.stats[kCentreS] = static_cast<S>(centre_s);
  r.stats[kCentreT] = static_cast<S>(centre_t);
  r.stats[kSlope] = static_cast<S>(slope);
  r.stats[kLabelLse] = static_cast<S>(label_lse);
  r.stats[kValue] = static_cast<S>(row_value);
  c.values[index] = factor == 0 ? 0 : factor * row_value;
  if (r.grad_s == nullptr && r.grad_t == nullptr && r.grad_tau == nullptr) return;

  // Gradient.
  if (factor == 0) return r.fill(c, S(0), gradient);
  r.clear_padding(c, gradient->target.last);
  const double by_student = slope == 0 ? 0 : factor * slope / r.n.tau_s;
  GradientScale<S> scale;
  scale.student = static_cast<S>(by_student);
  scale.teacher = flowing || slope == 0 ? S(0) : static_cast<S>(factor * slope / r.n.tau_t);
  scale.centre_s = static_cast<S>(centre_s);
  scale.centre_t = static_cast<S>(centre_t);
  // Without a teacher's part nothing in scratch can carry the label's one-hot.
  if (!keep || way == Way::kExact || way == Way::kLinear || by_student == 0 ||
      (way == Way::kForward && cy == 0)) {
    // From what is stored, so that a backward repeats this gradient.
    const double stored = r.stats[kSumS];
    r.n.set_sums(stored, decoded_quotient(r.stats[kSumT]) * stored);
    return gradients_from_logits(c, r, scale, label, factor, value.divergence, gradient);
  }
  ScratchGradient<S> from;
  from.product = way == Way::kReverse;
  cx *= by_student;
  cy *= by_student;
  // The label's part. Its softmax is q at tau = 1; its one-hot goes into scratch, divided by what
  // the gradient's pass multiplies it with, or after that pass where it multiplies by more than a
  // number.
  const int64_t hot = label.active ? label.index : -1;
  S hot_gradient = 0;
  if (label.active && r.n.tau_s == S(1)) {
    cx += double(label.coefficient) * q_unit;
    label.active = false;
  }
  if (hot >= 0 && !from.product) y[hot] -= static_cast<S>(double(label.coefficient) / cy);
  if (hot >= 0 && from.product) {
    const double soft =
        label.active
            ? label.coefficient *
                  __builtin_exp2(double(to_float(r.z.logits[hot])) * kLog2E - label.max - label.lse)
            : 0;
    hot_gradient =
        static_cast<S>(x[hot] * (cx + cy * y[hot] + by_student * cr * __builtin_exp2(y[hot])) +
                       soft - label.coefficient);
  }
  from.cx = static_cast<S>(cx);
  from.cy = static_cast<S>(cy);
  from.cr = static_cast<S>(by_student * cr);
  gradient->pending.start(x, y, from, r.z, label, gradient->target);
  if (hot >= 0 && from.product) gradient->pending.replace(hot, hot_gradient);
  gradient->target.holds = true;
}

template <class TS, class TT>
void backward_row(const DivergenceRows& c, int64_t index, RowGradient<TS>* gradient) {
  using S = compute_t<TS>;
  Row<TS, TT> r(c, index);
  const double upstream = per_row<S>(c.upstream, index, 1);
  const double factor = r.stats[kFactor] == S(0) ? 0 : r.stats[kFactor] * upstream;
  if (factor == 0) return r.fill(c, S(0), gradient);
  if (kd::is_nan(r.stats[kValue])) return r.fill(c, static_cast<S>(__builtin_nan("")), gradient);
  r.z.max = r.stats[kMaxS];
  r.a.max = r.stats[kMaxT];
  const double sum_s = r.stats[kSumS];
  r.n.set_sums(sum_s, decoded_quotient(r.stats[kSumT]) * sum_s);
  r.clear_padding(c, gradient->target.last);
  const double slope = r.stats[kSlope];
  if (slope < 0) r.n.kind.overlap = S(1);
  GradientScale<S> scale;
  scale.student = static_cast<S>(factor * slope / r.n.tau_s);
  scale.centre_s = r.stats[kCentreS];
  scale.centre_t = r.stats[kCentreT];
  if (!kd::is_inf(scale.centre_t)) scale.teacher = static_cast<S>(factor * slope / r.n.tau_t);
  LabelTerm<S> label;
  if (c.labels != nullptr) {
    label = label_term<TS, S>(r.z, c.labels[index * c.label_stride], r.stats[kLabelLse],
                              factor * c.spec.label_weight);
  }
  gradients_from_logits(c, r, scale, label, factor, r.stats[kDivergence], gradient);
}

template <class TS, class TT>
void row(const DivergenceRows& c, bool forward, int64_t index, RowGradient<TS>* gradient) {
  forward ? forward_row<TS, TT>(c, index, gradient) : backward_row<TS, TT>(c, index, gradient);
}

// Row by row all parts of the sum: the student's row and the sum of the gradients stay in the
// cache.
template <class TS>
void rows(const DivergenceRows* parts, int64_t count, bool forward, int64_t begin, int64_t end) {
  using S = compute_t<TS>;
  RowGradient<TS> gradient;
  S* sum = nullptr;
  if (count > 1 && parts->grad_student.data != nullptr) {
    // A vector may start at the row's last entry (write_row behind an unaligned head).
    const int64_t length = parts->student_columns + Lanes<TS>::kLanes;
    sum = reinterpret_cast<S*>(block_scratch(static_cast<size_t>(length) * sizeof(S)));
  }
  for (int64_t index = begin; index < end; ++index) {
    bool holds = false;
    for (int64_t k = 0; k < count; ++k) {
      const DivergenceRows& c = parts[k];
      gradient.target = {row_of<TS>(c.grad_student, index), sum, holds, k == count - 1,
                         c.fresh_gradient};
      if constexpr (sizeof(S) == 8) {
        row<TS, double>(c, forward, index, &gradient);
      } else if (c.teacher.dtype == DType::kFloat16) {
        row<TS, f16>(c, forward, index, &gradient);
      } else if (c.teacher.dtype == DType::kBFloat16) {
        row<TS, bf16>(c, forward, index, &gradient);
      } else {
        row<TS, float>(c, forward, index, &gradient);
      }
      holds = gradient.target.holds;
    }
  }
  gradient.pending.finish();
}

void dispatch(const DivergenceRows* parts, int64_t count, bool forward, int64_t begin,
              int64_t end) {
  switch (parts->student.dtype) {
    case DType::kFloat64:
      return rows<double>(parts, count, forward, begin, end);
    case DType::kFloat16:
      return rows<f16>(parts, count, forward, begin, end);
    case DType::kBFloat16:
      return rows<bf16>(parts, count, forward, begin, end);
    default:
      return rows<float>(parts, count, forward, begin, end);
  }
}

}  // namespace

void divergence_forward_rows(const DivergenceRows* parts, int64_t count, int64_t begin,
                             int64_t end) {
  dispatch(parts, count, true, begin, end);
}
void divergence_backward_rows(const DivergenceRows* parts, int64_t count, int64_t begin,
                              int64_t end) {
  dispatch(parts, count, false, begin, end);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
