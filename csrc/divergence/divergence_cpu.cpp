// Row kernels of the divergences, compiled once per CPU ISA.
//
//   statistics   one read of both rows: normalisers, one-pass KL; leaves 2^u, 2^v (forward KL and
//                cross entropy) or u, v (every other kind) in an L2-sized scratch buffer
//   transform    scratch -> q, s in place, with the sums D, S, T
//   gradient     one pass over scratch, non-temporal stores into a fresh gradient
//
// Rows that do not fit the scratch, teacher and temperature gradients, and the backward recompute p
// and q from the logits block by block instead. A row's arithmetic depends on that row alone, so
// neither the number of threads nor the neighbours change a bit.
#include "common/parallel.h"
#include "divergence/divergence_exact.h"
#include "divergence/divergence_gradient.h"
#include "divergence/divergence_rows.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {
namespace {

constexpr double kExactBelow = 0.05;      // nats; one-pass values below are finished from the gap
constexpr double kExactBelowScale = 0.02;  // the same for other kinds, relative to what cancels
constexpr double kLog2e = 1.4426950408889634074;

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
  DivergenceGroup group;
  Form form;

  Row(const DivergenceRows& c, int64_t row) {
    first = per_row<S>(c.first, row, c.spec.first);
    n.kind = row_kind<S>(c.spec, first, per_row<S>(c.second, row, c.spec.second));
    n.tau_s = per_row<S>(c.student_temperature, row, c.spec.student_temperature);
    n.tau_t = c.has_teacher ? per_row<S>(c.teacher_temperature, row, c.spec.teacher_temperature)
                            : n.tau_s;
    n.scale_s = static_cast<S>(kLog2e / n.tau_s);
    n.scale_t = static_cast<S>(kLog2e / n.tau_t);
    n.has_linear = n.kind.forward_kl != S(0) || n.kind.reverse_kl != S(0) ||
                   n.kind.cross_entropy != S(0) || n.kind.entropy != S(0);
    z = {row_of<TS>(c.student, row), c.student_columns, n.scale_s, S(0)};
    a = {row_of<TT>(c.teacher, row), c.teacher_columns, n.scale_t, S(0)};
    grad_s = row_of<TS>(c.grad_student, row);
    grad_t = row_of<TT>(c.grad_teacher, row);
    grad_tau = static_cast<S*>(c.grad_temperature);
    if (grad_tau != nullptr) grad_tau += row * c.grad_temperature_stride[0];
    stats = static_cast<S*>(c.stats) + row * c.stats_stride;
    group = group_of(static_cast<Kind>(static_cast<int>(c.spec.kind)));
    form = form_of(n.kind, group);
  }

  // References and normalisers, after the statistics.
  void set_sums(double sum_s, double sum_t) {
    n.max_s = z.max;
    n.max_t = a.max;
    // A row without any possible entry has probabilities 0, not NaN.
    if (!(sum_s > 0)) sum_s = 1;
    if (!(sum_t > 0)) sum_t = 1;
    const double lse_s = __builtin_log2(sum_s), lse_t = __builtin_log2(sum_t);
    n.lse_s = static_cast<S>(lse_s);
    n.lse_t = static_cast<S>(lse_t);
    n.inverse_s = static_cast<S>(1 / sum_s);
    n.inverse_t = static_cast<S>(1 / sum_t);
    n.gap = lse_t - lse_s;
  }

  double exact() const {
    if (n.kind.other != S(0)) {
      switch (group) {
        case DivergenceGroup::kMixture: return exact_value<DivergenceGroup::kMixture>(z, a, n);
        case DivergenceGroup::kProbability:
          return exact_value<DivergenceGroup::kProbability>(z, a, n);
        case DivergenceGroup::kPower: return exact_value<DivergenceGroup::kPower>(z, a, n);
        case DivergenceGroup::kLinear: break;
      }
    }
    return exact_value<DivergenceGroup::kLinear>(z, a, n);
  }

  void fill(const DivergenceRows& c, S number) {
    if (grad_s != nullptr) fill_row(grad_s, 0, c.student_width, number);
    if (grad_t != nullptr) fill_row(grad_t, 0, c.teacher_width, number);
    if (grad_tau != nullptr) grad_tau[0] = grad_tau[c.grad_temperature_stride[1]] = number;
  }

  void clear_padding(const DivergenceRows& c) {
    if (grad_s != nullptr) fill_row(grad_s, z.columns, c.student_width, compute_t<TS>(0));
    if (grad_t != nullptr) fill_row(grad_t, a.columns, c.teacher_width, compute_t<TT>(0));
  }
};

// All terms of a row without scratch: the sums of run_form over blocks made from the logits.
template <class TS, class TT>
RowTerms terms_from_logits(const Row<TS, TT>& r) {
  using S = compute_t<TS>;
  using V = Lanes<TS>;
  alignas(64) S x[kBlock], y[kBlock];
  const int64_t columns = r.z.columns > r.a.columns ? r.z.columns : r.a.columns;
  RowTerms total;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = padded<V>(columns - begin < kBlock ? columns - begin : kBlock);
    for (int64_t i = 0; i < n; i += V::kLanes) {
      store(x + i, scaled_logits<V>(r.z, begin + i));
      store(y + i, scaled_logits<V>(r.a, begin + i));
    }
    const RowTerms block = run_form<Output::kNone, V>(r.form, r.group, x, y,
                                                      static_cast<S*>(nullptr),
                                                      static_cast<S*>(nullptr), n, r.n);
    total.value += block.value;
    total.scale += block.scale;
    total.student += block.student;
    total.teacher += block.teacher;
  }
  return total;
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
  *flowing = no_q && (c.forward_kl != S(0) || c.cross_entropy != S(0));
  *stopped = no_p && c.reverse_kl != S(0);
  if (c.other == S(0)) return;
  if (group == DivergenceGroup::kProbability) *stopped |= no_q && c.chi_squared != S(0);
  if (group == DivergenceGroup::kPower) {
    // q^beta diverges for beta < 0; beta = 0 keeps p^alpha log(p / q), with forward KL's gradient.
    *flowing |= no_q && c.beta == S(0);
    *stopped |= (no_q && c.beta < S(0)) || (no_p && c.alpha <= S(0));
  }
}

// The label term's numbers for the gradient. natural_lse: log-sum-exp of z at tau = 1.
template <class TS, class S>
LabelTerm<S> label_term(const Side<TS>& z, int64_t index, double natural_lse, double coefficient) {
  LabelTerm<S> label;
  // An impossible label makes the value infinite and has no gradient.
  const double logit = to_float(z.logits[index]);
  if (coefficient == 0 || !(logit > -__builtin_inf())) return label;
  label.index = index;
  label.coefficient = static_cast<S>(coefficient);
  label.max = static_cast<S>(natural_lse * kLog2e);
  label.lse = static_cast<S>(natural_lse * kLog2e - static_cast<double>(label.max));
  return label;
}

// Temperature gradients and the gradients of the logits, from the logits.
template <class TS, class TT>
void gradients_from_logits(const DivergenceRows& c, Row<TS, TT>& r,
                           const GradientScale<compute_t<TS>>& scale,
                           const LabelTerm<compute_t<TS>>& label, double factor, double divergence) {
  using S = compute_t<TS>;
  const bool tau = r.grad_tau != nullptr;
  double moment_s = 0, moment_t = 0;
  gradient_from_logits<TS, TT, S>(r.z, r.a, r.n, r.form, r.group, scale, label, r.grad_s, r.grad_t,
                                  c.fresh_gradient, tau ? &moment_s : nullptr,
                                  tau ? &moment_t : nullptr);
  if (!tau) return;
  // d/d tau of f(z / tau) = -sum z_v (df/dz_v) / tau, and z_v = u_v / scale + const.
  double by_s = -moment_s / (double(r.n.scale_s) * double(r.n.tau_s));
  const double by_t = -moment_t / (double(r.n.scale_t) * double(r.n.tau_t));
  if (c.spec.temperature_squared != 0) {
    if (c.spec.clip_token > 0 && divergence > c.spec.clip_token) divergence = c.spec.clip_token;
    by_s += 2 * double(r.n.tau_s) * divergence * factor;
  }
  r.grad_tau[0] = static_cast<S>(by_s);
  r.grad_tau[c.grad_temperature_stride[1]] = static_cast<S>(by_t);
}

template <class TS, class TT>
void forward_row(const DivergenceRows& c, int64_t index) {
  using S = compute_t<TS>;
  using V = Lanes<TS>;
  Row<TS, TT> r(c, index);
  const double factor = c.factor[index];
  for (int i = 0; i < kStats; ++i) r.stats[i] = S(0);
  c.values[index] = 0;
  if (!c.selected[index]) return r.fill(c, S(0));
  r.stats[kFactor] = static_cast<S>(factor);
  r.stats[kUnit] = static_cast<S>(c.unit[index]);

  // Statistics.
  const bool forward_only = r.form == Form::kForward;
  const int64_t columns = r.z.columns > r.a.columns ? r.z.columns : r.a.columns;
  // The second buffer starts away from the first one's 4 KiB aliases.
  const int64_t offset = (columns + 1023) / 1024 * 1024 + 16 * 17;
  const size_t bytes = static_cast<size_t>(offset + columns + 16) * sizeof(S);
  const bool fits = bytes <= kScratchLimit;
  const bool scratch_gradient =
      fits && r.grad_s != nullptr && r.grad_t == nullptr && r.grad_tau == nullptr;
  S *x = nullptr, *y = nullptr;
  if (fits && (scratch_gradient || !forward_only)) {
    x = reinterpret_cast<S*>(scratch(bytes));
    y = x + offset;
  }
  const RowSums<S> sums =
      x == nullptr   ? row_statistics<Keep::kNothing>(&r.z, &r.a, x, y)
      : forward_only ? row_statistics<Keep::kExponentials>(&r.z, &r.a, x, y)
                     : row_statistics<Keep::kLogits>(&r.z, &r.a, x, y);
  if (sums.is_nan) {
    constexpr S kNan = static_cast<S>(__builtin_nan(""));
    for (int i = 0; i < kFactor; ++i) r.stats[i] = kNan;
    if (factor != 0) c.values[index] = __builtin_nan("");
    return r.fill(c, factor != 0 ? kNan : S(0));
  }
  r.set_sums(sums.sum_s, sums.sum_t);
  const double sum_s = sums.sum_s > 0 ? sums.sum_s : 1, sum_t = sums.sum_t > 0 ? sums.sum_t : 1;

  // Value and centres.
  const bool impossible = c.has_teacher && !(sums.sum_t > 0);
  bool flowing = false, stopped = false;
  if (c.has_teacher) {
    infinite_kinds(r.n.kind, r.group, sums.no_q, sums.no_p, &flowing, &stopped);
  }
  double total = 0, centre_s = 0, centre_t = 0;
  if (forward_only) {
    const double f = r.n.kind.forward_kl, e = r.n.kind.cross_entropy;
    const double kl = kLn2 * (sums.gap / sum_t - r.n.gap);
    const double cross = -kLn2 * (sums.cross / sum_t - __builtin_log2(sum_s));
    total = f * kl + e * cross;
    centre_s = (f + e) * (1 - sums.reachable / sum_t);
    centre_t = total;
    if (f != 0 && kl < kExactBelow && !flowing && !impossible) total = r.exact();
  } else {
    const RowTerms terms =
        x == nullptr ? terms_from_logits(r)
        : scratch_gradient
            ? run_form<Output::kStudent, V>(r.form, r.group, x, y, x, x, padded<V>(columns), r.n)
            : run_form<Output::kNone, V>(r.form, r.group, x, y, x, x, padded<V>(columns), r.n);
    total = terms.value;
    centre_s = terms.student;
    centre_t = terms.teacher;
    const double size = __builtin_fabs(double(r.n.kind.other)) +
                        __builtin_fabs(double(r.n.kind.forward_kl)) +
                        __builtin_fabs(double(r.n.kind.reverse_kl)) + terms.scale;
    const bool small = !(total >= kExactBelowScale * size) || r.form == Form::kMath;
    if (small && !flowing && !stopped && !impossible) total = r.exact();
  }
  if (flowing || stopped) total = __builtin_inf();
  if (flowing || stopped) centre_t = __builtin_inf();
  if (stopped) centre_s = __builtin_inf();
  if (impossible) total = centre_s = centre_t = 0;
  const RowValue<double> value =
      finish_row<double>(total, c.spec, double(r.first), double(r.n.tau_s));
  // An infinite value whose slope is infinite too (Bhattacharyya of disjoint rows) has no gradient.
  const bool flat = stopped || impossible || __builtin_isinf(value.slope);
  const double slope = flat ? 0 : value.slope;

  // Label.
  double row_value = value.value, label_lse = 0;
  LabelTerm<S> label;
  if (c.labels != nullptr) {
    const int64_t gold = c.labels[index * c.label_stride];
    if (r.n.tau_s == S(1)) {
      label_lse = kLn2 * (double(r.z.max) + __builtin_log2(sum_s));
    } else {
      Side<TS> plain{r.z.logits, r.z.columns, static_cast<S>(kLog2e), S(0)};
      log_sum_exp(&plain, &label_lse);
      label_lse = kLn2 * (label_lse + double(plain.max));
    }
    const double logit = to_float(r.z.logits[gold]);
    row_value += c.spec.label_weight *
                 (logit > -__builtin_inf() ? label_lse - logit : __builtin_inf());
    label = label_term<TS, S>(r.z, gold, label_lse, factor * c.spec.label_weight);
  }
  r.stats[kMaxS] = r.z.max;
  r.stats[kSumS] = static_cast<S>(sum_s);
  r.stats[kMaxT] = r.a.max;
  r.stats[kSumT] = static_cast<S>(sum_t);
  r.stats[kDivergence] = static_cast<S>(value.divergence);
  r.stats[kCentreS] = static_cast<S>(centre_s);
  r.stats[kCentreT] = static_cast<S>(centre_t);
  r.stats[kSlope] = static_cast<S>(slope);
  r.stats[kLabelLse] = static_cast<S>(label_lse);
  r.stats[kValue] = static_cast<S>(row_value);
  c.values[index] = factor == 0 ? 0 : factor * row_value;
  if (r.grad_s == nullptr && r.grad_t == nullptr && r.grad_tau == nullptr) return;

  // Gradient.
  if (factor == 0) return r.fill(c, S(0));
  r.clear_padding(c);
  const double by_student = slope == 0 ? 0 : factor * slope / r.n.tau_s;
  GradientScale<S> scale;
  scale.student = static_cast<S>(by_student);
  scale.teacher =
      flowing || slope == 0 ? S(0) : static_cast<S>(factor * slope / r.n.tau_t);
  scale.centre_s = static_cast<S>(centre_s);
  scale.centre_t = static_cast<S>(centre_t);
  if (!scratch_gradient || by_student == 0) {
    return gradients_from_logits(c, r, scale, label, factor, value.divergence);
  }
  double cx, cy;
  if (forward_only) {  // x = 2^u, y = 2^v
    const double both = by_student * (r.n.kind.forward_kl + r.n.kind.cross_entropy);
    cx = both / sum_s * (sums.reachable / sum_t);
    cy = -both / sum_t;
  } else {  // x = q, y = s
    cx = -by_student * centre_s;
    cy = by_student;
  }
  if (label.index >= 0) {
    // The one-hot part, put into scratch: coefficient 1 where the vocabulary's pass multiplies by cy.
    if (r.n.tau_s == S(1)) {
      cx += double(label.coefficient) * (forward_only ? 1 / sum_s : 1);
    }
    if (cy != 0) y[label.index] -= static_cast<S>(double(label.coefficient) / cy);
    if (r.n.tau_s == S(1)) label.index = -1;
  }
  gradient_from_scratch(x, y, static_cast<S>(cx), static_cast<S>(cy), r.z, label, r.grad_s,
                        c.fresh_gradient);
}

template <class TS, class TT>
void backward_row(const DivergenceRows& c, int64_t index) {
  using S = compute_t<TS>;
  Row<TS, TT> r(c, index);
  const double upstream = per_row<S>(c.upstream, index, 1);
  const double factor = r.stats[kFactor] == S(0) ? 0 : r.stats[kFactor] * upstream;
  if (factor == 0) return r.fill(c, S(0));
  if (kd::is_nan(r.stats[kValue])) return r.fill(c, static_cast<S>(__builtin_nan("")));
  r.z.max = r.stats[kMaxS];
  r.a.max = r.stats[kMaxT];
  r.set_sums(r.stats[kSumS], r.stats[kSumT]);
  r.clear_padding(c);
  const double slope = r.stats[kSlope];
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
  gradients_from_logits(c, r, scale, label, factor, r.stats[kDivergence]);
}

template <class TS, class TT>
void rows(const DivergenceRows& c, bool forward, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (forward) {
      forward_row<TS, TT>(c, row);
    } else {
      backward_row<TS, TT>(c, row);
    }
  }
}

template <class TS>
void dispatch_teacher(const DivergenceRows& c, bool forward, int64_t begin, int64_t end) {
  switch (c.teacher.dtype) {
    case DType::kFloat16: return rows<TS, f16>(c, forward, begin, end);
    case DType::kBFloat16: return rows<TS, bf16>(c, forward, begin, end);
    default: return rows<TS, float>(c, forward, begin, end);
  }
}

void dispatch(const DivergenceRows& c, bool forward, int64_t begin, int64_t end) {
  switch (c.student.dtype) {
    case DType::kFloat64: return rows<double, double>(c, forward, begin, end);
    case DType::kFloat16: return dispatch_teacher<f16>(c, forward, begin, end);
    case DType::kBFloat16: return dispatch_teacher<bf16>(c, forward, begin, end);
    default: return dispatch_teacher<float>(c, forward, begin, end);
  }
}

}  // namespace

void divergence_forward_rows(const DivergenceRows& call, int64_t begin, int64_t end) {
  dispatch(call, true, begin, end);
}
void divergence_backward_rows(const DivergenceRows& call, int64_t begin, int64_t end) {
  dispatch(call, false, begin, end);
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
