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

  KD_DEVICE int64_t label(int64_t row) const { return labels[row * labels_stride]; }
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
constexpr BlockSize kBlockSizes[] = {{256, 32}, {1024, 64}, {4096, 128}};
constexpr int kMaxThreads = 256;

inline int threads_for(int64_t columns) {
  for (const BlockSize& size : kBlockSizes) {
    if (columns <= size.limit) return size.threads;
  }
  return kMaxThreads;
}

// One element of a row of a type known at run time.
template <class F>
KD_DEVICE F read_any(const void* row, DType dtype, int64_t column) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const f16*>(row)[column]);
    case DType::kBFloat16:
      return to_float(static_cast<const bf16*>(row)[column]);
    // float64 is served by the emulator only, which is built with F = double too.
    case DType::kFloat64:
      return static_cast<F>(static_cast<const double*>(row)[column]);
    default:
      return static_cast<const float*>(row)[column];
  }
}

template <class F>
KD_DEVICE void write_any(void* row, DType dtype, int64_t column, F value) {
  switch (dtype) {
    case DType::kFloat16:
      static_cast<f16*>(row)[column] = cast<f16>(value);
      break;
    case DType::kBFloat16:
      static_cast<bf16*>(row)[column] = cast<bf16>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(row)[column] = static_cast<double>(value);
      break;
    default:
      static_cast<float*>(row)[column] = cast<float>(value);
  }
}

KD_DEVICE int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A student and a teacher row with their gradients, in chunks of kChunk columns on one grid. What
// lies outside of a row or of its valid columns reads as -inf.
//
// This one is for two rows of the type T, on any alignment.
template <class T, class F>
class RowPair {
 public:
  KD_DEVICE RowPair(const RowParams<F>& params, int64_t row)
      : z_(start(params.student, row)),
        a_(start(params.teacher, row)),
        gz_(start(params.grad_student, row)),
        ga_(start(params.grad_teacher, row)),
        valid_z_(params.valid_student),
        valid_a_(params.valid_teacher),
        // All four agree on the grid; only the ends differ.
        z_chunks_(params.student.columns, z_, a_, gz_, ga_),
        a_chunks_(params.teacher.columns, z_, a_, gz_, ga_) {}

  KD_DEVICE int64_t count() const {
    const int64_t z = z_chunks_.count(), a = a_ ? a_chunks_.count() : 0;
    return z > a ? z : a;
  }
  // Column of the chunk's first element; negative where a misaligned row begins.
  KD_DEVICE int64_t begin(int64_t chunk) const { return z_chunks_.begin(chunk); }

  KD_DEVICE void load(int64_t chunk, F (&z)[kChunk], F (&a)[kChunk]) const {
    load_one(z_, z_chunks_, valid_z_, chunk, z);
    load_one(a_, a_chunks_, valid_a_, chunk, a);
  }
  KD_DEVICE F student_at(int64_t column) const { return at(z_, column, valid_z_); }
  KD_DEVICE F teacher_at(int64_t column) const { return at(a_, column, valid_a_); }

  KD_DEVICE bool wants_student() const { return gz_ != nullptr; }
  KD_DEVICE bool wants_teacher() const { return ga_ != nullptr; }
  KD_DEVICE void store_student(int64_t chunk, const F (&g)[kChunk]) const {
    z_chunks_.template store<true>(gz_, chunk, g);
  }
  KD_DEVICE void store_teacher(int64_t chunk, const F (&g)[kChunk]) const {
    a_chunks_.template store<true>(ga_, chunk, g);
  }

 private:
  KD_DEVICE static T* start(const Rows& rows, int64_t row) {
    return rows.data ? static_cast<T*>(rows.data) + row * rows.stride : nullptr;
  }

  KD_DEVICE static void load_one(const T* row, const RowChunks<kChunk>& chunks, int64_t valid,
                                 int64_t chunk, F (&out)[kChunk]) {
    const int64_t first = chunks.begin(chunk);
    if (row == nullptr || first >= valid) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[i] = F(-kInfinity);
      return;
    }
    chunks.load(row, chunk, F(-kInfinity), out);
    if (first + kChunk > valid) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (first + i >= valid) out[i] = F(-kInfinity);
      }
    }
  }

  KD_DEVICE static F at(const T* row, int64_t column, int64_t valid) {
    return row && column >= 0 && column < valid ? static_cast<F>(to_float(row[column]))
                                                : F(-kInfinity);
  }

  T *z_, *a_, *gz_, *ga_;
  int64_t valid_z_, valid_a_;
  RowChunks<kChunk> z_chunks_, a_chunks_;
};

// One row of a type known at run time. Vectors where it begins on 16 bytes, single elements
// elsewhere.
template <class F>
struct AnyRow {
  char* data;
  int64_t columns;
  DType dtype;
  bool vectors;

  KD_DEVICE AnyRow(const Rows& rows, int64_t row, int64_t columns_)
      : data(nullptr), columns(columns_), dtype(rows.dtype) {
    if (rows.data) data = static_cast<char*>(rows.data) + row * rows.stride * bytes_of(dtype);
    vectors = reinterpret_cast<uintptr_t>(data) % 16 == 0 && dtype != DType::kFloat64;
  }

  KD_DEVICE F at(int64_t column) const {
    return data && column >= 0 && column < columns ? read_any<F>(data, dtype, column)
                                                   : F(-kInfinity);
  }
  KD_DEVICE void load(int64_t first, F (&out)[kChunk]) const {
    if (!data || !vectors || first + kChunk > columns) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) out[i] = at(first + i);
    } else if (dtype == DType::kFloat32) {
      widen(kd::load<kChunk>(reinterpret_cast<const float*>(data) + first), out);
    } else {
      const Vec<bf16, kChunk> raw = kd::load<kChunk>(reinterpret_cast<const bf16*>(data) + first);
      const bool brain = dtype == DType::kBFloat16;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        out[i] = brain ? to_float(raw.data[i]) : to_float(f16{raw.data[i].bits});
      }
    }
  }
  KD_DEVICE void store(int64_t first, const F (&value)[kChunk]) const {
    if (!vectors || first + kChunk > columns) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (first + i < columns) write_any(data, dtype, first + i, value[i]);
      }
    } else if (dtype == DType::kFloat32) {
      kd::store<true>(reinterpret_cast<float*>(data) + first, narrow<float>(value));
    } else if (dtype == DType::kBFloat16) {
      kd::store<true>(reinterpret_cast<bf16*>(data) + first, narrow<bf16>(value));
    } else {
      kd::store<true>(reinterpret_cast<f16*>(data) + first, narrow<f16>(value));
    }
  }
};

// Stands for a storage type that is known at run time only.
struct AnyFloat {};

// Rows of types known at run time, which may differ: a tenth of the code that all pairs of types
// would be.
template <class F>
class RowPair<AnyFloat, F> {
 public:
  KD_DEVICE RowPair(const RowParams<F>& params, int64_t row)
      : z_(params.student, row, params.valid_student),
        a_(params.teacher, row, params.valid_teacher),
        gz_(params.grad_student, row, params.grad_student.columns),
        ga_(params.grad_teacher, row, params.grad_teacher.columns) {
    const int64_t widest = params.student.columns > params.teacher.columns ? params.student.columns
                                                                           : params.teacher.columns;
    count_ = (widest + kChunk - 1) / kChunk;
  }

  KD_DEVICE int64_t count() const { return count_; }
  KD_DEVICE int64_t begin(int64_t chunk) const { return chunk * kChunk; }
  KD_DEVICE void load(int64_t chunk, F (&z)[kChunk], F (&a)[kChunk]) const {
    z_.load(chunk * kChunk, z);
    a_.load(chunk * kChunk, a);
  }
  KD_DEVICE F student_at(int64_t column) const { return z_.at(column); }
  KD_DEVICE F teacher_at(int64_t column) const { return a_.at(column); }
  KD_DEVICE bool wants_student() const { return gz_.data != nullptr; }
  KD_DEVICE bool wants_teacher() const { return ga_.data != nullptr; }
  KD_DEVICE void store_student(int64_t chunk, const F (&g)[kChunk]) const {
    gz_.store(chunk * kChunk, g);
  }
  KD_DEVICE void store_teacher(int64_t chunk, const F (&g)[kChunk]) const {
    ga_.store(chunk * kChunk, g);
  }

 private:
  AnyRow<F> z_, a_, gz_, ga_;
  int64_t count_;
};

// Online sums of 2^((x - max) scale), and of weights times that, with the maximum kept as the logit
// it is: x - max rounds nothing where it matters, whereas x scale loses what a collapsed row, whose
// other probabilities are 1e-9, is made of. Otherwise as OnlineSums of common/online.h.
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

// teacher.sum / student.sum. Rows that nearly agree consist of its distance from 1, so that is what
// is kept; of a quotient below 1/2 the reciprocal, negated, so that it keeps its digits too.
template <class F>
struct Quotient {
  F code;  // quotient - 1 where that is >= -1/2, else -1 / quotient

  KD_DEVICE static Quotient of(F teacher, F student) {
    return {teacher >= F(0.5) * student ? (teacher - student) / student : -student / teacher};
  }
  KD_DEVICE bool is_excess() const { return code >= F(-0.5); }
  KD_DEVICE F times(F student) const {
    return is_excess() ? fma(student, code, student) : -student / code;
  }
  KD_DEVICE F log2_value() const { return is_excess() ? F(kLog2E) * log1p(code) : -log2(-code); }
  KD_DEVICE Quotient divided_by_one_plus(F x) const {
    return {is_excess() ? (code - x) / (F(1) + x) : code * (F(1) + x)};
  }
};

// The first four statistics of a row.
template <class F>
struct RowSums {
  F student_reference, student_sum, teacher_reference;
  F quotient;  // code of teacher's sum / student's; the teacher's sum where the student's is 0

  KD_DEVICE F teacher_sum() const {
    return student_sum == F(0) ? quotient : Quotient<F>{quotient}.times(student_sum);
  }
};

// Both softmaxes of a row: logits in, entries out.
//
// log p - log q is the difference of the logits less that of the two largest ones, less
// log(sum_t / sum_s): exactly 0 for equal rows, and exactly the last term where both rows have
// their maximum, which is what a row that lies on one entry is made of.
template <class F>
struct RowSoftmax {
  Softmax<F> student, teacher;
  F lead;          // the teacher's largest logit minus the student's
  F lead_of_sums;  // log2(teacher.sum / student.sum)
  Quotient<F> quotient;
  bool same_temperature, close;

  KD_DEVICE RowSoftmax(const Softmax<F>& s, const Softmax<F>& t, bool same)
      : student(s),
        teacher(t),
        lead(t.reference - s.reference),
        lead_of_sums(F(0)),
        quotient(Quotient<F>::of(t.sum, s.sum)),
        same_temperature(same),
        close(are_close(lead)) {
    update();
  }

  // As a backward finds it in the statistics.
  KD_DEVICE RowSoftmax(const RowSums<F>& sums, F student_tau, F teacher_tau)
      : RowSoftmax(Softmax<F>(student_tau, sums.student_reference, sums.student_sum),
                   Softmax<F>(teacher_tau, sums.teacher_reference, sums.teacher_sum()),
                   student_tau == teacher_tau) {
    quotient = {sums.quotient};
    update();
  }

  KD_DEVICE RowSums<F> row_sums() const {
    return {student.reference, student.sum, teacher.reference,
            student.is_empty() ? teacher.sum : quotient.code};
  }

  KD_DEVICE void update() {
    // A row without any entry has no normaliser; its entries are infinitely far from the other's.
    lead_of_sums = student.is_empty() || teacher.is_empty() ? teacher.log2_sum - student.log2_sum
                                                            : quotient.log2_value();
  }

  // log2-sum-exp of the teacher minus the student's, of logits less their origin.
  KD_DEVICE F gap(const Origin<F>& origin) const {
    const F s = student.reference - origin.student, t = teacher.reference - origin.teacher;
    F top = t * teacher.scale - s * student.scale;
    if (same_temperature) top = (origin.close ? lead - origin.lead : t - s) * student.scale;
    return top + lead_of_sums;
  }

  // The normalisers are rounded, so all log p - log q are off by one common number: 1e-7, which is
  // much where the rows differ by little. sum (q - p), measured as sum p (e^-d - 1), is that
  // number.
  KD_DEVICE void correct(F measured) {
    quotient = quotient.divided_by_one_plus(measured);
    update();
  }

  KD_DEVICE Entry<F> entry(F z, F a) const {
    const F xs = student.exponent(z), xt = teacher.exponent(a);
    const F log_q = xs - student.log2_sum, log_p = xt - teacher.log2_sum;
    Entry<F> e;
    e.q = exp2(xs) * student.inverse;
    e.p = exp2(xt) * teacher.inverse;
    e.lq = F(kLn2) * log_q;
    e.lp = F(kLn2) * log_p;
    F d = (xt - xs) - lead_of_sums;
    if (same_temperature) {
      const F apart = close ? (a - z) - lead : (a - teacher.reference) - (z - student.reference);
      d = fma(apart, student.scale, -lead_of_sums);
    }
    e.d = F(kLn2) * d;
    return e;
  }
};

}  // namespace kd::cuda
