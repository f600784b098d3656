// What the row kernels share: the parameters of a launch, how a block walks a pair of rows, and how
// two logits become an entry of divergence_math.h.
#pragma once

#include "common/half.h"
#include "common/launch.h"
#include "common/scalar.h"
#include "common/simt.h"
#include "common/vec.h"
#include "divergence/divergence.h"
#include "divergence/divergence_math.h"

namespace kd::cuda {

// Elements a thread takes at a time: 16 bytes of a half type.
constexpr int kChunk = 8;

// One number a row, or one for all of them.
template <class F>
struct PerRow {
  const F* data;
  int64_t stride;
  F number;

  KD_DEVICE F at(int64_t row) const { return data ? data[row * stride] : number; }
};

// Strided rows with contiguous columns; data is null for an argument that was not given.
struct Rows {
  void* data;
  int64_t stride;
  int64_t columns;
  DType dtype;
};

template <class F>
struct RowParams {
  int64_t rows;
  Rows student;       // (N, V)
  Rows teacher;       // (N, V')
  Rows grad_student;  // (N, V)
  Rows grad_teacher;  // (N, V')
  int64_t valid_student, valid_teacher;
  PerRow<F> student_temperature, teacher_temperature, first, second;
  PerRow<F> weight, divisor, upstream;
  const int64_t* labels;
  int64_t labels_stride;
  const bool* mask;
  int64_t mask_stride;
  F* stats;  // (N, kStats)
  int64_t stats_stride;
  F* value;  // (N,), only for Reduction::kNone
  int64_t value_stride;
  F* grad_temperature;  // (N, 2)
  int64_t grad_temperature_stride;
  bool unit_is_ready;  // the select kernel has written kUnit
  bool kind_per_row;   // first or second is a tensor: `kind` must be made again for every row
  RowKind<F> kind;
  DivergenceSpec spec;
};

// What the kernels are instantiated for. kForward is the linear group with forward_kl alone, which
// needs half the sums; the others are the groups of divergence.h.
enum class Variant { kForward, kLinear, kMixture, kProbability, kPower };

constexpr DivergenceGroup group_of(Variant variant) {
  return variant == Variant::kMixture       ? DivergenceGroup::kMixture
         : variant == Variant::kProbability ? DivergenceGroup::kProbability
         : variant == Variant::kPower       ? DivergenceGroup::kPower
                                            : DivergenceGroup::kLinear;
}

// Launches the forward or backward row kernel; defined in divergence_kernel.cuh.
template <Variant kVariant, class F>
void launch_rows(const RowParams<F>& params, bool forward, const LaunchInfo& info);

// (limit, threads): a row of up to `limit` columns is served by a block of so many threads.
struct BlockSize {
  int64_t limit;
  int threads;
};
constexpr BlockSize kBlockSizes[] = {{256, 32}, {1024, 64}, {4096, 128}, {16384, 256}};
constexpr int kMaxThreads = 512;

inline int threads_for(int64_t columns) {
  for (const BlockSize& size : kBlockSizes) {
    if (columns <= size.limit) return size.threads;
  }
  return kMaxThreads;
}

// Stands for a storage type that is known at run time only.
struct AnyFloat {};

// Calls fn with a null pointer of the storage type.
template <class T, class F, class Fn>
KD_DEVICE void with_type(DType dtype, Fn&& fn) {
  if constexpr (!std::is_same<T, AnyFloat>::value) {
    fn(static_cast<T*>(nullptr));
  } else {
    switch (dtype) {
      case DType::kFloat16: return fn(static_cast<f16*>(nullptr));
      case DType::kBFloat16: return fn(static_cast<bf16*>(nullptr));
      case DType::kFloat32: return fn(static_cast<float*>(nullptr));
      default:
        // float64 is served by the emulator only: a GPU that trains in it is no target, and eight
        // doubles a chunk would cost the other types their registers.
        if constexpr (std::is_same<F, double>::value) fn(static_cast<double*>(nullptr));
    }
  }
}

// A student and a teacher row with their gradients, cut into chunks on one grid.
template <class TS, class TT, class F>
class RowPair {
 public:
  KD_DEVICE RowPair(const RowParams<F>& params, int64_t row)
      : types_{params.student.dtype, params.teacher.dtype},
        valid_z_(params.valid_student),
        valid_a_(params.valid_teacher),
        z_chunks_(0, static_cast<const char*>(nullptr)),
        a_chunks_(0, static_cast<const char*>(nullptr)) {
    with_type<TS, F>(types_[0], [&](auto* s) {
      with_type<TT, F>(types_[1], [&](auto* t) {
        const auto* z = start(s, params.student, row);
        const auto* a = start(t, params.teacher, row);
        auto* gz = start(s, params.grad_student, row);
        auto* ga = start(t, params.grad_teacher, row);
        // All four agree on the grid; only the ends differ.
        z_chunks_ = RowChunks<kChunk>(params.student.columns, z, a, gz, ga);
        a_chunks_ = RowChunks<kChunk>(params.teacher.columns, z, a, gz, ga);
        z_ = z, a_ = a, gz_ = gz, ga_ = ga;
      });
    });
  }

  KD_DEVICE int64_t count() const {
    const int64_t z = z_chunks_.count(), a = a_ ? a_chunks_.count() : 0;
    return z > a ? z : a;
  }
  // Column of the chunk's first element; negative where a misaligned row begins.
  KD_DEVICE int64_t begin(int64_t chunk) const { return z_chunks_.begin(chunk); }

  // Both rows; what lies outside of a row or of its valid columns is -inf.
  KD_DEVICE void load(int64_t chunk, F (&z)[kChunk], F (&a)[kChunk]) const {
    load_one<TS>(types_[0], z_, z_chunks_, valid_z_, chunk, z);
    load_one<TT>(types_[1], a_, a_chunks_, valid_a_, chunk, a);
  }

  // One element of a row; -inf outside of its valid columns.
  KD_DEVICE F student_at(int64_t column) const { return at<TS>(types_[0], z_, column, valid_z_); }
  KD_DEVICE F teacher_at(int64_t column) const { return at<TT>(types_[1], a_, column, valid_a_); }

  KD_DEVICE bool wants_student() const { return gz_ != nullptr; }
  KD_DEVICE bool wants_teacher() const { return ga_ != nullptr; }
  KD_DEVICE void store_student(int64_t chunk, const F (&g)[kChunk]) const {
    with_type<TS, F>(types_[0], [&](auto* t) {
      z_chunks_.template store<true>(static_cast<decltype(t)>(gz_), chunk, g);
    });
  }
  KD_DEVICE void store_teacher(int64_t chunk, const F (&g)[kChunk]) const {
    with_type<TT, F>(types_[1], [&](auto* t) {
      a_chunks_.template store<true>(static_cast<decltype(t)>(ga_), chunk, g);
    });
  }

 private:
  template <class T>
  KD_DEVICE static T* start(T*, const Rows& rows, int64_t row) {
    return rows.data ? static_cast<T*>(rows.data) + row * rows.stride : nullptr;
  }

  template <class T>
  KD_DEVICE static void load_one(DType dtype, const void* row, const RowChunks<kChunk>& chunks,
                                 int64_t valid, int64_t chunk, F (&out)[kChunk]) {
    const int64_t first = chunks.begin(chunk);
    if (row == nullptr || first >= valid) {
      for (int i = 0; i < kChunk; ++i) out[i] = F(-kInfinity);
      return;
    }
    with_type<T, F>(dtype, [&](auto* t) {
      chunks.load(static_cast<const std::remove_pointer_t<decltype(t)>*>(row), chunk,
                  F(-kInfinity), out);
    });
    if (first + kChunk > valid) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (first + i >= valid) out[i] = F(-kInfinity);
      }
    }
  }

  template <class T>
  KD_DEVICE static F at(DType dtype, const void* row, int64_t column, int64_t valid) {
    F out = F(-kInfinity);
    if (row == nullptr || column < 0 || column >= valid) return out;
    with_type<T, F>(dtype, [&](auto* t) {
      out = static_cast<F>(to_float(static_cast<decltype(t)>(const_cast<void*>(row))[column]));
    });
    return out;
  }

  DType types_[2];
  const void *z_ = nullptr, *a_ = nullptr;
  void *gz_ = nullptr, *ga_ = nullptr;
  int64_t valid_z_, valid_a_;
  RowChunks<kChunk> z_chunks_, a_chunks_;
};

// Online sums of 2^((x - max) scale), and of weights times that, with the maximum kept as the logit it
// is: x - max rounds nothing where it matters, whereas x scale loses what a collapsed row, whose other
// probabilities are 1e-9, is made of. Otherwise as OnlineSums of common/online.h.
template <class F, int K>
struct LogitSums {
  F max;
  F scale;  // any, while max is -inf
  F sum[K];

  KD_HOST_DEVICE LogitSums() : max(F(-kInfinity)), scale(F(1)) {
    for (int k = 0; k < K; ++k) sum[k] = F(0);
  }

  KD_HOST_DEVICE F reference() const { return max == F(-kInfinity) ? F(0) : max; }

  KD_HOST_DEVICE void raise(F x) {
    const F raised = x > max ? x : max;
    rescale(exp2((max - (raised == F(-kInfinity) ? F(0) : raised)) * scale));
    max = raised;
  }
  // e = 2^((x - reference()) scale), after raise(x).
  KD_HOST_DEVICE void add(F e) { sum[0] = sum[0] + e; }
  KD_HOST_DEVICE void add_weight(int k, F e, F weight) {
    sum[k] = sum[k] + select(e == F(0), F(0), e * weight);
  }

  KD_HOST_DEVICE void merge(const LogitSums& other) {
    if (other.max > F(-kInfinity)) scale = other.scale;
    raise(other.max);
    LogitSums scaled = other;
    scaled.rescale(exp2((other.max - reference()) * scale));
    for (int k = 0; k < K; ++k) sum[k] = sum[k] + scaled.sum[k];
  }

  KD_HOST_DEVICE F mean(int k) const { return sum[k] / sum[0]; }

 private:
  // An infinite weighted sum far below a new maximum counts nothing: 0 * inf = 0.
  KD_HOST_DEVICE void rescale(F by) {
    sum[0] = sum[0] * by;
    for (int k = 1; k < K; ++k) {
      sum[k] = select(is_inf(sum[k]) && by == F(0), F(0), sum[k] * by);
    }
  }
};

// One row's softmax, ready to be evaluated: probability 2^exponent(x) inverse.
template <class F>
struct Softmax {
  F scale;      // log2(e) / tau
  F reference;  // the largest logit; 0 if the row holds only -inf
  F sum;        // of 2^((x - reference) scale); 0 if the row holds only -inf
  F log2_sum, inverse;

  KD_DEVICE Softmax(F tau, F max, F total)
      : scale(F(kLog2E) / tau), reference(max), sum(total), log2_sum(F(0)), inverse(F(0)) {
    if (max == F(-kInfinity)) reference = F(0);
    if (sum != F(0)) {
      log2_sum = log2(sum);
      inverse = F(1) / sum;
    }
  }

  KD_DEVICE bool is_empty() const { return sum == F(0); }
  KD_DEVICE F lse() const { return fma(reference, scale, log2_sum); }
  KD_DEVICE F exponent(F x) const { return (x - reference) * scale; }
};

// Whether the logits of two models lie side by side, given how far one leads. Then a - z rounds
// little or nothing; where a constant lies between them, each logit's distance from its own row's
// reference rounds less.
template <class F>
KD_DEVICE bool are_close(F lead) {
  return abs(lead) < F(4);
}

// Where the weights of the linear group start, so that they stay small: the logits at column 0, if
// both are finite.
template <class F>
struct Origin {
  F student, teacher, lead;
  bool close;

  template <class Pair>
  KD_DEVICE explicit Origin(const Pair& pair) : student(F(0)), teacher(F(0)) {
    const F z = pair.student_at(0), a = pair.teacher_at(0);
    if (abs(z) < F(kInfinity)) {
      student = z;
      if (abs(a) < F(kInfinity)) teacher = a;
    }
    lead = teacher - student;
    close = are_close(lead);
  }
};

// Both softmaxes of a row: logits in, entries out.
//
// log p - log q is the difference of the logits less that of the two largest ones, less
// log(sum_t / sum_s): exactly 0 for equal rows, and exactly the last term where both rows have their
// maximum, which is what a row that lies on one entry is made of.
template <class F>
struct RowSoftmax {
  Softmax<F> student, teacher;
  F lead;        // the teacher's largest logit minus the student's
  F sums;        // log2(teacher.sum / student.sum)
  F correction;  // see correct()
  bool same_temperature, close;

  KD_DEVICE RowSoftmax(const Softmax<F>& s, const Softmax<F>& t, bool same)
      : student(s),
        teacher(t),
        lead(t.reference - s.reference),
        correction(F(0)),
        same_temperature(same),
        close(are_close(lead)) {
    // One logarithm of the quotient is nearer than the difference of two.
    sums = s.is_empty() || t.is_empty() ? t.log2_sum - s.log2_sum : log2(t.sum / s.sum);
  }

  // log2-sum-exp of the teacher minus the student's, of logits less their origin.
  KD_DEVICE F gap(const Origin<F>& origin) const {
    const F s = student.reference - origin.student, t = teacher.reference - origin.teacher;
    F top = t * teacher.scale - s * student.scale;
    if (same_temperature) top = (origin.close ? lead - origin.lead : t - s) * student.scale;
    return top + sums;
  }

  // The normalisers are rounded, so all log p - log q are off by one common number: 1e-7, which is
  // much where the rows differ by little. sum (q - p), measured as sum p (e^-d - 1), is that number.
  KD_DEVICE void correct(F excess) { correction += F(kLog2E) * log1p(excess); }

  KD_DEVICE Entry<F> entry(F z, F a) const {
    const F xs = student.exponent(z), xt = teacher.exponent(a);
    const F log_q = xs - student.log2_sum, log_p = xt - teacher.log2_sum;
    Entry<F> e;
    e.q = exp2(xs) * student.inverse;
    e.p = exp2(xt) * teacher.inverse;
    e.lq = F(kLn2) * log_q;
    e.lp = F(kLn2) * log_p;
    F d = log_p - log_q;
    if (same_temperature) {
      const F apart = close ? (a - z) - lead
                            : (a - teacher.reference) - (z - student.reference);
      d = fma(apart, student.scale, -sums);
    }
    e.d = F(kLn2) * (d + correction);
    return e;
  }
};

}  // namespace kd::cuda
