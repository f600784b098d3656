// The row kernels: one block takes a row pair, whatever its length.
//
//   1. statistics   one read of both rows; for the linear group also the value, see below
//   2. terms        a second read: sums of value, student and teacher terms; the linear group skips
//                   it where its one-pass value is far from cancelling
//   3. gradient     a last read and the write (in the forward kernel for upstream 1)
//
// Every thread of the block gets the same reduced sums and does the row's scalar arithmetic itself:
// that is cheaper than one thread doing it and a barrier to hand it around.
//
// In place (grad_student is student): in step 3 a thread reads its chunk, then writes it; nobody
// else reads those elements, and the reductions of steps 1 and 2 end with a barrier.
#pragma once

#include "common/launch.h"
#include "common/reduce.cuh"
#include "divergence/divergence_rows.cuh"

namespace kd::cuda {

// ---- 1. statistics -----------------------------------------------------------------------------

// Sums beside the normaliser. kForward: the difference of the logits, weighted by the teacher;
// kLinear: that and the student's own logit, weighted by either row.
template <Variant kVariant>
constexpr int kTeacherSums = kVariant == Variant::kForward  ? 2
                             : kVariant == Variant::kLinear ? 3
                                                            : 1;
template <Variant kVariant>
constexpr int kStudentSums = kVariant == Variant::kLinear ? 3 : 1;

template <Variant kVariant, class F>
struct Statistics {
  LogitSums<F, kTeacherSums<kVariant>> teacher;
  LogitSums<F, kStudentSums<kVariant>> student;

  KD_HOST_DEVICE void merge(const Statistics& other) {
    teacher.merge(other.teacher);
    student.merge(other.student);
  }
};

template <class F>
KD_DEVICE F largest(const F (&x)[kChunk]) {
  F top = x[0];
#pragma unroll
  for (int i = 1; i < kChunk; ++i) top = max(top, x[i]);
  return top;
}

// The normaliser alone, at another scale: log-sum-exp for the label at tau = 1.
template <class F>
KD_DEVICE void push_plain(LogitSums<F, 1>& sums, const F (&x)[kChunk], F top) {
  if (top > sums.max) sums.raise(top);
  const F reference = sums.reference();
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sums.add(exp2((x[i] - reference) * sums.scale));
}

template <Variant kVariant, class Pair, class F>
KD_DEVICE Statistics<kVariant, F> row_statistics(const Pair& pair, F student_scale, F teacher_scale,
                                                 const Origin<F>& origin, bool same,
                                                 bool with_label, LogitSums<F, 1>& label) {
  Statistics<kVariant, F> sums;
  sums.student.scale = student_scale;
  sums.teacher.scale = teacher_scale;
  label.scale = F(kLog2E);
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], a[kChunk];
    pair.load(c, z, a);
    const F top_z = largest(z), top_a = largest(a);
    // NaN never raises; it arrives in the sums.
    if (top_z > sums.student.max) sums.student.raise(top_z);
    if (top_a > sums.teacher.max) sums.teacher.raise(top_a);
    const F mz = sums.student.reference(), ma = sums.teacher.reference();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const F eq = exp2((z[i] - mz) * student_scale), ep = exp2((a[i] - ma) * teacher_scale);
      sums.student.add(eq);
      sums.teacher.add(ep);
      if constexpr (kVariant == Variant::kForward || kVariant == Variant::kLinear) {
        const F own = z[i] - origin.student, other = a[i] - origin.teacher;
        F w = fma(other, teacher_scale, -(own * student_scale));
        if (same) w = (origin.close ? (a[i] - z[i]) - origin.lead : other - own) * student_scale;
        sums.teacher.add_weight(1, ep, w);
        if constexpr (kVariant == Variant::kLinear) {
          sums.teacher.add_weight(2, ep, own * student_scale);
          sums.student.add_weight(1, eq, -w);
          sums.student.add_weight(2, eq, own * student_scale);
        }
      }
    }
    if (with_label) push_plain(label, z, top_z);
  }
  sums = block_reduce(sums);
  if (with_label) label = block_reduce(label);
  return sums;
}

// ---- 2. terms ----------------------------------------------------------------------------------

template <class F>
struct TermSums {
  F value, student, teacher;
  F excess;  // sum of q - p: what rounding made of 0

  KD_HOST_DEVICE TermSums() : value(F(0)), student(F(0)), teacher(F(0)), excess(F(0)) {}
  KD_HOST_DEVICE void merge(const TermSums& other) {
    excess += other.excess;
    value += other.value;
    student += other.student;
    teacher += other.teacher;
  }
};

// Whether the common error of all d moves the value: by its square where d enters squared, by
// itself in the probability and power groups. Never for rows that differ by more than rounding
// does.
template <Variant kVariant, class F>
KD_DEVICE bool needs_correction(const TermSums<F>& sums) {
  const bool squared = kVariant != Variant::kProbability && kVariant != Variant::kPower;
  const F moved = squared ? sums.excess * sums.excess : abs(sums.excess);
  return moved > F(1e-6) * sums.value && abs(sums.excess) < F(1e-3);
}

template <Variant kVariant, class Pair, class F>
KD_DEVICE TermSums<F> row_terms(const Pair& pair, RowSoftmax<F>& softmax, const RowKind<F>& kind,
                                bool with_teacher) {
  for (int attempt = 0;; ++attempt) {
    TermSums<F> sums;
    for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
      F z[kChunk], a[kChunk];
      pair.load(c, z, a);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const Entry<F> e = softmax.entry(z[i], a[i]);
        const Terms<F> t = terms<group_of(kVariant)>(e, kind);
        sums.value += t.value;
        sums.student += t.student;
        sums.teacher += t.teacher;
        sums.excess += excess_of(e);
      }
    }
    sums = block_reduce(sums);
    // At most one more read, of rows that nearly agree.
    if (attempt == 1 || !with_teacher || !needs_correction<kVariant>(sums)) return sums;
    softmax.correct(sums.excess);
  }
}

// A one-pass value is the difference of two sums x and y (log2 units). It is taken only where it is
// at least a tenth of them and 0.05 nats: then float32 leaves it right to 1e-5.
template <class F>
KD_DEVICE bool is_reliable(F value, F x, F y) {
  return value < F(kInfinity) && value >= F(0.1) * max(max(abs(x), abs(y)), F(0.72));
}

// Values of the linear group out of the one-pass sums; false where a second read is needed.
template <Variant kVariant, class F>
KD_DEVICE bool one_pass_terms(const Statistics<kVariant, F>& sums, const RowSoftmax<F>& softmax,
                              const Origin<F>& origin, const RowKind<F>& kind, TermSums<F>& out) {
  if constexpr (kVariant != Variant::kForward && kVariant != Variant::kLinear) {
    return false;
  } else {
    if (kind.clip_element > F(0)) return false;
    bool reliable = true;
    const auto add = [&](F coefficient, F x, F y, F& centre) {
      if (coefficient == F(0)) return;
      reliable = reliable && is_reliable(x + y, x, y);
      const F value = coefficient * (F(kLn2) * (x + y));
      out.value += value;
      centre += value;
    };
    // Sums of s_v and t_v, from linear_terms: reverse KL and the entropy move the student's centre,
    // forward KL and the cross entropy the teacher's.
    const F gap = softmax.gap(origin);
    add(kind.forward_kl, sums.teacher.mean(1), -gap, out.teacher);
    if constexpr (kVariant == Variant::kLinear) {
      const Softmax<F>& s = softmax.student;
      const F lse = (s.reference - origin.student) * s.scale + s.log2_sum;
      add(kind.reverse_kl, sums.student.mean(1), gap, out.student);
      add(kind.cross_entropy, -sums.teacher.mean(2), lse, out.teacher);
      add(kind.entropy, -sums.student.mean(2), lse, out.student);
    }
    return reliable;
  }
}

// ---- the row between its reads -----------------------------------------------------------------

// What is known of a row before its logits are read.
template <class F>
struct RowFacts {
  F student_tau, teacher_tau;
  bool selected;
  bool labelled;
  bool valid;  // label and temperatures make sense; if not: loss NaN, gradient 0

  KD_DEVICE RowFacts(const RowParams<F>& params, int64_t row)
      : student_tau(params.student_temperature.at(row)),
        teacher_tau(params.teacher_temperature.at(row)),
        selected(params.mask == nullptr || params.mask[row * params.mask_stride]),
        labelled(params.labels && params.spec.label_weight != 0),
        valid(student_tau > F(0) && teacher_tau > F(0)) {
    if (params.labels) {
      const int64_t label = params.label(row);
      selected = selected && label != static_cast<int64_t>(params.spec.ignore_index);
      valid = valid && (!labelled || (label >= 0 && label < params.valid_student));
    }
  }

  KD_DEVICE bool same_temperature() const { return student_tau == teacher_tau; }
};

template <Variant kVariant, class F>
KD_DEVICE RowKind<F> kind_of(const RowParams<F>& params, int64_t row) {
  RowKind<F> kind = params.kind;
  if constexpr (kVariant == Variant::kForward) {
    // Literal zeros, so that the compiler drops the other three.
    kind.reverse_kl = kind.cross_entropy = kind.entropy = kind.clip_element = F(0);
  } else if constexpr (kVariant != Variant::kLinear) {
    if (params.kind_per_row)
      kind = row_kind(params.spec, params.first.at(row), params.second.at(row));
  }
  return kind;
}

// D, its value and slope from the sums; sets the centres to 0 where there is no gradient.
template <class F>
KD_DEVICE RowValue<F> value_of(TermSums<F>& sums, const RowParams<F>& params, int64_t row,
                               const RowFacts<F>& facts, const RowSoftmax<F>& softmax,
                               const RowKind<F>& kind) {
  const F total = softmax.student.sum + softmax.teacher.sum;
  if (is_nan(total)) return {total, total, total};
  if (params.teacher.data && softmax.teacher.is_empty()) {
    sums = TermSums<F>();
    return {F(0), F(0), F(0)};
  }
  // The logits hold no NaN, so one in the sums comes from inf - inf. Opposed exponents whose sum is
  // not positive diverge where a probability is 0, whatever their derivatives do.
  const bool opposed = kind.alpha + kind.beta <= F(0) && kind.beta != F(0);
  if (is_nan(sums.value) || !(abs(sums.student) < F(kInfinity)) ||
      (opposed && is_inf(sums.value))) {
    sums.student = sums.teacher = F(0);
    const F clip = static_cast<F>(params.spec.clip_token);
    F value = clip > F(0) ? clip : F(kInfinity);
    if (params.spec.temperature_squared != 0) value *= facts.student_tau * facts.student_tau;
    return {F(kInfinity), value, F(0)};
  }
  RowValue<F> out = finish_row(sums.value, params.spec, params.first.at(row), facts.student_tau,
                               kind.overlap != F(0));
  if (!(abs(out.slope) < F(1e37))) out.slope = F(0);
  return out;
}

// ---- 3. gradient -------------------------------------------------------------------------------

template <class F>
struct GradientPlan {
  F student, teacher;    // factor x slope / tau
  F label;               // factor x label weight; 0 without a label
  F centre_s, centre_t;  // S and T of divergence_math.h
  F label_lse;           // natural log-sum-exp of the student at tau = 1
  F temperature;         // d(row value)/d tau_s through tau_s^2, times factor
  int64_t label_column;

  KD_DEVICE GradientPlan(const RowParams<F>& params, int64_t row, const RowFacts<F>& facts,
                         F factor, F slope, F divergence, const TermSums<F>& sums, F lse)
      : student(factor * slope / facts.student_tau),
        teacher(is_inf(sums.teacher) ? F(0) : factor * slope / facts.teacher_tau),
        label(facts.labelled ? factor * static_cast<F>(params.spec.label_weight) : F(0)),
        centre_s(sums.student),
        centre_t(sums.teacher),
        label_lse(lse),
        temperature(F(0)),
        label_column(facts.labelled ? params.label(row) : -1) {
    if (params.spec.temperature_squared != 0) {
      const F clip = static_cast<F>(params.spec.clip_token);
      const F clipped = clip > F(0) && divergence > clip ? clip : divergence;
      temperature = factor * F(2) * facts.student_tau * clipped;
    }
  }
};

template <class F>
struct PairSum {
  F student, teacher;
  KD_HOST_DEVICE PairSum() : student(F(0)), teacher(F(0)) {}
  KD_HOST_DEVICE void merge(const PairSum& other) {
    student += other.student;
    teacher += other.teacher;
  }
};

template <class F>
KD_DEVICE void store_temperatures(const RowParams<F>& params, int64_t row, F student, F teacher) {
  if (params.grad_temperature == nullptr || threadIdx.x != 0) return;
  F* out = params.grad_temperature + row * params.grad_temperature_stride;
  out[0] = student;
  out[1] = teacher;
}

// A row whose gradient is the same everywhere: 0, or NaN. Reads no logit.
template <class Pair, class F>
KD_DEVICE void fill_gradients(const Pair& pair, const RowParams<F>& params, int64_t row, F value) {
  F g[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) g[i] = value;
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    if (pair.wants_student()) pair.store_student(c, g);
    if (pair.wants_teacher()) pair.store_teacher(c, g);
  }
  store_temperatures(params, row, value, value);
}

template <Variant kVariant, class Pair, class F>
KD_DEVICE void write_gradients(const Pair& pair, const RowParams<F>& params, int64_t row,
                               const RowSoftmax<F>& softmax, const RowKind<F>& kind,
                               const GradientPlan<F>& plan) {
  const bool with_label = plan.label != F(0);
  const bool label_at_tau = softmax.student.scale == F(kLog2E);
  const F lse_s = F(kLn2) * softmax.student.lse(), lse_t = F(kLn2) * softmax.teacher.lse();
  PairSum<F> temperatures;
  for (int64_t c = threadIdx.x; c < pair.count(); c += blockDim.x) {
    F z[kChunk], a[kChunk];
    pair.load(c, z, a);
    const int64_t label_at = plan.label_column - pair.begin(c);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const Entry<F> e = softmax.entry(z[i], a[i]);
      const Terms<F> t = terms<group_of(kVariant)>(e, kind);
      const bool z_moves = z[i] > F(-kInfinity), a_moves = a[i] > F(-kInfinity);
      // The rows are overwritten here: their logits are not needed any more.
      F gz = F(0), ga = F(0);
      if (plan.student != F(0)) {
        const F g = plan.student * (t.student - e.q * plan.centre_s);
        // d/d tau is -sum z g / tau. With log q = z / tau - lse in the place of z the sum stays
        // small; what an impossible entry has in the centre makes up for the lse.
        temperatures.student -= z_moves ? e.lq * g : -lse_s * g;
        if (z_moves) gz = g;
      }
      if (plan.teacher != F(0)) {
        const F g = plan.teacher * (t.teacher - e.p * plan.centre_t);
        temperatures.teacher -= a_moves ? e.lp * g : -lse_t * g;
        if (a_moves) ga = g;
      }
      if (with_label) {
        const F q = label_at_tau ? e.q : exp2((z[i] - plan.label_lse) * F(kLog2E));
        if (z_moves) gz += plan.label * (q - (label_at == i ? F(1) : F(0)));
      }
      z[i] = gz;
      a[i] = ga;
    }
    if (pair.wants_student()) pair.store_student(c, z);
    if (pair.wants_teacher()) pair.store_teacher(c, a);
  }
  if (params.grad_temperature) {
    temperatures = block_reduce(temperatures);
    store_temperatures(params, row, temperatures.student + plan.temperature, temperatures.teacher);
  }
}

// ---- kernels -----------------------------------------------------------------------------------

template <Variant kVariant, class T, class F>
KD_DEVICE void forward_row(const RowParams<F>& params, int64_t row) {
  const RowFacts<F> facts(params, row);
  const RowPair<T, F> pair(params, row);
  F* stats = params.stats + row * params.stats_stride;
  F unit = F(0), factor = F(0);
  const bool wants_gradient =
      pair.wants_student() || pair.wants_teacher() || params.grad_temperature;

  const auto write = [&](const RowSums<F>& row_sums, const TermSums<F>& sums, F divergence, F slope,
                         F lse, F value) {
    // Only now, to keep them out of the loops' registers.
    if (facts.selected) {
      unit = params.unit_is_ready ? stats[kUnit] : F(1) / params.divisor.at(row);
      factor = unit * params.weight.at(row);
    }
    if (threadIdx.x != 0) return;
    stats[kMaxS] = row_sums.student_reference;
    stats[kSumS] = row_sums.student_sum;
    stats[kMaxT] = row_sums.teacher_reference;
    stats[kSumT] = row_sums.quotient;
    stats[kDivergence] = divergence;
    stats[kCentreS] = sums.student;
    stats[kCentreT] = sums.teacher;
    stats[kSlope] = slope;
    stats[kLabelLse] = lse;
    stats[kValue] = value;
    stats[kFactor] = factor;
    if (!params.unit_is_ready) stats[kUnit] = unit;
    if (params.value)
      params.value[row * params.value_stride] = factor == F(0) ? F(0) : factor * value;
  };

  if (!facts.selected || !facts.valid) {
    const F value = facts.selected ? F(NAN) : F(0);
    write(RowSums<F>{F(0), F(0), F(0), F(0)}, TermSums<F>(), value, F(0), F(0), value);
    if (wants_gradient) fill_gradients(pair, params, row, F(0));
    return;
  }

  RowKind<F> kind = kind_of<kVariant>(params, row);
  const bool same = facts.same_temperature(), labelled = facts.labelled;
  const bool label_apart = labelled && facts.student_tau != F(1);
  const Origin<F> origin(pair);
  LogitSums<F, 1> label;
  const Statistics<kVariant, F> statistics =
      row_statistics<kVariant>(pair, F(kLog2E) / facts.student_tau, F(kLog2E) / facts.teacher_tau,
                               origin, same, label_apart, label);
  RowSoftmax<F> softmax(
      Softmax<F>(facts.student_tau, statistics.student.max, statistics.student.sum[0]),
      Softmax<F>(facts.teacher_tau, statistics.teacher.max, statistics.teacher.sum[0]), same);

  TermSums<F> sums;
  if (!one_pass_terms(statistics, softmax, origin, kind, sums)) {
    sums = row_terms<kVariant>(pair, softmax, kind, params.teacher.data != nullptr);
  }
  if constexpr (kVariant == Variant::kProbability || kVariant == Variant::kPower) {
    if (hardly_overlaps(sums.value, kind, params.spec, params.first.at(row))) {
      kind.overlap = F(1);
      sums = row_terms<kVariant>(pair, softmax, kind, true);
    }
  }
  const RowValue<F> result = value_of(sums, params, row, facts, softmax, kind);
  F value = result.value, lse = F(0);
  if (labelled) {
    const Softmax<F> at_one =
        label_apart ? Softmax<F>(F(1), label.max, label.sum[0]) : softmax.student;
    lse = fma(F(kLn2), at_one.log2_sum, at_one.reference);
    const F nll = F(kLn2) * (at_one.log2_sum - at_one.exponent(pair.student_at(params.label(row))));
    __syncthreads();  // in place: everybody has the label's logit before anybody writes
    value += static_cast<F>(params.spec.label_weight) * nll;
  }
  const RowSums<F> row_sums = softmax.row_sums();
  write(row_sums, sums, result.divergence, result.slope, lse, value);

  if (!wants_gradient) return;
  if (factor == F(0) || is_nan(result.slope)) {
    return fill_gradients(pair, params, row, factor == F(0) ? F(0) : F(NAN));
  }
  // From what is stored, so that a backward repeats this gradient to the bit.
  write_gradients<kVariant>(
      pair, params, row, RowSoftmax<F>(row_sums, facts.student_tau, facts.teacher_tau), kind,
      GradientPlan<F>(params, row, facts, factor, result.slope, result.divergence, sums, lse));
}

template <Variant kVariant, class T, class F>
KD_DEVICE void backward_row(const RowParams<F>& params, int64_t row) {
  const RowPair<T, F> pair(params, row);
  const F* stats = params.stats + row * params.stats_stride;
  const F slope = stats[kSlope];
  const F factor = stats[kFactor] == F(0) ? F(0) : stats[kFactor] * params.upstream.at(row);
  // A NaN value with a number as slope: the row was refused (label, temperature).
  if (factor == F(0) || (is_nan(stats[kValue]) && !is_nan(slope))) {
    return fill_gradients(pair, params, row, F(0));
  }
  if (is_nan(slope)) return fill_gradients(pair, params, row, F(NAN));
  const RowFacts<F> facts(params, row);
  RowKind<F> kind = kind_of<kVariant>(params, row);
  if constexpr (kVariant == Variant::kProbability || kVariant == Variant::kPower) {
    if (slope < F(0)) kind.overlap = F(1);
  }
  const RowSums<F> row_sums{stats[kMaxS], stats[kSumS], stats[kMaxT], stats[kSumT]};
  const RowSoftmax<F> softmax(row_sums, facts.student_tau, facts.teacher_tau);
  TermSums<F> sums;
  sums.student = stats[kCentreS];
  sums.teacher = stats[kCentreT];
  const GradientPlan<F> plan(params, row, facts, factor, slope, stats[kDivergence], sums,
                             stats[kLabelLse]);
  write_gradients<kVariant>(pair, params, row, softmax, kind, plan);
}

// Blocks that share a multiprocessor: while one reduces, another loads. It bounds the registers: 64
// a thread for four blocks, 128 for two, all of them for one, where what ptxas really uses decides.
// With these numbers no kernel spills on its architecture (`make ptxas`).
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
constexpr int kBlocksOfForwardKl = 4, kBlocksOfItsBackward = 4;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kBlocksOfForwardKl = 1, kBlocksOfItsBackward = 2;
#else
constexpr int kBlocksOfForwardKl = 2, kBlocksOfItsBackward = 2;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocksOfMixedLinear = 1;
#else
constexpr int kBlocksOfMixedLinear = 2;
#endif
template <Variant kVariant, class T, bool kForward>
constexpr int blocks_per_multiprocessor() {
  constexpr bool kMixed = std::is_same<T, AnyFloat>::value;
  if (kVariant == Variant::kForward && !kMixed) {
    return kForward ? kBlocksOfForwardKl : kBlocksOfItsBackward;
  }
  return kVariant == Variant::kLinear && kMixed && kForward ? kBlocksOfMixedLinear : 2;
}

template <Variant kVariant, class T, class F>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_multiprocessor<kVariant, T, true>())
    divergence_fwd_row_kernel(const __grid_constant__ RowParams<F> params) {
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    forward_row<kVariant, T>(params, row);
  }
}

template <Variant kVariant, class T, class F>
__global__ void __launch_bounds__(kMaxThreads, blocks_per_multiprocessor<kVariant, T, false>())
    divergence_bwd_row_kernel(const __grid_constant__ RowParams<F> params) {
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    backward_row<kVariant, T>(params, row);
  }
}

// ---- launchers ---------------------------------------------------------------------------------

template <Variant kVariant, class T, class F>
void launch_rows_as(const RowParams<F>& params, bool forward, const LaunchInfo& info) {
  forward ? launch(info, divergence_fwd_row_kernel<kVariant, T, F>, params)
          : launch(info, divergence_bwd_row_kernel<kVariant, T, F>, params);
}

template <Variant kVariant, class F>
void launch_rows(const RowParams<F>& params, bool forward, const LaunchInfo& info) {
  if constexpr (std::is_same<F, float>::value) {
    // Equal types, the common case, are compiled in; mixtures are looked up chunk by chunk, which
    // costs branches and keeps the compilation of seven architectures within minutes.
    const DType type = params.student.dtype;
    if (params.teacher.data == nullptr || params.teacher.dtype == type) {
      if (type == DType::kFloat32) return launch_rows_as<kVariant, float>(params, forward, info);
      if (type == DType::kFloat16) return launch_rows_as<kVariant, f16>(params, forward, info);
      return launch_rows_as<kVariant, bf16>(params, forward, info);
    }
  }
  launch_rows_as<kVariant, AnyFloat>(params, forward, info);
}

}  // namespace kd::cuda

// Each group is compiled in a file of its own, so that the compilers share the work.
#if defined(__CUDACC__)
#define KD_INSTANTIATE_ROWS(variant)                                                           \
  template void kd::cuda::launch_rows<variant, float>(const kd::cuda::RowParams<float>&, bool, \
                                                      const kd::LaunchInfo&);
#else
#define KD_INSTANTIATE_ROWS(variant)                                                             \
  template void kd::cuda::launch_rows<variant, float>(const kd::cuda::RowParams<float>&, bool,   \
                                                      const kd::LaunchInfo&);                    \
  template void kd::cuda::launch_rows<variant, double>(const kd::cuda::RowParams<double>&, bool, \
                                                       const kd::LaunchInfo&);
#endif
