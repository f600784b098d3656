// The student gradient of a sum of several divergences: one block takes a row, reads the student's
// chunk once and every teacher's beside it, adds the parts in registers and writes once. Everything
// else about a part comes from its statistics, which its forward left (divergence_kernel.cuh).
//
// Traffic in logits tensors for K teachers: K + 1 reads and 1 write here, where K calls of their
// own read 2 K, write K, and leave K - 1 additions of gradients (2 reads and a write each) to
// others. Nothing is gathered in memory, so a 16-bit gradient is rounded once and in place costs
// nothing: the thread that writes a chunk has read it, and the statistics were launches of their
// own.
#pragma once

#include "common/reduce.cuh"
#include "divergence/divergence_rows.cuh"

namespace kd::cuda {

template <class F>
struct SumPart {
  Rows teacher;  // (N, V'), or none
  int64_t valid_teacher;
  PerRow<F> student_temperature, teacher_temperature, first, second;
  const F* stats;  // (N, kStats)
  int64_t stats_stride;
  DivergenceGroup group;
  bool kind_per_row;
  RowKind<F> kind;
  DivergenceSpec spec;
};

template <class F>
struct SumParams {
  int64_t rows;
  Rows student, grad_student;  // (N, V)
  int64_t valid_student;
  const int64_t* labels;
  int64_t labels_stride;
  PerRow<F> upstream;
  int count;
  SumPart<F> parts[kMostSumParts];
};
static_assert(sizeof(SumParams<float>) <= 4096, "parameters of a kernel, on every architecture");

// What the gradient of one part of one row is made from.
template <class F>
struct PartOfRow {
  RowSoftmax<F> softmax;
  RowKind<F> kind;
  F scale;   // factor x slope / tau_s; 0: nothing, whatever the terms are
  F centre;  // S of divergence_math.h
  F label, label_lse;
  DivergenceGroup group;
  int is_nan;  // no bool: copying its padding would take a stack

  KD_DEVICE PartOfRow(const SumParams<F>& params, const SumPart<F>& part, int64_t row)
      : softmax(sums_of(part, row), part.student_temperature.at(row),
                part.teacher_temperature.at(row)),
        kind(part.kind),
        scale(F(0)),
        centre(F(0)),
        label(F(0)),
        label_lse(F(0)),
        group(part.group),
        is_nan(0) {
    const F* stats = part.stats + row * part.stats_stride;
    const F slope = stats[kSlope];
    const F factor = stats[kFactor] == F(0) ? F(0) : stats[kFactor] * params.upstream.at(row);
    // A NaN value with a number as slope: the row was refused (label, temperature).
    if (factor == F(0) || (kd::is_nan(stats[kValue]) && !kd::is_nan(slope))) return;
    is_nan = kd::is_nan(slope);
    if (part.kind_per_row && group != DivergenceGroup::kLinear) {
      kind = row_kind(part.spec, part.first.at(row), part.second.at(row));
    }
    const bool may_overlap = group >= DivergenceGroup::kProbability;
    if (may_overlap && slope < F(0)) kind.overlap = F(1);
    scale = factor * slope / part.student_temperature.at(row);
    centre = stats[kCentreS];
    label_lse = stats[kLabelLse];
    if (params.labels) label = factor * static_cast<F>(part.spec.label_weight);
  }

  KD_DEVICE bool is_silent() const { return scale == F(0) && label == F(0); }

 private:
  KD_DEVICE static RowSums<F> sums_of(const SumPart<F>& part, int64_t row) {
    const F* stats = part.stats + row * part.stats_stride;
    return {stats[kMaxS], stats[kSumS], stats[kMaxT], stats[kSumT]};
  }
};

// Adds one part's gradient of a chunk whose label stands at `label_at`.
template <DivergenceGroup G, class F>
KD_DEVICE void add_part(const PartOfRow<F>& part, const F (&z)[kChunk], const F (&a)[kChunk],
                        int64_t label_at, F (&sum)[kChunk]) {
  const bool label_at_tau = part.softmax.student.scale == F(kLog2E);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const Entry<F> e = part.softmax.entry(z[i], a[i]);
    F g = F(0);
    if (part.scale != F(0)) {
      const Terms<F> t = terms<G>(e, part.kind);
      g = part.scale * (t.student - e.q * part.centre);
    }
    if (part.label != F(0)) {
      const F q = label_at_tau ? e.q : exp2((z[i] - part.label_lse) * F(kLog2E));
      g += part.label * (q - (label_at == i ? F(1) : F(0)));
    }
    if (z[i] > F(-kInfinity)) sum[i] += g;
  }
}

template <class F>
__global__ void __launch_bounds__(kMaxThreads, 2)
    divergence_sum_row_kernel(const __grid_constant__ SumParams<F> params) {
  using Slots = SharedSlot<PartOfRow<F>>[kMostSumParts];
  KD_SHARED(Slots, slots);
  const int64_t chunks = (params.student.columns + kChunk - 1) / kChunk;
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    bool is_nan = false;
    if (static_cast<int>(threadIdx.x) < params.count) {
      const PartOfRow<F> part(params, params.parts[threadIdx.x], row);
      slots[threadIdx.x].put(part);
      is_nan = part.is_nan != 0;
    }
    const bool row_is_nan = __syncthreads_or(is_nan);
    const AnyRow<F> student(params.student, row, params.valid_student);
    const AnyRow<F> gradient(params.grad_student, row, params.grad_student.columns);
    for (int64_t c = threadIdx.x; c < chunks; c += blockDim.x) {
      const int64_t begin = c * kChunk;
      const int64_t label_at =
          params.labels ? params.labels[row * params.labels_stride] - begin : -1;
      F z[kChunk], sum[kChunk];
      student.load(begin, z);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sum[i] = row_is_nan ? F(NAN) : F(0);
      for (int k = 0; !row_is_nan && k < params.count; ++k) {
        // In place: a copy would have to wait in registers for the kinds that do not read it.
        const auto& part = *reinterpret_cast<const PartOfRow<F>*>(slots[k].bytes);
        if (part.is_silent()) continue;
        F a[kChunk];
        const SumPart<F>& given = params.parts[k];
        AnyRow<F>(given.teacher, row, given.valid_teacher).load(begin, a);
        switch (part.group) {
          case DivergenceGroup::kLinear:
            add_part<DivergenceGroup::kLinear>(part, z, a, label_at, sum);
            break;
          case DivergenceGroup::kMixture:
            add_part<DivergenceGroup::kMixture>(part, z, a, label_at, sum);
            break;
          case DivergenceGroup::kProbability:
            add_part<DivergenceGroup::kProbability>(part, z, a, label_at, sum);
            break;
          case DivergenceGroup::kPower:
            add_part<DivergenceGroup::kPower>(part, z, a, label_at, sum);
            break;
        }
      }
      gradient.store(begin, sum);
    }
    __syncthreads();  // the slots are free for the next row
  }
}

}  // namespace kd::cuda
